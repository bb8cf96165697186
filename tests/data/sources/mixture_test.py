"""Mixtures: exact shares, and each source in its own order."""

import os

import numpy as np
import pytest
import tensorflow as tf

from cappa_tf.data import description
from cappa_tf.data.sources import base, mixture
from cappa_tf.data.stream import shuffling

COUNTS = {"a": (4, 3, 4), "b": (6, 7), "c": (3, 2)}
SHARES = mixture.shares([5, 3, 2])


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Three sources; a record tells its source and its number."""
    folder = tmp_path_factory.mktemp("members")
    result = []
    for name, counts in COUNTS.items():
        shards, number = [], 0
        for i, count in enumerate(counts):
            path = str(folder / f"{name}{i}")
            with tf.io.TFRecordWriter(path) as writer:
                for _ in range(count):
                    writer.write(f"{name}{number}".encode())
                    number += 1
            size = os.path.getsize(path)
            shards.append(description.Shard(path, count, size, ""))
        result.append(base.TFRecordFiles(name, shards))
    return result


def reading(**options):
    options = {"seed": 3, "shuffle_buffer": 4, "num_readers": 4, **options}
    return base.Reading(**options)


def take(stream, count):
    """(positions, records) of the first elements, without the tag."""
    pairs = list(stream.take(count).as_numpy_iterator())
    for _, record in pairs:
        assert "abc"[record[0]] == record[1:2].decode()
    return [int(p) for p, _ in pairs], [r[1:].decode() for _, r in pairs]


@pytest.mark.parametrize("cache", ["stream", "records"])
def test_each_source_gives_what_it_would_give_alone(members, cache):
    options = reading(cache=cache)
    mixed = mixture.MixedRecords(members, SHARES, 1)
    positions, found = take(mixed.stream(options, 0), 80)
    assert positions == list(range(80))
    for member in members:
        own = [r for r in found if r.startswith(member.name)]
        alone = member.stream(options, 0).take(len(own)).as_numpy_iterator()
        assert own == [record.decode() for _, record in alone]
        # So its epochs are whole.
        first = own[: member.num_examples]
        assert len(set(first)) == min(len(own), member.num_examples)
    # Any start goes on where it would be.
    positions, later = take(mixed.stream(options, 41), 20)
    assert positions == list(range(41, 61))
    assert later == found[41:61]


@pytest.mark.parametrize(
    ("cache", "run_length", "own"),
    [("stream", 1, False), ("stream", 4, True), ("records", 4, True)],
)
def test_hosts_share_it(members, cache, run_length, own, monkeypatch):
    mixed = mixture.MixedRecords(members, SHARES, run_length)
    options = {"cache": cache}
    _, whole = take(mixed.stream(reading(**options), 0), 60)
    for begin in range(0, 60, run_length):  # Runs come from one source.
        assert len({r[0] for r in whole[begin : begin + run_length]}) == 1
    dropped = []
    real = shuffling.of_host
    monkeypatch.setattr(
        shuffling,
        "of_host",
        lambda stream, *hosts: dropped.append(stream) or real(stream, *hosts),
    )
    for host in (0, 1):
        stream = mixed.stream(reading(**options, host=host, num_hosts=2), 5)
        positions, found = take(stream, 25)
        assert positions == [p for p in range(5, 55) if p % 2 == host]
        assert found == [whole[p] for p in positions]
    # Records of other hosts are not read and dropped, only their turns.
    specs = {len(stream.element_spec[1].shape) for stream in dropped}
    kinds = {stream.element_spec[1].dtype for stream in dropped}
    assert specs == {0}
    assert kinds == ({tf.int64} if own else {tf.string})


def test_shares_are_exact_by_largest_remainder():
    assert mixture.shares([1, 1]).tolist() == [5000, 5000]
    assert mixture.shares([0.75, 0.25]).tolist() == [7500, 2500]
    assert mixture.shares([1, 1, 1]).tolist() == [3334, 3333, 3333]
    assert mixture.shares([9999, 1]).tolist() == [9999, 1]


@pytest.mark.parametrize("run_length", [1, 3])
def test_what_was_given_before_a_position_is_counted(run_length):
    turns = mixture.Turns(SHARES, 0, run_length)
    count = mixture.BLOCK * run_length + 50
    choices = turns.choices(0).take(count).batch(1000).as_numpy_iterator()
    chosen = np.concatenate([sources for _, sources in choices])
    for position in (0, 1, 17, count - 51, count - 50, count - 3):
        expected = np.bincount(chosen[:position], minlength=3)
        np.testing.assert_array_equal(turns.given(position), expected)
    # Whole blocks hold exact shares, in another order each.
    block = mixture.BLOCK
    patterns = [turns.pattern(b).numpy() for b in (0, 1)]
    for pattern in patterns:
        np.testing.assert_array_equal(np.bincount(pattern), SHARES)
    assert (patterns[0] != patterns[1]).any()
    # Far out, without going there.
    far = turns.given(10**12)
    assert far.sum() == 10**12
    np.testing.assert_allclose(far / 10**12, SHARES / block, atol=1e-7)


def test_sources_may_call_their_splits_differently():
    class Source:
        def __init__(self, name):
            self.name = name

        def split(self, split):
            return base.Records(f"{self.name}:{split}", [])

    mixed = mixture.Mixture(
        [Source("a"), Source("b")], [1, 1], {"validation": ["val", "dev"]}
    )
    assert mixed.split("validation").name == "a:val + b:dev"
    assert mixed.split("train").name == "a:train + b:train"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], [1, 2]), "a number for each"),
        (([], []), "1 to 255 sources"),
        ((["a", "b"], [1, 0]), "positive numbers"),
        ((["a", "b"], [1, "x"]), "positive numbers"),
        ((["a", "b"], [1e6, 1]), "at least 1 / 10000"),
        ((["a", "b"], [1, 1], {"train": ["x"]}), "a name for each source"),
        ((["a", 3], [1, 1]), "Received: 3"),
        ((["a", "b"], [1, 1], None, 0), "run_length=0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        mixture.Mixture(*arguments)
