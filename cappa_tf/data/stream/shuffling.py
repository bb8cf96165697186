"""Reproducible shuffling: endless streams that can start at any position.

Position P of a stream belongs to epoch P // N, and each epoch holds every
record exactly once. The order is a function of the seed alone, so resuming at
position P needs no saved buffer. There are two methods:

- Records in memory: each epoch is a random permutation of all of them.
- Shards too large for that: R virtual readers. In each epoch the shards are
  shuffled and concatenated to a line of N records, which is split into R equal
  ranges (the first N % R have one more). A reader goes through its range in
  blocks of records and shuffles each block. The readers take turns, so that
  position p of the epoch is always number p // R of reader p % R. Resuming
  inside an epoch skips whole shards by their recorded counts, and reads at
  most the part of a shard before the position.

Several hosts share a stream: position P goes to host P % H. If H divides R, a
host opens only the readers of its own positions; otherwise it reads all records
and drops those of other hosts. The order does not depend on H.

A record that cannot be read keeps its position: it is replaced by `LOST` and
the name of its shard, so that a bad file does not shift other records.

Dimensions:
    N: records of the split.
    R: virtual readers.
    S: shards.
    H: hosts.
"""

import functools

import tensorflow as tf

from cappa_tf.data.stream import stateless_random

# No record begins like this: a tf.train.Example begins with byte 0x0a.
LOST = b"\0lost from "
_BLOCK_STRIDE = 1 << 32


