"""The client with a server: both protocols, and errors."""

import base64
import json
import pathlib
import re
import urllib.error
import urllib.request

import numpy as np
import pytest
from absl import flags
from PIL import Image

pytest.importorskip("tensorflow_serving", reason="pip install '.[serving]'")

import serving

from cappa_tf.data.images import image_files
from cappa_tf.inference.captions import CaptionDecoder
from cappa_tf.saving import run_folder
from tools import serving_client

TEXTS = ["red circle", "green"]


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the tool; returns exit code, stdout, stderr."""

    def call(*arguments):
        values = flags.FlagValues()
        serving_client.define_flags(values)
        monkeypatch.setattr(flags, "FLAGS", values)
        rest = values(["serving_client.py", *map(str, arguments)])
        return serving_client.main(rest), *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Six images, one of them stored sideways."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.RandomState(0)
    for number in range(6):
        pixels = random.randint(256, size=(2, 3, 3)).astype("uint8")
        image = Image.fromarray(pixels).resize((40, 30))
        exif = Image.Exif()
        if number == 3:
            exif[0x0112] = 6
        image.save(folder / f"{number}.jpg", exif=exif)
    return folder


@pytest.fixture(scope="module")
def captions(served, pictures):
    """The captions of tools/caption.py."""
    tokenizer, preprocessing = run_folder.load_preprocessing(served.run)
    decoder = CaptionDecoder(run_folder.load_model(served.run), tokenizer, 8)
    rows = decoder.caption_files(
        image_files.find_pictures([str(pictures)]), preprocessing
    )
    return [row.caption for _, row, _ in rows]


def _server(served, protocol):
    return (
        f"--protocol={protocol}",
        f"--address={getattr(served, protocol)}",
        f"--model={serving.NAME}",
    )


def _rows(out):
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_captions_are_those_of_the_tool(
    run, served, pictures, captions, protocol
):
    code, out, err = run(
        *_server(served, protocol),
        "--format=jsonl",
        "--batch_size=4",
        "--concurrency=3",
        "--repeat=5",
        pictures,
    )
    rows = _rows(out)
    assert code == 0
    assert [row["caption"] for row in rows] == captions
    names = [pathlib.Path(row["image"]).name for row in rows]
    assert names == [f"{number}.jpg" for number in range(6)]
    assert "30 images in 10 requests, 0 failed" in err
    latencies = re.findall(r"p\d\d (\d+)", err)
    assert len(latencies) == 3 and latencies == sorted(latencies, key=int)


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_scores_and_features(run, served, pictures, protocol, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text(f"{TEXTS[1]}\n\n")
    picture = pictures / "0.jpg"
    _, out, _ = run(
        *_server(served, protocol),
        "--format=jsonl",
        "--signature=score",
        f"--text={TEXTS[0]}",
        f"--texts_file={texts}",
        picture,
    )
    content = picture.read_bytes()
    expected = served.predict("score", image_bytes=[content], texts=[TEXTS])
    (row,) = _rows(out)
    assert list(row["scores"]) == TEXTS
    np.testing.assert_allclose(
        [*row["scores"].values()], expected["log_likelihood"][0], atol=1e-3
    )
    _, out, _ = run(
        *_server(served, protocol),
        "--format=jsonl",
        "--signature=embed",
        picture,
    )
    expected = served.predict("embed", image_bytes=[content])
    np.testing.assert_allclose(
        _rows(out)[0]["embedding"], expected["embedding"][0], atol=1e-4
    )


def test_the_table_has_the_best_text_first(run, served, pictures):
    code, out, _ = run(
        *_server(served, "rest"),
        "--signature=score",
        *(f"--text={text}" for text in TEXTS),
        pictures / "0.jpg",
    )
    scores = [float(line.split()[0]) for line in out.splitlines()]
    assert code == 0 and len(scores) == 2 and scores[0] >= scores[1]


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_what_fails_is_named_and_the_rest_answered(
    run, served, pictures, protocol, tmp_path
):
    # Pillow decodes it, but it is more than this server takes.
    large = tmp_path / "large.png"
    Image.new("L", (1001, 1000)).save(large)
    notes = tmp_path / "notes.txt"
    notes.write_text("no image")
    missing = tmp_path / "missing.jpg"
    code, out, err = run(
        *_server(served, protocol),
        "--format=jsonl",
        "--batch_size=8",
        notes,
        large,
        pictures / "0.jpg",
        missing,
    )
    assert code == 1
    assert f"{notes}: image cannot be decoded" in err
    assert f"{large}: image_bytes: more than 1000000 pixels" in err
    assert f"{missing}: image missing" in err
    rows = _rows(out)
    assert ["error" in row for row in rows] == [True, True, False, True]
    assert "4 images in 1 requests, 3 failed" in err


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_a_refused_request_names_its_files(run, served, pictures, protocol):
    address = getattr(served, protocol)
    code, _, err = run(
        f"--protocol={protocol}",
        f"--address={address}",
        f"--model={serving.UNBATCHED}",
        "--batch_size=13",
        *[pictures / "0.jpg"],
        *[pictures] * 2,
    )
    assert code == 1
    assert re.search(r"0\.jpg: .*image_bytes must be a list of 1 to 12", err)


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_a_server_that_is_not_there(run, pictures, protocol):
    with pytest.raises(
        SystemExit, match="--address=localhost:1: .*localhost:1"
    ):
        run(
            f"--protocol={protocol}",
            "--address=localhost:1",
            "--timeout=1",
            pictures,
        )


def test_a_model_that_is_not_there(run, served, pictures):
    with pytest.raises(SystemExit, match="models/nope: HTTP 404"):
        run(
            "--protocol=rest",
            f"--address={served.rest}",
            "--model=nope",
            pictures,
        )
    code, _, err = run(
        f"--address={served.grpc}", "--model=nope", pictures / "0.jpg"
    )
    assert code == 1 and "NOT_FOUND" in err and "nope" in err


def test_flags_that_do_not_fit(run, pictures, tmp_path):
    with pytest.raises(SystemExit, match="which needs at least one"):
        run("--signature=score", pictures)
    with pytest.raises(SystemExit, match="are for --signature=score"):
        run("--text=a", pictures)
    with pytest.raises(SystemExit, match="embed needs --format=jsonl"):
        run("--signature=embed", pictures)
    with pytest.raises(SystemExit, match="--texts_file=.*nothing.txt"):
        run("--signature=score", f"--texts_file={tmp_path}/nothing.txt")
    code, _, err = run(tmp_path)
    assert code == 2 and "Nothing to send" in err


def _post(served, body):
    """Sends a request as curl does."""
    request = urllib.request.Request(
        f"http://{served.rest}/v1/models/{serving.NAME}:predict",
        json.dumps(body).encode(),
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as file:
            return json.load(file, parse_constant=pytest.fail)
    except urllib.error.HTTPError as error:
        return json.load(error)


def test_rest_by_hand(served, pictures, captions):
    image = {
        "b64": base64.b64encode((pictures / "0.jpg").read_bytes()).decode()
    }
    # One input needs no name; caption is the default.
    (row,) = _post(served, {"instances": [image]})["predictions"]
    assert row["caption"] == captions[0] and row["ok"]
    named = {"instances": [{"image_bytes": image}]}
    assert _post(served, named)["predictions"][0]["caption"] == captions[0]
    scores = _post(
        served,
        {
            "signature_name": "score",
            "instances": [{"image_bytes": image, "texts": TEXTS}],
        },
    )
    assert len(scores["predictions"][0]["log_likelihood"]) == 2
    flagged = _post(served, {"instances": [{"image_bytes": "text"}, named]})
    assert "error" in flagged
    flagged = _post(served, {"inputs": ["text", image]})["outputs"]
    assert flagged["ok"] == [False, True]
    assert "error" in _post(served, {"instances": []})
    assert "image_bytes" in _post(served, {"inputs": {"a": 1}})["error"]
