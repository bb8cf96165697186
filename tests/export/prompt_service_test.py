"""A served captioner that was trained with prompts answers like the tool."""

import io
import json

import numpy as np
import pytest
import tiny
from absl import flags
from PIL import Image

pytest.importorskip("tensorflow_serving", reason="pip install '.[serving]'")

import grpc
import serving

from cappa_tf.data.tokenizer import Tokenizer, train_tokenizer
from cappa_tf.export import saved_model
from cappa_tf.inference.predictor import Predictor
from cappa_tf.models.captioner import Captioner
from cappa_tf.models.text_decoder import TextDecoder
from cappa_tf.models.vision_encoder import VisionEncoder
from cappa_tf.saving import run_folder
from tools import serving_client

LENGTH = 24
ASKED = ["answer: red or green", "caption:", "answer: what"]


class _Data(tiny.Data):
    """What a run needs to know of its data."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """The service, in a process without this project."""
    folder = tmp_path_factory.mktemp("asked")
    words = [f"{a} {b}" for a in tiny.WORDS for b in tiny.WORDS]
    words += ["caption: answer: red or green what is this?"] * 4
    train_tokenizer(words, str(folder / "v.model"), 60)
    tokenizer = Tokenizer(str(folder / "v.model"), LENGTH)
    small = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32}
    model = Captioner(
        VisionEncoder(patch_size=8, image_size=16, **small),
        TextDecoder(tokenizer.vocabulary_size, LENGTH, **small),
        prompts=("caption:", "answer: {question}"),
    )
    model.build()
    random = np.random.RandomState(0)
    for weight in model.trainable_variables:
        weight.assign(random.normal(0, 0.5, weight.shape))
    run = str(folder / "run")
    run_folder.open_workdir(run)
    run_folder.describe_run(run, model, _Data(tokenizer))
    run_folder.save_model(run, model)
    served = str(folder / "served")
    saved_model.export_saved_model(
        served, serving.service(run), name=serving.NAME
    )
    with serving.serve(run, served) as process:
        yield process


@pytest.fixture(scope="module")
def contents():
    """Three PNG files."""
    found = []
    for i in range(3):
        pixels = np.random.RandomState(i).randint(256, size=(2, 2, 3))
        file = io.BytesIO()
        image = Image.fromarray(pixels.astype("uint8")).resize((20, 20))
        image.save(file, "PNG")
        found.append(file.getvalue())
    return found


def test_each_image_is_answered(asked, contents):
    predictor = Predictor.open(asked.run)
    images = np.stack(
        [predictor.preprocessing.read_bytes(content) for content in contents]
    )
    answer = asked.predict("caption", image_bytes=contents, prompt=ASKED)
    assert answer["ok"].all()
    said = [caption.decode() for caption in answer["caption"]]
    rows = predictor.decoder.decode(images, ["a", "b", "c"], prompts=ASKED)
    assert said == [row.caption for row in rows]
    np.testing.assert_allclose(
        answer["log_likelihood"],
        [row.log_likelihood for row in rows],
        atol=1e-3,
    )
    texts = [["red", "green square"]] * 3
    scores = asked.predict(
        "score", image_bytes=contents, texts=texts, prompt=ASKED
    )
    expected = predictor.score_captions(images, texts, prompts=ASKED)
    np.testing.assert_allclose(scores["log_likelihood"], expected, atol=1e-3)
    assert asked.warmed_up == 8  # Four signatures, of prompts that it knows.


def test_a_wrong_prompt_is_the_error_of_its_image(asked, contents):
    prompts = [b"what", b"caption:", b"caption: \xff"]
    answer = asked.predict("caption", image_bytes=contents, prompt=prompts)
    assert answer["ok"].tolist() == [False, True, False]
    first, _, last = (error.decode() for error in answer["error"])
    assert first.startswith("prompt: the model was trained with other prompts")
    assert "'answer: {question}'" in first
    assert last == "prompt: it is not UTF-8"
    long = ["answer: " + "red " * 40] * 3
    answer = asked.predict("caption", image_bytes=contents, prompt=long)
    assert {e.decode() for e in answer["error"]} == {
        "prompt: more than 22 tokens"
    }
    for inputs in ({}, {"prompt": ["caption:"]}):
        with pytest.raises(grpc.RpcError, match="prompt"):
            asked.predict(
                "caption",
                name=serving.UNBATCHED,
                image_bytes=contents,
                **inputs,
            )
    assert asked.is_alive()


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_the_client_sends_a_prompt(
    asked, contents, protocol, tmp_path, capsys, monkeypatch
):
    path = tmp_path / "a.png"
    path.write_bytes(contents[0])
    values = flags.FlagValues()
    serving_client.define_flags(values)
    monkeypatch.setattr(flags, "FLAGS", values)
    arguments = (
        f"--protocol={protocol}",
        f"--address={getattr(asked, protocol)}",
        f"--model={serving.NAME}",
        "--format=jsonl",
        f"--prompt={ASKED[0]}",
    )
    rest = values(["serving_client.py", *arguments, str(path)])
    assert serving_client.main(rest) == 0
    row = json.loads(capsys.readouterr().out)
    answer = asked.predict(
        "caption", image_bytes=contents[:1], prompt=ASKED[:1]
    )
    assert row["caption"] == answer["caption"][0].decode()
