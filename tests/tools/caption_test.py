"""tools/caption.py: captions from a run's folder, for any images."""

import json
import os
import shutil

import numpy as np
import pytest
import tensorflow as tf
import tiny
from absl import app, flags
from PIL import Image
from tool_flags import defined

from cappa_tf.inference.predictor import Predictor
from cappa_tf.presets import save_preset
from cappa_tf.saving import preset_folder
from cappa_tf.saving import run_folder as saving
from cappa_tf.utils import files
from tools import caption


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The folder of an untrained run."""
    vocabulary = tmp_path_factory.mktemp("vocabulary")
    folder = str(tmp_path_factory.mktemp("run"))
    data = tiny.Data(vocabulary)
    model = tiny.make_model(tiny.vocabulary(vocabulary)[1])
    model.build()
    head = model.text_decoder.head_weights[1]
    head.assign(tf.random.stateless_normal(head.shape, [1, 2]))
    saving.describe_run(folder, model, data)
    saving.save_model(folder, model)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Five files in two folders, two of them bad."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "below").mkdir()
    random = np.random.RandomState(0)
    pixels = random.randint(256, size=(20, 30, 3)).astype("uint8")
    Image.fromarray(pixels).save(folder / "a.png")
    Image.fromarray(pixels[..., 0]).save(folder / "b.jpg")
    Image.fromarray(pixels).save(folder / "below" / "c.webp")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    (folder / "notes.txt").write_text("not looked at")
    return folder


@pytest.fixture(scope="module")
def tool():
    with defined(caption) as tool:
        yield tool


def _run(tool, capsys, *arguments):
    flags.FLAGS.unparse_flags()
    others = ("sampler", "format", "checkpoint", "preset", "demo", "data")
    others += ("batch_size", "gin_file")
    for name in (*tool._PLAIN, *tool._OF_SAMPLERS, *others, *tool._OF_DATA):
        flags.FLAGS[name].unparse()
    rest = flags.FLAGS(["caption.py", *arguments])
    code = tool.main(rest)
    return code, *capsys.readouterr()


def test_jsonl_names_what_cannot_be_read(tool, capsys, run_folder, pictures):
    missing = str(pictures / "missing.jpg")
    code, out, err = _run(
        tool,
        capsys,
        f"--checkpoint={run_folder}",
        "--format=jsonl",
        "--batch_size=2",
        str(pictures),
        missing,
    )
    rows = [json.loads(line) for line in out.splitlines()]
    names = [os.path.relpath(row["image"], pictures) for row in rows]
    assert names == [
        "a.png",
        "b.jpg",
        "below/c.webp",
        "broken.jpg",
        "missing.jpg",
    ]
    assert code == 1
    assert rows[3]["error"] == "image cannot be decoded"
    assert rows[4]["error"] == "image missing"
    assert "broken.jpg: image cannot be decoded" in err
    for row in rows[:3]:
        assert row["log_likelihood"] < 0.0 and row["tokens"] >= 1
    assert rows[0]["caption"] == rows[2]["caption"]


def test_likelihood_is_that_of_the_score(tool, capsys, run_folder, pictures):
    """Of a run in a bucket, too."""
    path = str(pictures / "a.png")
    bucket = "ram://bucket/captioned"
    for name in os.listdir(run_folder):
        content = files.read_bytes(os.path.join(run_folder, name))
        files.write_bytes(f"{bucket}/{name}", content)
    code, out, _ = _run(
        tool, capsys, f"--checkpoint={bucket}", "--format=jsonl", path
    )
    assert code == 0
    row = json.loads(out)
    tokenizer, preprocessing = saving.load_preprocessing(run_folder)
    captioner = saving.load_model(run_folder)
    pixels = preprocessing.read(path)[None]
    tokens = captioner.generate(pixels)["tokens"]
    score = captioner.score(pixels, tokens)
    assert row["log_likelihood"] == pytest.approx(float(score[0, 0]), rel=1e-4)
    assert row["caption"] == tokenizer.detokenize(tokens)[0]


def test_the_demo_of_a_preset_of_the_package(
    tool, capsys, run_folder, tmp_path, monkeypatch
):
    """Eight scenes whose names are their captions, by the preset's name."""
    save_preset(Predictor.open(run_folder), tmp_path / "mini")
    monkeypatch.setattr(preset_folder, "SHIPPED", tmp_path)
    code, out, _ = _run(tool, capsys, "--preset=mini", "--demo")
    assert code == 0
    lines = out.splitlines()[1:]
    assert len(lines) == 8
    for line in lines:
        path = line.split()[2]
        assert os.path.basename(path).startswith(("a_", "the_word_"))
        assert Image.open(path).size == (32, 32)


