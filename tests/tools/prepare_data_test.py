"""Promises of tools/prepare_data.py: a data set, or nothing and a reason."""

import importlib.util
import json

import pytest
from absl import flags
from conftest import ROOT, shared_data
from PIL import Image

from cappa_tf.data import sources, tfrecord


@pytest.fixture(scope="module")
def tool():
    path = ROOT / "tools" / "prepare_data.py"
    spec = importlib.util.spec_from_file_location("prepare_data_tool", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = set(flags.FLAGS)
    module.define_flags()
    yield module
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


@pytest.fixture
def run(tool):
    def run(*arguments):
        flags.FLAGS.unparse_flags()
        rest = flags.FLAGS(["prepare_data.py", *map(str, arguments)])
        return tool.main(rest)

    yield run
    for name in ("captions", "name", "split_fractions", "resize"):
        flags.FLAGS[name].value = None
    flags.FLAGS.overwrite = False


@pytest.fixture
def photos(tmp_path):
    """Twelve pictures in three splits, two more that are no good."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = []
    for i in range(12):
        Image.new("RGB", (40, 30), (i, i, i)).save(folder / f"{i}.jpg")
        split = ("train", "dev", "test")[max(0, i - 9)]
        rows.append({"image": f"{i}.jpg", "caption": f"c {i}", "split": split})
    (folder / "bad.jpg").write_text("no picture")
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
    description = tfrecord.DatasetDescription.load(output)
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
    description = tfrecord.DatasetDescription.load(output)
    assert description.splits == ["whole"]
    assert description.shards("whole")[0].path.endswith(
        "small-whole.tfrecord-00000-of-00008"
    )
    size = description.shards("whole")[0].num_bytes
    original = (photos / "1.jpg").stat().st_size
    assert size < 2 * original + 200


def _contents(folder):
    """Name -> bytes of all that is seen in a folder."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if not path.name.startswith(".")
    }


def test_interrupted_run_leaves_nothing_and_can_be_repeated(
    run, photos, tmp_path, monkeypatch, capsys
):
    real = sources.read_example
    calls = []

    def interrupted(row, *arguments):
        calls.append(row)
        if row.key == "5.jpg":
            raise KeyboardInterrupt
        return real(row, *arguments)

    command = [f"--input={photos}", f"--output={tmp_path / 'out'}"]
    monkeypatch.setattr(sources, "read_example", interrupted)
    with pytest.raises(SystemExit, match="interrupted; run it again"):
        run(*command)
    assert not _contents(tmp_path / "out")
    monkeypatch.setattr(sources, "read_example", real)
    run(*command)
    assert "5 shards taken over" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "out").glob(".*")] == []
    run(f"--input={photos}", f"--output={tmp_path / 'whole'}", "--name=out")
    assert _contents(tmp_path / "out") == _contents(tmp_path / "whole")


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
    assert len(tfrecord.DatasetDescription.load(output).splits) == 1
    with pytest.raises(SystemExit, match="which holds"):
        run(f"--input={empty}", f"--output={photos}", "--overwrite")


def test_real_photos(run, tmp_path):
    source = shared_data("coco_mini")
    run(f"--input={source}", f"--output={tmp_path / 'coco'}")
    description = tfrecord.DatasetDescription.load(tmp_path / "coco")
    lines = (source / "captions.jsonl").read_text().splitlines()
    assert sum(map(description.num_examples, description.splits)) == len(lines)
    assert not (tmp_path / "coco/prepare_data.log").read_text()
