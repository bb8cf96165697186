"""The listing alone determines the bytes; finished shards are reused."""

import pytest
import tensorflow as tf
from conftest import ROOT
from PIL import Image

from cappa_tf.data import schema
from cappa_tf.data.prepare import conversion
from cappa_tf.data.sources import image_rows

OPTIONS = image_rows.Options(split_fractions={"train": 1})


def make_rows(folder, count, bad=()):
    """A row and an image file for each number; `bad` are not images."""
    folder.mkdir(exist_ok=True)
    rows = []
    for i in range(count):
        path = folder / f"{i}.png"
        if i in bad:
            path.write_text("no image")
        elif not path.exists():
            Image.new("RGB", (8 + i, 9), (i, 0, 0)).save(path)
        rows.append(image_rows.Row(f"k{i}", str(path), [f"caption {i}"]))
    return rows


def plan(rows, output, num_shards=4, options=OPTIONS, skipped=None):
    skipped = skipped or image_rows.Skipped()
    return conversion.plan(rows, str(output), num_shards, options, skipped)


def convert_all(rows, output, num_shards=4, options=OPTIONS, workers=3):
    """Plans, converts and publishes; returns description and skips."""
    skipped = image_rows.Skipped()
    plans = plan(rows, output, num_shards, options, skipped)
    for one in plans:
        conversion.convert(one.path, workers)
    description, _ = conversion.finish(plans, str(output), "d", {}, skipped)
    return description, skipped


def keys(description, split="train"):
    """The keys of each shard, in order."""
    return [
        [e.key for e in tfrecord_examples(shard.path)]
        for shard in description.shards(split)
    ]


def tfrecord_examples(path):
    records = tf.data.TFRecordDataset(path).as_numpy_iterator()
    return [schema.deserialize(record) for record in records]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_go_round_robin_whatever_is_skipped(tmp_path):
    rows = make_rows(tmp_path / "in", 10, bad=(1, 4))
    description, skipped = convert_all(rows, tmp_path / "out")
    assert keys(description) == [
        ["k0", "k8"],
        ["k5", "k9"],
        ["k2", "k6"],
        ["k3", "k7"],
    ]
    reason = "image cannot be decoded"
    assert skipped.lines == [f"{reason}\tk1", f"{reason}\tk4"]
    description.verify(checksums=True)
    assert not list((tmp_path / "out").glob(".*"))


def test_a_shard_without_usable_picture_is_left_out(tmp_path):
    rows = make_rows(tmp_path / "in", 10, bad=(1, 5, 9))
    description, _ = convert_all(rows, tmp_path / "out")
    assert keys(description) == [["k0", "k4", "k8"], ["k2", "k6"], ["k3", "k7"]]
    assert description.shards("train")[2].path.endswith("-00002-of-00003")


def test_order_and_threads_do_not_matter(tmp_path):
    rows = make_rows(tmp_path / "in", 30, bad=(3, 7))
    convert_all(rows, tmp_path / "one", workers=1)
    skipped = image_rows.Skipped()
    plans = plan(rows, tmp_path / "two", skipped=skipped)
    for one in reversed(plans):
        conversion.convert(one.path, workers=5)
    conversion.finish(plans, str(tmp_path / "two"), "d", {}, skipped)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert [line[-2:] for line in skipped.lines] == ["k3", "k7"]


def test_a_bucket_is_written_like_a_folder(tmp_path):
    rows = make_rows(tmp_path / "in", 9, bad=(3,))
    convert_all(rows, tmp_path / "out")
    # A file system of TensorFlow's that Python's own functions cannot write.
    description, _ = convert_all(rows, "ram://bucket/out")
    files = tf.io.gfile.listdir(description.directory)
    assert contents(tmp_path / "out") == {
        file: tf.io.gfile.GFile(f"ram://bucket/out/{file}", "rb").read()
        for file in files
    }


def test_repeated_and_unreadable_names_are_skipped(tmp_path):
    rows = make_rows(tmp_path / "in", 3)
    rows.append(image_rows.Row("k1", rows[2].path, ["again"]))
    rows.append(image_rows.Row("\udcff", rows[2].path, ["no name"]))
    description, skipped = convert_all(rows, tmp_path / "out", 1)
    assert keys(description) == [["k0", "k1", "k2"]]
    assert skipped.counts == {
        "repeated key": 1,
        "name is not valid Unicode": 1,
    }


