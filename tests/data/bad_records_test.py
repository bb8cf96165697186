"""Bad records are skipped, counted, named, and stop a run above a bound."""

import io
import logging as python_logging
import os

import numpy as np
import pytest
import tensorflow as tf
from absl import logging
from PIL import Image

from cappa_tf.data import caption_dataset, schema
from cappa_tf.data.sources import base
from cappa_tf.data.stream import bad_records, shuffling

COUNT = 40
BAD = {
    5: "image cannot be decoded",
    6: "image cannot be decoded",
    17: "more than 1000 pixels",
    18: "not a record of this schema",
    39: "image cannot be decoded",
}


def _png(value, side=4):
    file = io.BytesIO()
    Image.new("L", (side, side), value).save(file, "PNG")
    return file.getvalue()


def _record(i):
    """A record whose gray value is 6 times its number, or a bad one."""
    image = {
        5: b"not an image",
        6: _png(9, 30)[:40],
        17: _png(9, 40),
        39: b"\xff\xd8\xff",
    }.get(i, _png(6 * i))
    return schema.Example(f"k{i}", image, [f"caption {i}"], i)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """40 records in 2 shards, 5 of them bad in different ways."""
    real = schema.serialize
    monkeypatch.setattr(
        schema,
        "serialize",
        lambda e, *more: b"\xff\xff\xff" if e.key == "k18" else real(e, *more),
    )
    schema.write_dataset(
        {"train": [_record(i) for i in range(COUNT)]}, tmp_path, "d", 2
    )
    return tmp_path


def make(data, **options):
    """A `CaptionDataset` without captions that tolerates bad records."""
    options = {
        "image_size": 4,
        "batch_size": 8,
        "max_pixels": 1000,
        "max_skipped_fraction": 0.2,
        **options,
    }
    return caption_dataset.CaptionDataset(data, "train", None, **options)


def numbers(batch):
    """Which records a batch has, by their gray values."""
    return np.round((batch["image"][:, 0, 0, 0] + 1) * 127.5 / 6).astype(int)


def counts(records):
    """Counts of some bad records by reason."""
    reasons = [BAD[i] for i in records]
    return {reason: reasons.count(reason) for reason in reasons}


@pytest.mark.parametrize("cache", ["stream", "records", "images"])
def test_training_goes_on_around_bad_records(data, cache):
    dataset = make(data, cache=cache, max_skipped_fraction=1.0)
    batches = list(dataset.train().take(5).as_numpy_iterator())
    index = np.concatenate([batch["index"] for batch in batches])
    np.testing.assert_array_equal(index, np.arange(COUNT))
    seen = np.concatenate([numbers(batch) for batch in batches])
    # Every good record occurs; a bad one is replaced by one of its batch.
    assert set(seen) == set(range(COUNT)) - set(BAD)
    np.testing.assert_array_equal(
        seen, np.concatenate([batch["label"] for batch in batches])
    )
    # The stream is read ahead, so the second epoch may have begun.
    assert set(dataset.skipped) == set(BAD.values())
    assert sum(dataset.skipped.values()) >= len(BAD)


def test_evaluation_masks_counts_and_names_bad_records(data):
    lines = []
    handler = python_logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.get_absl_logger().addHandler(handler)
    try:
        _check_evaluation(make(data))
    finally:
        logging.get_absl_logger().removeHandler(handler)
    assert any("k5: image cannot be decoded" in line for line in lines)
    assert any("k17: more than 1000 pixels" in line for line in lines)


def _check_evaluation(dataset):
    for _ in range(2):  # However often it runs, each counts once.
        batches = list(dataset.evaluate().as_numpy_iterator())
        mask = np.concatenate([batch["_mask"] for batch in batches])
        # Round robin over two shards: even numbers first.
        order = [*range(0, COUNT, 2), *range(1, COUNT, 2)]
        assert [n for n, m in zip(order, mask) if not m] == [
            n for n in order if n in BAD
        ]
        assert dataset.skipped == counts(BAD)


