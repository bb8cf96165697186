"""tools/prepare_data.py: a complete data set, or nothing and a reason."""

import json
import os
import signal
import subprocess
import sys

import pytest
from absl import flags
from conftest import ROOT, shared_data
from PIL import Image
from tool_flags import defined

from cappa_tf.data import schema
from cappa_tf.data.prepare import conversion
from cappa_tf.data.sources import image_rows
from cappa_tf.utils import files
from tools import prepare_data

TOOL = ROOT / "tools" / "prepare_data.py"
# Runs the tool with arguments 2, ... and kills itself at rename number
# argument 1. Every step that others can see is a rename.
KILL_AT_RENAME = """
import os, runpy, signal, sys
from cappa_tf.utils import files
left, rename = int(sys.argv.pop(1)), files.rename
def counted(*arguments, **keywords):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*arguments, **keywords)
files.rename = counted
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def tool():
    with defined(prepare_data) as tool:
        yield tool


@pytest.fixture
def run(tool):
    def run(*arguments):
        flags.FLAGS.unparse_flags()
        rest = flags.FLAGS(["prepare_data.py", *map(str, arguments)])
        return tool.main(rest)

    yield run
    for name in ("captions", "name", "split_fractions", "resize", "runner"):
        flags.FLAGS[name].value = None
    flags.FLAGS.overwrite = False


@pytest.fixture
def photos(tmp_path):
    """Twelve images in three splits, and two bad ones."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = []
    for i in range(12):
        Image.new("RGB", (40, 30), (i, i, i)).save(folder / f"{i}.jpg")
        split = ("train", "dev", "test")[max(0, i - 9)]
        rows.append({"image": f"{i}.jpg", "caption": f"c {i}", "split": split})
    (folder / "bad.jpg").write_text("no image")
    rows.append({"image": "bad.jpg", "caption": "c", "split": "train"})
    rows.append({"image": "1.jpg", "key": "silent", "split": "train"})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "captions.jsonl").write_text(lines)
    return folder


def test_counts_splits_and_names_what_was_skipped(
    run, photos, tmp_path, capsys
):
    output = tmp_path / "out"
    run(f"--input={photos}", f"--output={output}", "--num_shards=4")
    description = schema.DatasetDescription.load(output)
    description.verify(checksums=True)
    assert description.name == "out"
    sizes = {s: description.num_examples(s) for s in description.splits}
    assert sizes == {"train": 10, "dev": 1, "test": 1}
    assert len(description.shards("train")) == 4
    printed = capsys.readouterr().out
    assert "train                           10        10       4" in printed
    assert "skipped: image cannot be decoded" in printed
    log = (output / "prepare_data.log").read_text().splitlines()
    assert log == ["image cannot be decoded\tbad.jpg", "no caption\tsilent"]
    # The same command over its own output gives the same bytes.
    before = {p.name: p.read_bytes() for p in output.iterdir()}
    run(f"--input={photos}", f"--output={output}", "--num_shards=4")
    assert before == {p.name: p.read_bytes() for p in output.iterdir()}


def test_fractions_and_resize(run, photos, tmp_path):
    output = tmp_path / "out"
    run(
        f"--input={photos / 'captions.jsonl'}",
        f"--output={output}",
        "--name=small",
        "--split_fractions=whole=1",
        "--resize=10",
    )
    description = schema.DatasetDescription.load(output)
    assert description.splits == ["whole"]
    assert description.shards("whole")[0].path.endswith(
        "small-whole.tfrecord-00000-of-00008"
    )
    size = description.shards("whole")[0].num_bytes
    original = (photos / "1.jpg").stat().st_size
    assert size < 2 * original + 200


