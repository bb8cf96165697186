"""Promises of the streams: epochs are permutations, any start continues."""

import os
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from cappa_tf.data import draws, order, tfrecord

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
        result.append(tfrecord.description_lib.Shard(path, count, size, ""))
    return result


def _take(dataset, count):
    """(positions, records) of the first elements."""
    pairs = list(dataset.take(count).as_numpy_iterator())
    return [int(p) for p, _ in pairs], [
        int(r) if not isinstance(r, bytes) or r.isdigit() else r
        for _, r in pairs
    ]


STREAMS = {
    "memory": lambda shards, start, seed=0: order.in_memory(N, seed, start),
    "memory, in order": lambda shards, start, seed=0: order.in_memory(
        N, seed, start, shuffle=False
    ),
    "readers": lambda shards, start, seed=0: order.from_readers(
        shards, seed, start, num_readers=3, shuffle=9
    ),
    "readers, in order": lambda shards, start, seed=0: order.from_readers(
        shards, seed, start, num_readers=3, shuffle=0
    ),
    "one reader": lambda shards, start, seed=0: order.from_readers(
        shards, seed, start, num_readers=1, shuffle=4
    ),
    "more readers than shards": lambda shards, start, seed=0: (
        order.from_readers(shards, seed, start, num_readers=8, shuffle=20)
    ),
}


_WHOLE = {}


def _whole(shards, stream):
    """Three epochs of a stream; building one takes seconds."""
    if stream not in _WHOLE:
        positions, records = _take(STREAMS[stream](shards, 0), 3 * N)
        assert positions == list(range(3 * N))
        _WHOLE[stream] = records
    return _WHOLE[stream]


STARTS = {
    "memory": [1, N, 2 * N - 2],
    "memory, in order": [N + 3],
    "readers": [5, 15, N - 1, N + 9],
    "readers, in order": [13],
    "one reader": [6],
    "more readers than shards": [17],
}


@pytest.mark.parametrize("stream", STREAMS)
def test_every_epoch_is_a_permutation(shards, stream):
    records = _whole(shards, stream)
    for epoch in range(3):
        part = records[epoch * N : (epoch + 1) * N]
        assert sorted(part) == list(range(N))


@pytest.mark.parametrize("stream", STREAMS)
def test_any_start_continues_the_stream_from_zero(shards, stream):
    make = STREAMS[stream]
    whole = _whole(shards, stream)
    for start in STARTS[stream]:
        positions, records = _take(make(shards, start), N)
        assert positions == list(range(start, start + N))
        assert records == whole[start : start + N], start


def test_readers_resume_where_dealing_one_by_one_leaves_them():
    counts = [7, 1, 0, 4, 4]
    dealt = [r for turn in range(7) for r in range(5) if counts[r] > turn]
    assert len(dealt) == sum(counts)
    resume = tf.function(order._resume_readers)
    for skip in range(sum(counts)):
        skips, turns = resume(
            tf.constant(counts, tf.int64), tf.constant(skip, tf.int64)
        )
        assert skips.numpy().tolist() == [
            dealt[:skip].count(r) for r in range(5)
        ]
        # The readers left, in the order of their next turns.
        expected = list(dict.fromkeys(dealt[skip:]))
        assert turns.numpy().tolist() == expected


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
    _, records = _take(order.in_sequence(shards), N + 1)
    assert records == list(range(N))
    _, records = _take(STREAMS["memory, in order"](shards, 0), N)
    assert records == list(range(N))


def test_readers_take_turns(shards):
    # Readers own shards (0, 3), (1, 4), (2): 12, 3 and 4 records.
    _, records = _take(STREAMS["readers, in order"](shards, 0), N)
    first = [0, 5, 6, 1, 17, 7, 2, 18, 8, 3, 9]
    assert records == first + [4, *range(10, 17)]


def _damaged(shards, number, damage, tmp_path):
    """Shards of which one is replaced by a damaged copy."""
    path = tmp_path / "damaged"
    content = pathlib.Path(shards[number].path).read_bytes()
    damage(path, content)
    shard = tfrecord.description_lib.Shard(
        str(path), shards[number].num_examples, 0, ""
    )
    return [*shards[:number], shard, *shards[number + 1 :]]


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
    positions, records = _take(STREAMS["readers"](damaged, 0), 2 * N)
    assert positions == list(range(2 * N))
    lost = [w for w, r in zip(whole, records) if w != r]
    first_lost = {_cut: 14, _flip_a_byte: 13, _vanish: 10}[damage]
    assert sorted(lost) == sorted([*range(first_lost, 17)] * 2)
    name = order.LOST + str(tmp_path / "damaged").encode()
    assert {r for w, r in zip(whole, records) if w != r} == {name}


def test_draws_depend_on_seed_purpose_index_and_slot_only():
    index = tf.constant([3, 7, 10**12], tf.int64)
    one = draws.uniform(5, draws.CROP, index, 4).numpy()
    assert one.shape == (3, 4)
    assert len(np.unique(one)) == 12
    # In another batch, alone, and with more slots: the same numbers.
    np.testing.assert_array_equal(
        draws.uniform(5, draws.CROP, index[::-1], 6).numpy()[::-1, :4], one
    )
    np.testing.assert_array_equal(
        draws.uniform(5, draws.CROP, 7, 4).numpy(), one[1]
    )
    assert not np.any(draws.uniform(6, draws.CROP, index, 4).numpy() == one)
    assert not np.any(draws.uniform(5, draws.FLIP, index, 4).numpy() == one)


def test_draws_are_uniform_and_uncorrelated():
    u = draws.uniform(0, draws.FLIP, tf.range(20000, dtype=tf.int64), 2)
    u = u.numpy()
    histogram = np.histogram(u, bins=10, range=(0, 1))[0] / u.size
    np.testing.assert_allclose(histogram, 0.1, atol=0.006)
    assert abs(np.corrcoef(u.T)[0, 1]) < 0.02
    assert abs(np.corrcoef(u[1:, 0], u[:-1, 0])[0, 1]) < 0.02