def test_stops_above_the_bound(data):
    dataset = make(data, max_skipped_fraction=0.05, cache="images")
    with pytest.raises(
        (tf.errors.InvalidArgumentError, tf.errors.UnknownError),
        match="max_skipped_fraction=0.05",
    ):
        list(dataset.train().take(5))
    with pytest.raises(ValueError, match=r"train: \d+ records were skipped"):
        raise dataset.failure


class Lengths:
    """In place of a tokenizer: the length of a caption is its only token."""

    max_length = 1
    pad_id = 0

    def load(self):
        pass

    def __call__(self, captions):
        return tf.strings.length(captions)[..., tf.newaxis]


def test_records_without_caption_are_bad_where_captions_are_wanted(tmp_path):
    examples = [_record(i) for i in (0, 1, 2, 3)]
    examples[1].captions = []
    examples[2].captions = ["", "  "]
    examples[3].captions = ["", "real"]
    schema.write_dataset({"train": examples}, tmp_path, "d", 1)

    dataset = caption_dataset.CaptionDataset(
        tmp_path, "train", Lengths(), 4, max_skipped_fraction=0.5
    )
    batch = next(dataset.evaluate(4).as_numpy_iterator())
    assert batch["_mask"].tolist() == [1, 0, 0, 1]
    assert batch["labels"][:, 0, 0].tolist() == [9, 0, 0, 4]
    assert dataset.skipped == {"no caption": 2}


def test_data_without_any_caption_are_refused_at_once(tmp_path):
    examples = [_record(i) for i in (0, 1)]
    for example in examples:
        example.captions = []
    schema.write_dataset({"train": examples}, tmp_path, "d", 1)
    dataset = caption_dataset.CaptionDataset(
        tmp_path, "train", Lengths(), 4, max_skipped_fraction=1.0
    )
    with pytest.raises(ValueError, match="train: no record has a caption"):
        dataset.train(2)


def _shards(path):
    return schema.DatasetDescription.load(path).shards("train")