def test_one_model_is_given(tool, capsys, run_folder):
    for arguments in ([], [f"--checkpoint={run_folder}", "--preset=x"]):
        with pytest.raises(app.UsageError, match="either --checkpoint or"):
            _run(tool, capsys, *arguments, "a.jpg")
    with pytest.raises(app.UsageError, match="--demo takes no images"):
        _run(tool, capsys, "--preset=x", "--demo", "a.jpg")
    with pytest.raises(SystemExit, match="--preset=x: .* a preset "):
        _run(tool, capsys, "--preset=x", "--demo")


def test_the_bar_moves_with_each_image(tool, capsys, run_folder, pictures):
    _, out, err = _run(
        tool, capsys, f"--checkpoint={run_folder}", str(pictures)
    )
    for done in range(1, 5):
        assert f"{done}/4 [" in err
    assert tool._batch_size(3) == 1 and tool._batch_size(1000) == 32


def test_any_file_name(tool, capsys, run_folder, pictures, tmp_path):
    """In UTF-8 or not: the others are captioned, too."""
    names = ["写真.png", os.fsdecode(b"caf\xe9.png"), "z.png"]
    for name in names:
        shutil.copy(pictures / "a.png", tmp_path / name)
    code, out, _ = _run(
        tool,
        capsys,
        f"--checkpoint={run_folder}",
        "--format=jsonl",
        "--sampler=random",
        *[str(tmp_path / name) for name in names],
    )
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [os.path.basename(row["image"]) for row in rows] == names


def test_a_prefix_is_taken_whole_or_not_at_all(
    tool, capsys, run_folder, pictures
):
    given = (f"--checkpoint={run_folder}", str(pictures / "a.png"))
    with pytest.raises(SystemExit, match="leave room for eos.* 9 tokens of"):
        _run(tool, capsys, *given, f"--prefix={'red ' * 9}")
    _, out, err = _run(tool, capsys, *given, "--prefix=Red 犬 blue")
    assert "no piece for '犬'" in err and "'red'" not in err
    assert "red" in out


def test_table_has_a_line_per_picture(tool, capsys, run_folder, pictures):
    code, out, err = _run(
        tool,
        capsys,
        f"--checkpoint={run_folder}",
        "--format=table",
        str(pictures),
    )
    assert code == 1 and "broken.jpg" in err and "1 of 4 unreadable" in err
    lines = out.splitlines()
    assert len(lines) == 4 and "a.png" in lines[1]


def test_nothing_to_caption(tool, capsys, run_folder, tmp_path):
    code, _, err = _run(
        tool, capsys, f"--checkpoint={run_folder}", str(tmp_path)
    )
    assert code == 2 and "Nothing to caption" in err
    with pytest.raises(SystemExit, match="--checkpoint=.*: `path` must be"):
        _run(tool, capsys, f"--checkpoint={tmp_path}", "a.png")


def test_several_captions_a_picture(tool, capsys, run_folder, pictures):
    """The best first; the same in any batch, with a seed, and in the sum."""
    outputs = [
        _run(
            tool,
            capsys,
            f"--checkpoint={run_folder}",
            "--format=jsonl",
            f"--batch_size={batch_size}",
            "--sampler=random",
            "--temperature=2",
            "--seed=3",
            "--num_captions=2",
            "--prefix=red",
            str(pictures / "a.png"),
            str(pictures / "b.jpg"),
        )[1]
        for batch_size in (1, 2)
    ]
    rows, again = ([json.loads(x) for x in o.splitlines()] for o in outputs)
    assert [row["rank"] for row in rows] == [1, 2, 1, 2]
    assert [row["caption"] for row in rows] == [r["caption"] for r in again]
    assert all(row["caption"].startswith("red") for row in rows)
    assert rows[0]["log_likelihood"] >= rows[1]["log_likelihood"]
    for row in rows:
        assert sum(row["log_probs"]) == pytest.approx(
            row["log_likelihood"], rel=1e-4
        )


