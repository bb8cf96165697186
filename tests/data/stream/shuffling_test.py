"""Streams: epochs are permutations, and any start continues."""

import os
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from cappa_tf.data import description
from cappa_tf.data.sources import base
from cappa_tf.data.stream import shuffling, stateless_random

COUNTS = (5, 1, 4, 7, 2)
N = sum(COUNTS)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Five shards of different sizes; a record is its number as text."""
    directory = tmp_path_factory.mktemp("shards")
    number = 0
    result = []
    for i, count in enumerate(COUNTS):
        path = str(directory / f"shard [{i}]*")
        with tf.io.TFRecordWriter(path) as writer:
            for _ in range(count):
                writer.write(str(number).encode())
                number += 1
        size = os.path.getsize(path)
        result.append(description.Shard(path, count, size, ""))
    return base.TFRecordFiles("d", result)


def _take(dataset, count):
    """(positions, records) of the first elements."""
    pairs = list(dataset.take(count).as_numpy_iterator())
    return [int(p) for p, _ in pairs], [
        int(r) if not isinstance(r, bytes) or r.isdigit() else r
        for _, r in pairs
    ]


def _readers(num_readers, shuffle):
    return lambda shards, start, seed=0, **hosts: shuffling.from_readers(
        shards, seed, start, num_readers, shuffle, **hosts
    )


def _memory(shuffle):
    return lambda shards, start, seed=0, **hosts: shuffling.in_memory(
        N, seed, start, shuffle, **hosts
    )


STREAMS = {
    "memory": _memory(True),
    "memory, in order": _memory(False),
    "readers": _readers(4, 9),
    "readers, in order": _readers(4, 0),
    "one reader": _readers(1, 4),
    "more readers than records": _readers(24, 40),
}


_WHOLE = {}


def _whole(shards, stream):
    """Three epochs of a stream; building one takes seconds."""
    if stream not in _WHOLE:
        positions, found = _take(STREAMS[stream](shards, 0), 3 * N)
        assert positions == list(range(3 * N))
        _WHOLE[stream] = found
    return _WHOLE[stream]


STARTS = {
    "memory": [1, N, 2 * N - 2],
    "memory, in order": [N + 3],
    "readers": [5, N - 1, N + 9],
    "readers, in order": [13],
    "one reader": [6],
    "more readers than records": [17],
}


@pytest.mark.parametrize("stream", STREAMS)
def test_every_epoch_is_a_permutation(shards, stream):
    found = _whole(shards, stream)
    for epoch in range(3):
        part = found[epoch * N : (epoch + 1) * N]
        assert sorted(part) == list(range(N))


@pytest.mark.parametrize("stream", STREAMS)
def test_any_start_continues_the_stream_from_zero(shards, stream):
    make = STREAMS[stream]
    whole = _whole(shards, stream)
    for start in STARTS[stream]:
        positions, found = _take(make(shards, start), N)
        assert positions == list(range(start, start + N))
        assert found == whole[start : start + N], start


@pytest.mark.parametrize(
    ("stream", "num_hosts"), [("memory", 3), ("readers", 3), ("readers", 4)]
)
def test_hosts_share_a_stream_without_overlap_or_loss(
    shards, stream, num_hosts
):
    whole = _whole(shards, stream)
    start = 5
    for host in range(num_hosts):
        positions, found = _take(
            STREAMS[stream](shards, start, host=host, num_hosts=num_hosts), 12
        )
        expected = [p for p in range(start, 3 * N) if p % num_hosts == host]
        assert positions == expected[: len(positions)]
        assert found == [whole[p] for p in positions]


def test_a_host_opens_only_the_readers_of_its_positions(shards, monkeypatch):
    opened = []
    real = shuffling._range

    def spy(total, num_readers, reader):
        reader = tf.py_function(note, [reader], "int64")
        return real(total, num_readers, tf.ensure_shape(reader, []))

    def note(reader):
        opened.append(int(reader))
        return reader

    monkeypatch.setattr(shuffling, "_range", spy)
    stream = shuffling.from_readers(shards, 0, 0, 4, 9, host=1, num_hosts=2)
    _take(stream, N // 2)  # The first epoch: N is odd, and so they change.
    assert set(opened) == {1, 3}


@pytest.mark.parametrize("stream", ["memory", "readers"])
def test_seed_and_epoch_change_the_order(shards, stream):
    make = STREAMS[stream]
    first = _whole(shards, stream)
    _, again = _take(make(shards, 0), N)
    _, other = _take(make(shards, 0, seed=1), N)
    assert first[:N] == again
    assert first[:N] != first[N : 2 * N]
    assert first[:N] != other
    assert first[:N] != list(range(N))


def test_in_order_means_in_order(shards):
    _, found = _take(shuffling.in_sequence(shards), N + 1)
    assert found == list(range(N))
    _, found = _take(STREAMS["memory, in order"](shards, 0), N)
    assert found == list(range(N))


def test_readers_take_turns(shards):
    # 19 records in a line: ranges of 5, 5, 5 and 4.
    _, found = _take(STREAMS["readers, in order"](shards, 0), N)
    assert (
        found == [r for i in range(5) for r in (i, 5 + i, 10 + i, 15 + i)][:N]
    )


def test_going_on_opens_no_shard_before_the_position(shards):
    opened = []

    class Spy(base.TFRecordFiles):
        def read(self, shard, skip, count):
            shard = tf.py_function(note, [shard, skip, count], "int64")
            return super().read(tf.ensure_shape(shard, []), skip, count)

    def note(shard, skip, count):
        opened.append((int(shard), int(skip), int(count)))
        return shard

    spy = Spy("d", shards.shards)
    _take(shuffling.from_readers(spy, 0, 12, num_readers=1, shuffle=0), N - 12)
    assert opened == [(3, 2, 5), (4, 0, 2)]


def _damaged(shards, number, damage, tmp_path):
    """Shards of which one is replaced by a damaged copy."""
    path = tmp_path / "damaged"
    content = pathlib.Path(shards.shards[number].path).read_bytes()
    damage(path, content)
    damaged = list(shards)
    damaged[number] = description.Shard(
        str(path), damaged[number].num_examples, 0, ""
    )
    return base.TFRecordFiles("d", damaged)


def _cut(path, content):
    path.write_bytes(content[: len(content) * 5 // 7 - 3])


def _flip_a_byte(path, content):
    middle = len(content) // 2
    content = content[:middle] + b"\xff" + content[middle + 1 :]
    path.write_bytes(content)


def _vanish(path, content):
    pass


@pytest.mark.parametrize("damage", [_cut, _flip_a_byte, _vanish])
def test_damage_shifts_no_other_record(shards, damage, tmp_path):
    damaged = _damaged(shards, 3, damage, tmp_path)
    whole = _whole(shards, "readers")[: 2 * N]
    positions, found = _take(STREAMS["readers"](damaged, 0), 2 * N)
    assert positions == list(range(2 * N))
    lost = [w for w, r in zip(whole, found) if w != r]
    # A wrong checksum costs its record, truncation all records after it.
    expected = {
        _cut: range(14, 17),
        _flip_a_byte: range(13, 14),
        _vanish: range(10, 17),
    }[damage]
    assert sorted(lost) == sorted([*expected] * 2)
    name = shuffling.LOST + str(tmp_path / "damaged").encode()
    assert {r for w, r in zip(whole, found) if w != r} == {name}


def test_draws_depend_on_seed_purpose_index_and_slot_only():
    index = tf.constant([3, 7, 10**12], tf.int64)
    one = stateless_random.uniform(5, stateless_random.CROP, index, 4).numpy()
    assert one.shape == (3, 4)
    assert len(np.unique(one)) == 12
    # In another batch, alone, and with more slots: the same numbers.
    np.testing.assert_array_equal(
        stateless_random.uniform(
            5, stateless_random.CROP, index[::-1], 6
        ).numpy()[::-1, :4],
        one,
    )
    np.testing.assert_array_equal(
        stateless_random.uniform(5, stateless_random.CROP, 7, 4).numpy(), one[1]
    )
    assert not np.any(
        stateless_random.uniform(6, stateless_random.CROP, index, 4).numpy()
        == one
    )
    assert not np.any(
        stateless_random.uniform(5, stateless_random.FLIP, index, 4).numpy()
        == one
    )


def test_draws_are_uniform_and_uncorrelated():
    u = stateless_random.uniform(
        0, stateless_random.FLIP, tf.range(20000, dtype=tf.int64), 2
    )
    u = u.numpy()
    histogram = np.histogram(u, bins=10, range=(0, 1))[0] / u.size
    np.testing.assert_allclose(histogram, 0.1, atol=0.006)
    assert abs(np.corrcoef(u.T)[0, 1]) < 0.02
    assert abs(np.corrcoef(u[1:, 0], u[:-1, 0])[0, 1]) < 0.02