def _contents(folder):
    """Dict name -> bytes of the visible files in a folder."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if not path.name.startswith(".")
    }


def _is_as_uninterrupted(run, photos, output, *more):
    """Converts again, and elsewhere without interruption: no difference."""
    run(f"--input={photos}", f"--output={output}", *more)
    assert not list(output.glob(".*"))
    whole = output.with_name("whole")
    run(f"--input={photos}", f"--output={whole}", "--name=out", *more)
    assert _contents(output) == _contents(whole)


def test_interrupted_in_a_shard_goes_on_with_the_next(
    run, photos, tmp_path, monkeypatch, capsys
):
    real = image_rows.read_example

    def interrupted(row, *arguments):
        if row.key == "5.jpg":
            raise KeyboardInterrupt
        return real(row, *arguments)

    output = tmp_path / "out"
    monkeypatch.setattr(image_rows, "read_example", interrupted)
    with pytest.raises(SystemExit, match="interrupted; run it again"):
        run(f"--input={photos}", f"--output={output}")
    assert not _contents(output)
    monkeypatch.setattr(image_rows, "read_example", real)
    _is_as_uninterrupted(run, photos, output)
    assert "5 shards reused" in capsys.readouterr().out


# With one shard a split: 3 plans, 3 x shard and result, 3 shards get their
# names, 2 files for TFDS, the description.
@pytest.mark.parametrize("step", range(1, 16))
def test_interrupted_before_any_step(run, photos, tmp_path, monkeypatch, step):
    output = tmp_path / "out"
    if step % 2:  # Over an older version, too.
        run(f"--input={photos}", f"--output={output}", "--resize=10")
        flags.FLAGS["resize"].value = None
    real, calls = files.rename, []

    def counted(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == step:
            raise KeyboardInterrupt
        real(*arguments, **keywords)

    monkeypatch.setattr(files, "rename", counted)
    with pytest.raises(SystemExit, match="interrupted; run it again"):
        run(f"--input={photos}", f"--output={output}", "--num_shards=1")
    monkeypatch.setattr(files, "rename", real)
    if step % 2 and step < 10:  # The older version is still complete.
        schema.DatasetDescription.load(output).verify(checksums=True)
    else:
        with pytest.raises(ValueError, match="interrupted"):
            schema.DatasetDescription.load(output)
    _is_as_uninterrupted(run, photos, output, "--num_shards=1")


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(5, marks=pytest.mark.slow),
        11,
        pytest.param(15, marks=pytest.mark.slow),
    ],
)
def test_killed_between_two_steps(run, photos, tmp_path, step):
    output = tmp_path / "out"
    arguments = [f"--input={photos}", f"--output={output}", "--num_shards=1"]
    program = [sys.executable, "-c", KILL_AT_RENAME, str(step), str(TOOL)]
    killed = subprocess.run([*program, *arguments], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(ValueError, match="interrupted"):
        schema.DatasetDescription.load(output)
    _is_as_uninterrupted(run, photos, output, "--num_shards=1")


@pytest.mark.parametrize(
    "runner", [None, pytest.param("DirectRunner", marks=pytest.mark.slow)]
)
def test_killed_in_the_middle_of_a_shard(run, photos, tmp_path, runner):
    more = ["--num_shards=1", "--workers=1"]
    if runner:
        pytest.importorskip("apache_beam", reason="pip install '.[beam]'")
        more.append(f"--runner={runner}")
    output = tmp_path / "out"
    # A pipe in place of an image: the reader waits until it is written.
    content = (photos / "7.jpg").read_bytes()
    (photos / "7.jpg").unlink()
    os.mkfifo(photos / "7.jpg")
    process = subprocess.Popen(
        [
            sys.executable,
            str(TOOL),
            f"--input={photos}",
            f"--output={output}",
            *more,
        ],
        stderr=subprocess.DEVNULL,
    )
    with open(photos / "7.jpg", "wb"):  # Opens when the other side does.
        process.kill()
        process.wait()
    assert not _contents(output)
    halves = output.glob(f"{conversion.FOLDER}/{files.UNFINISHED}*")
    assert [half.suffix for half in halves] == [".tfrecord"]
    (photos / "7.jpg").unlink()
    (photos / "7.jpg").write_bytes(content)
    _is_as_uninterrupted(run, photos, output, *more[:2])


def test_beam_gives_the_same_data_set_and_report(run, photos, tmp_path, capsys):
    pytest.importorskip("apache_beam", reason="pip install '.[beam]'")
    run(f"--input={photos}", f"--output={tmp_path / 'here'}", "--name=d")
    here = capsys.readouterr().out
    beam = ["--runner=DirectRunner", "--", "--direct_num_workers=2"]
    beam.append("--direct_running_mode=multi_threading")
    output = tmp_path / "beam"
    run(f"--input={photos}", f"--output={output}", "--name=d", *beam)
    assert _contents(tmp_path / "here") == _contents(output)
    assert capsys.readouterr().out == here.replace(
        str(tmp_path / "here"), str(output)
    )


def test_refusals_name_the_cause(run, photos, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    output = tmp_path / "out"
    with pytest.raises(SystemExit, match=r"empty holds no images"):
        run(f"--input={empty}", f"--output={output}")
    with pytest.raises(SystemExit, match="--split_fractions=train"):
        run(
            f"--input={photos}", f"--output={output}", "--split_fractions=train"
        )
    assert not output.exists()
    flags.FLAGS["split_fractions"].value = None
    run(f"--input={photos}", f"--output={output}")
    (empty / "a.jpg").write_bytes((photos / "1.jpg").read_bytes())
    (empty / "a.txt").write_text("a caption")
    with pytest.raises(SystemExit, match="already holds the data set 'out'"):
        run(f"--input={empty}", f"--output={output}")
    run(f"--input={empty}", f"--output={output}", "--overwrite")
    assert len(schema.DatasetDescription.load(output).splits) == 1
    with pytest.raises(SystemExit, match="which holds"):
        run(f"--input={empty}", f"--output={photos}", "--overwrite")


def test_real_photos(run, tmp_path):
    source = shared_data("coco_mini")
    run(f"--input={source}", f"--output={tmp_path / 'coco'}")
    description = schema.DatasetDescription.load(tmp_path / "coco")
    lines = (source / "captions.jsonl").read_text().splitlines()
    assert sum(map(description.num_examples, description.splits)) == len(lines)
    assert not (tmp_path / "coco/prepare_data.log").read_text()


def test_questions_become_prompts_and_are_counted(run, tmp_path, capsys):
    folder = tmp_path / "vqa"
    folder.mkdir()
    rows = [
        {"image": "0.jpg", "qa": [["q", "a"], ["r", "b"]], "split": "train"},
        {"image": "1.jpg", "question": "q", "answers": ["a", "b", "c"]},
        {"image": "1.jpg", "question": "r", "split": "test"},
        {"image": "2.jpg", "question": "q", "answer": "a", "split": "test"},
    ]
    for i in range(2):
        Image.new("RGB", (9, 9)).save(folder / f"{i}.jpg")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "vqa.jsonl").write_text(lines)
    run(f"--input={folder}", f"--output={tmp_path / 'out'}", "--num_shards=1")
    description = schema.DatasetDescription.load(tmp_path / "out")
    assert description.num_prompts("train") == 2
    assert description.num_prompts("test") == 3
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[3] == "answers" and printed[1].split()[3] == "2"
    log = (tmp_path / "out" / prepare_data.LOG_NAME).read_text()
    assert log.splitlines() == [
        "no answer\tvqa.jsonl:3: r",
        "image missing\t2.jpg",
    ]