def test_refuses_a_flag_that_its_sampler_ignores(
    tool, capsys, run_folder, pictures
):
    with pytest.raises(Exception, match="beam does not use --temperature"):
        _run(
            tool,
            capsys,
            f"--checkpoint={run_folder}",
            "--sampler=beam",
            "--temperature=2",
            str(pictures / "a.png"),
        )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--min_length=99"],
        ["--num_captions=2"],
        ["--no_repeat_ngram=-1"],
        ["--sampler=top_k", "--top_k=0"],
        ["--sampler=top_p", "--top_p=1.5"],
        ["--sampler=random", "--temperature=0.0"],
        ["--sampler=beam", "--beams=0"],
    ],
)
def test_wrong_generation_is_one_line(
    tool, capsys, run_folder, pictures, arguments
):
    with pytest.raises(SystemExit) as error:
        _run(
            tool,
            capsys,
            f"--checkpoint={run_folder}",
            *arguments,
            str(pictures / "a.png"),
        )
    assert arguments[-1] in str(error.value)
    assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""


@pytest.fixture(scope="module")
def some_data(tmp_path_factory):
    """A folder of three captioned images; one is not an image."""
    folder = tmp_path_factory.mktemp("some") / "photos"
    folder.mkdir()
    for i, word in enumerate(("red", "blue", "green")):
        Image.new("RGB", (16, 16), word).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"{word} circle")
    (folder / "1.png").write_bytes(b"no image")
    return folder


def test_a_data_set_is_scored(tool, capsys, run_folder, some_data, tmp_path):
    parquet = pytest.importorskip(
        "pyarrow.parquet", reason="pip install '.[parquet]'"
    )
    (tmp_path / "labels.txt").write_text("red circle\n\nblue circle\n")
    code, out, err = _run(
        tool,
        capsys,
        f"--checkpoint={run_folder}",
        f"--data={some_data}",
        f"--output={tmp_path / 'out'}",
        "--write=scores",
        f"--labels={tmp_path / 'labels.txt'}",
        "--format=parquet",
    )
    assert code == 0 and "3/3 [" in err
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["split", "rows", "shards"]
    assert sum(int(line[1]) for line in lines[1:-2]) == 3
    assert lines[-2] == "bad: image cannot be decoded 1".split()
    rows = {
        row["key"]: row
        for path in (tmp_path / "out").glob("*.parquet")
        for row in parquet.read_table(path).to_pylist()
    }
    assert rows.pop("1.png")["error"] == "image cannot be decoded"
    for row in rows.values():
        best = ("red circle", "blue circle")[np.argmax(row["scores"])]
        assert row["best"] == best


def test_a_data_set_by_its_gin_file(tool, capsys, some_data):
    """As it would be trained on."""
    flags.FLAGS.unparse_flags()
    files = ("gin/cappa_s16.gin", "gin/data/folder.gin")
    flags.FLAGS(
        [
            "caption.py",
            *[f"--gin_file={path}" for path in files],
            f"--gin_param=DATA='{some_data}'",
            "--gin_param=TOKENIZER='none'",
        ]
    )
    source = tool._source()
    assert (type(source).__name__, source.name) == (
        "ImageFolder",
        str(some_data),
    )


def test_flags_of_images_and_of_data_sets(tool, capsys, run_folder, some_data):
    one = (f"--checkpoint={run_folder}",)
    data = (*one, f"--data={some_data}")
    for arguments, message in (
        ([*one, "--overwrite", "a.jpg"], "--overwrite=True is for --data"),
        ([*one, "--format=parquet", "a.jpg"], "not one of table, jsonl"),
        ([*data, "--format=jsonl"], "not one of tfrecord, parquet"),
        ([*data, "--demo"], "is for images"),
        ([*data], "needs --output"),
        ([*data, "--output=x", "a.jpg"], "need --runner. .*'a.jpg'"),
    ):
        with pytest.raises(app.UsageError, match=message):
            _run(tool, capsys, *arguments)
    with pytest.raises(SystemExit, match="--top_k=0: "):
        _run(
            tool,
            capsys,
            *data,
            "--output=x",
            "--sampler=top_k",
            "--top_k=0",
        )