def test_truncated_shard(data):
    path = _shards(data)[1].path
    size = os.path.getsize(path)
    os.truncate(path, size * 3 // 4)
    with pytest.raises(ValueError, match=r"disagree.*00001-of-00002 has"):
        make(data, max_skipped_fraction=0.01).train()
    dataset = make(data, cache="stream", max_skipped_fraction=0.5)
    seen = [
        n
        for batch in dataset.evaluate().as_numpy_iterator()
        for n in numbers(batch)[batch["_mask"] == 1]
    ]
    assert len(seen) == len(set(seen)) >= 30
    assert set(range(0, COUNT, 2)) - set(BAD) <= set(seen)
    assert dataset.skipped["lost record"] >= 2
    assert len(list(dataset.read_examples())) == COUNT


def test_missing_shard(data):
    os.remove(_shards(data)[0].path)
    with pytest.raises(ValueError, match="00000-of-00002 is missing"):
        make(data).train()
    dataset = make(data, max_skipped_fraction=1.0)
    seen = [
        n
        for batch in dataset.train().take(5).as_numpy_iterator()
        for n in numbers(batch)
    ]
    assert {n % 2 for n in seen if n} == {1}
    assert dataset.skipped["lost record"] >= COUNT // 2


def test_shards_of_another_version(data):
    with open(_shards(data)[0].path, "ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match="disagree"):
        make(data, max_skipped_fraction=1.0).train()


def test_bound_is_of_an_epoch_first_and_then_of_what_was_seen():
    counter = bad_records.SkipCounter(0.01, 1000, "data")
    assert counter.allowed() == 10
    assert counter.allowed(seen=500) == 10
    assert counter.allowed(seen=5000) == 50
    assert bad_records.SkipCounter(0.001, 100, "data").allowed() == 1
    # Batches that report out of order are not held against each other.
    late = bad_records.SkipCounter(0.1, 10, "data")
    late.add("reason", "later", seen=100)
    late.add("reason", "sooner", seen=5)
    strict = bad_records.SkipCounter(0, 100, "data")
    with pytest.raises(ValueError, match="the-name"):
        strict.add("reason", "the-name")


@pytest.mark.parametrize(("num_hosts", "stops"), [(1, False), (4, True)])
def test_each_host_is_judged_by_what_it_read_itself(num_hosts, stops):
    positions = [68, 72, 76]
    batch = {
        "ok": tf.constant([False] * 3),
        "raw": tf.constant(["bad"] * 3),
        "index": tf.constant(positions, tf.int64),
    }
    counter = bad_records.SkipCounter(0.1, 10, "data")

    def report():
        counter.report(
            batch,
            lambda record: ("reason", "name"),
            "train",
            num_hosts=num_hosts,
        )

    if stops:  # 3 of the 20 that one of four hosts has read.
        with pytest.raises(
            tf.errors.OpError, match=r"3 records .*allows \(2\)"
        ):
            report()
    else:  # 3 of 77.
        report()
        assert counter.counts == {"reason": 3}


def _damage(path, number):
    """Flips a bit in the middle of record `number` of a TFRecord file."""
    with open(path, "rb") as file:
        content = bytearray(file.read())
    position = 0
    for _ in range(number):
        position += 16 + int.from_bytes(
            content[position : position + 8], "little"
        )
    length = int.from_bytes(content[position : position + 8], "little")
    content[position + 12 + length // 2] ^= 1
    with open(path, "wb") as file:
        file.write(content)


@pytest.mark.parametrize("cache", ["stream", "records"])
def test_a_flipped_bit_costs_one_record(data, cache):
    # Records 4 and 22 of the data are number 2 and 11 of shard 0.
    for number in (2, 11):
        _damage(_shards(data)[0].path, number)
    lost = {4, 22}
    if cache == "stream":
        # How far a stream is read ahead depends on the machine, so what is
        # counted to the record is an evaluation, which reads each once.
        evaluated = make(data)
        list(evaluated.evaluate())
        assert evaluated.skipped["lost record"] == len(lost)
    options = {
        "cache": cache,
        "num_readers": 2,
        "max_skipped_fraction": 1.0,
    }
    dataset = make(data, **options)
    whole = [
        (index, number)
        for batch in dataset.train().take(5).as_numpy_iterator()
        for index, number in zip(batch["index"], numbers(batch))
    ]
    assert {number for _, number in whole} == set(range(COUNT)) - set(
        BAD
    ) - lost
    assert dataset.skipped["lost record"] >= len(lost)
    # Going on behind the damage, the same records come.
    for batch in dataset.train(start_index=32).take(1).as_numpy_iterator():
        assert list(zip(batch["index"], numbers(batch))) == whole[32:]


def test_a_damaged_length_costs_the_rest_of_its_shard(data):
    path = _shards(data)[0].path
    with open(path, "r+b") as file:
        file.write(b"\xff" * 8)
    dataset = make(data, max_skipped_fraction=0.7)
    list(dataset.evaluate())
    assert dataset.skipped["lost record"] == COUNT // 2


@pytest.mark.parametrize("bound", [1.0, 0.3])
def test_a_shard_that_vanishes_during_the_run(data, bound):
    path = _shards(data)[0].path
    dataset = make(
        data, cache="stream", max_skipped_fraction=bound, num_readers=1
    )
    stream = iter(dataset.train())
    next(stream)
    os.remove(path)
    if bound == 1.0:
        # How far is read ahead depends on the machine: at most a few epochs.
        later = [numbers(next(stream)) for _ in range(40)][30:]
        assert {n % 2 for n in np.concatenate(later) if n} == {1}
        assert dataset.skipped["lost record"] >= COUNT // 2
        return
    with pytest.raises(tf.errors.OpError, match="max_skipped_fraction=0.3"):
        for _ in range(40):  # As above.
            next(stream)
    assert "'lost record': " in str(dataset.failure)


def test_a_shard_that_vanishes_before_it_is_opened(tmp_path, monkeypatch):
    """It was there when the reader looked; opening it fails each time."""
    monkeypatch.setattr(base, "exists", lambda path: tf.constant(True))
    path = str(tmp_path / "gone.tfrecord")
    records = base.read_tfrecords(
        tf.constant(path), tf.constant(1, tf.int64), 3
    )
    lost = shuffling.LOST + path.encode()
    assert list(records.as_numpy_iterator()) == [lost] * 3