@tf.autograph.experimental.do_not_convert
def in_memory(
    num_records, seed, start_index=0, shuffle=True, host=0, num_hosts=1
):
    """The endless stream of record numbers of a set held in memory.

    Args:
        num_records: N.
        seed: Integer.
        start_index: Position to start at, over all hosts.
        shuffle: Whether to permute the records in each epoch.
        host: Index of the host whose positions to return, in [0, H).
        num_hosts: H.

    Returns:
        A `tf.data.Dataset` of (position, record number), scalar int64.
    """

    def epoch_numbers(epoch):
        if shuffle:
            numbers = stateless_random.permutation(
                seed, stateless_random.ORDER, epoch, num_records
            )
        else:
            numbers = tf.range(num_records, dtype=tf.int64)
        begin = epoch * num_records
        first = tf.maximum(start_index, begin)
        first += (host - first) % num_hosts
        positions = tf.range(first, begin + num_records, num_hosts)
        return tf.data.Dataset.from_tensor_slices(
            (positions, tf.gather(numbers, positions - begin))
        )

    start_index = tf.constant(start_index, tf.int64)
    return _epochs(start_index // num_records).flat_map(epoch_numbers)


@tf.autograph.experimental.do_not_convert
def in_sequence(records, first=0, count=None):
    """Records in the order of the files, one pass.

    Args:
        records: A `base.Records`.
        first: Number of the first record; what lies before it is not read.
        count: How many; None for all that follow.

    Returns:
        A `tf.data.Dataset` of (position, serialized record).
    """
    last = records.num_examples if count is None else first + count
    begin, parts = 0, []
    for part in records.parts:
        parts.append(_part_in_sequence(part, first - begin, last - begin))
        begin += part.num_examples
    stream = functools.reduce(lambda a, b: a.concatenate(b), parts)
    return stream.enumerate(start=first)


def _part_in_sequence(part, first, last):
    """Records `first` up to `last` of those of one part, in order."""
    counts = _counts(part)
    begins = tf.cumsum(counts, exclusive=True)
    skips = tf.clip_by_value(first - begins, 0, counts)
    takes = tf.clip_by_value(last - begins, 0, counts) - skips
    numbers = tf.range(tf.size(counts, tf.int64), dtype=tf.int64)
    wanted = [tf.boolean_mask(x, takes > 0) for x in (numbers, skips, takes)]
    return tf.data.Dataset.from_tensor_slices(tuple(wanted)).flat_map(part.read)


@tf.autograph.experimental.do_not_convert
def from_readers(
    records,
    seed,
    start_index=0,
    num_readers=8,
    shuffle=4096,
    host=0,
    num_hosts=1,
):
    """The endless stream of records of a set that remains on disk.

    Args:
        records: A `base.Records` of one part.
        seed: Integer.
        start_index: Position to start at, over all hosts.
        num_readers: R; changing it changes the order.
        shuffle: Number of records held in memory for shuffling, over all
            readers; 0 to go through readers and shards in order.
        host: Index of the host whose positions to return, in [0, H).
        num_hosts: H, preferably a divisor of R.

    Returns:
        A `tf.data.Dataset` of (position, serialized record).
    """
    counts = _counts(records)
    total = records.num_examples
    block = -(-shuffle // num_readers)
    own = num_readers % num_hosts == 0
    stride = num_hosts if own else 1

    def epoch_records(epoch):
        if shuffle:
            order = stateless_random.permutation(
                seed, stateless_random.ORDER, epoch, len(counts)
            )
        else:
            order = tf.range(len(counts), dtype=tf.int64)
        line = (order, tf.gather(counts, order))
        begin = epoch * total
        first = tf.maximum(start_index, begin) - begin
        first += (host - begin - first) % stride
        # One turn of each reader, beginning with that of the first position.
        turns = tf.range(first, first + num_readers, stride) % num_readers

        def reader_records(reader):
            skip = tf.maximum(first - reader + num_readers - 1, 0)
            stream = _reader_records(
                records.read,
                line,
                _range(total, num_readers, reader),
                skip // num_readers,
                block,
                lambda b, n: stateless_random.permutation(
                    seed,
                    stateless_random.BLOCK,
                    (epoch * num_readers + reader) * _BLOCK_STRIDE + b,
                    n,
                ),
            )
            return stream.prefetch(16)

        stream = tf.data.Dataset.from_tensor_slices(turns).interleave(
            reader_records,
            cycle_length=num_readers // stride,
            block_length=1,
        )
        positions = tf.data.Dataset.range(begin + first, begin + total, stride)
        return tf.data.Dataset.zip(positions, stream)

    start_index = tf.constant(start_index, tf.int64)
    stream = _epochs(start_index // total).flat_map(epoch_records)
    return stream if own else of_host(stream, host, num_hosts)


def of_host(stream, host, num_hosts):
    """Drops the elements of other hosts from a stream of (position, ...)."""
    return stream.filter(
        lambda position, _: position % num_hosts == host % num_hosts
    )


def _epochs(first):
    """Counts first, first + 1, ... without end, int64."""
    return tf.data.Dataset.counter(start=first, dtype=tf.int64)


def _counts(records):
    """Record counts of the shards, int64 [S] on the host."""
    with tf.device("CPU:0"):
        return tf.constant(
            [shard.num_examples for shard in records.shards], tf.int64
        )


def _range(total, num_readers, reader):
    """Begin and end of a reader's range in the line of all records."""
    size, more = total // num_readers, total % num_readers
    begin = reader * size + tf.minimum(reader, more)
    return begin, begin + size + tf.cast(reader < more, tf.int64)


def _reader_records(read, line, bounds, skip, block, permutation):
    """The records of one reader in an epoch, from its record `skip` on.

    Args:
        read: Function of (shard, skip, count) that returns records of a shard.
        line: (int64 [S], int64 [S]), shards in the order of this epoch, and
            their record counts.
        bounds: Begin and end of the reader's range in the line.
        skip: Scalar int64.
        block: Number of records shuffled together, 0 for none.
        permutation: Function of (block number, number of records in it).

    Returns:
        A `tf.data.Dataset` of serialized records.
    """
    shards, counts = line
    begin, end = bounds
    first_block = skip // max(block, 1)
    start = first_block * block if block else skip
    begins = tf.cumsum(counts, exclusive=True)
    skips = tf.clip_by_value(begin + start - begins, 0, counts)
    takes = tf.clip_by_value(end - begins, 0, counts) - skips
    records = tf.data.Dataset.from_tensor_slices(
        tuple(tf.boolean_mask(x, takes > 0) for x in (shards, skips, takes))
    ).flat_map(read)
    if not block:
        return records

    def shuffled(number, serialized):
        order = permutation(number, tf.size(serialized))
        # The block of the start position has already returned some records.
        given = tf.where(number == first_block, skip - start, 0)
        return tf.data.Dataset.from_tensor_slices(
            tf.gather(serialized, order[given:])
        )

    return records.batch(block).enumerate(start=first_block).flat_map(shuffled)