def test_what_holds_is_taken_over_and_what_changed_is_not(tmp_path):
    rows = make_rows(tmp_path / "in", 8)
    output = tmp_path / "out"

    def reused():
        results = [conversion.convert(p.path) for p in plan(rows, output)]
        return [result.reused for result in results]

    assert reused() == [False] * 4
    assert reused() == [True] * 4
    # Another image, a damaged shard, another caption, a lost result.
    Image.new("RGB", (99, 9)).save(tmp_path / "in" / "4.png")
    folder = output / conversion.FOLDER
    (shard,) = folder.glob("train-00001-*.tfrecord")
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert reused() == [False, False, True, True]
    rows[6].captions.append("new")
    (result,) = folder.glob("train-00003-*.result")
    result.unlink()
    assert reused() == [True, True, False, False]
    found, taken = conversion.finish(
        plan(rows, output), str(output), "d", {}, image_rows.Skipped()
    )
    assert taken == 2
    convert_all(rows, tmp_path / "whole")
    assert contents(output) == contents(tmp_path / "whole")


def test_other_options_make_other_shards(tmp_path):
    rows = make_rows(tmp_path / "in", 4)
    (first,) = plan(rows, tmp_path / "out", 1)
    conversion.convert(first.path)
    options = image_rows.Options(split_fractions={"train": 1}, resize=8)
    (second,) = plan(rows, tmp_path / "out", 1, options)
    assert not conversion.convert(second.path).reused


def test_halves_of_a_killed_conversion_are_removed(tmp_path):
    rows = make_rows(tmp_path / "in", 4)
    folder = tmp_path / "out" / conversion.FOLDER
    folder.mkdir(parents=True)
    (folder / "train-00000-0.tfrecord.incomplete-0123").write_text("half")
    (folder / "train-00007-0.tfrecord").write_text("of other options")
    plans = plan(rows, tmp_path / "out", 1)
    assert [str(path) for path in folder.iterdir()] == [plans[0].path]
    conversion.convert(plans[0].path)
    assert len(list(folder.iterdir())) == 3


def test_nothing_is_published_before_all_shards_are_made(tmp_path):
    rows = make_rows(tmp_path / "in", 4)
    output = tmp_path / "out"
    plans = plan(rows, output)
    arguments = (str(output), "d", {}, image_rows.Skipped())
    for one in plans[:3]:
        conversion.convert(one.path)
    with pytest.raises(ValueError, match="1 of 4 .*train-00003-.*plan"):
        conversion.finish(plans, *arguments)
    assert [path.name for path in output.iterdir()] == [conversion.FOLDER]


def test_errors_come_before_any_picture_is_read(tmp_path):
    rows = make_rows(tmp_path / "in", 2)
    rows[1].split = "a/b"
    with pytest.raises(ValueError, match="split='a/b'"):
        plan(rows, tmp_path / "out", options=image_rows.Options())
    bad = make_rows(tmp_path / "bad", 2, bad=(0, 1))
    with pytest.raises(ValueError, match="No usable example.* 2 x image"):
        convert_all(bad, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.fixture
def beam_conversion():
    """The module, if Beam is installed."""
    pytest.importorskip("apache_beam", reason="pip install '.[beam]'")
    from cappa_tf.data.prepare import beam

    return beam


@pytest.mark.parametrize(
    "mode",
    [
        "multi_threading",
        pytest.param("multi_processing", marks=pytest.mark.slow),
    ],
)
def test_two_workers_of_beam_make_and_count_the_same(
    beam_conversion, tmp_path, mode, monkeypatch
):
    # Worker processes import the package from the same path as this one.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    rows = make_rows(tmp_path / "in", 30, bad=(3, 7))
    rows[5].captions = []
    rows[6].path = str(tmp_path / "gone.png")
    _, expected = convert_all(rows, tmp_path / "one")
    skipped = image_rows.Skipped()
    output = tmp_path / "two"
    plans = plan(rows, output, skipped=skipped)
    counters = beam_conversion.convert(
        plans,
        "DirectRunner",
        ["--direct_num_workers=2", f"--direct_running_mode={mode}"],
        workers=2,
    )
    conversion.finish(plans, str(output), "d", {}, skipped)
    assert contents(tmp_path / "one") == contents(output)
    assert skipped.lines == expected.lines
    assert counters == {"usable": 26, **expected.counts}


def test_a_misspelled_option_of_beam_is_refused(beam_conversion, tmp_path):
    plans = plan(make_rows(tmp_path / "in", 1), tmp_path / "out")
    with pytest.raises(ValueError, match="--direct_num_worker$"):
        beam_conversion.convert(
            plans, "DirectRunner", ["--direct_num_worker=2"]
        )
