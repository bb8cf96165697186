"""Which record comes when: shuffled streams that can start anywhere.

A stream is endless; position p belongs to epoch p // N, and each epoch holds
every record exactly once. The order is a function of the seed alone, so that
"go on at position p" needs no saved buffer. Two ways to do it:

- Records in memory: each epoch is a random permutation of all of them.
- Shards too large for that: R virtual readers. Each epoch the shards are
  shuffled and dealt to the readers; a reader goes through its shards in
  blocks of records and shuffles each block; the readers take turns. Going
  on deep inside an epoch skips whole shards by their recorded counts and
  reads at most the part of a shard before the position.

A record that cannot be read keeps its position: `LOST` and the name of its
shard stand there instead, so that one bad file shifts nothing else.

Dimensions:
    N: records of the split.
    R: virtual readers.
    S: shards.
"""

import tensorflow as tf

from cappa_tf.data import damage, draws

# No record begins like this: a tf.train.Example begins with byte 0x0a.
LOST = b"\0lost from "
_BLOCK_STRIDE = 1 << 32
_READ_BUFFER_BYTES = 1 << 20


def in_memory(num_records, seed, start_index=0, shuffle=True):
    """The endless stream of record numbers of a set held in memory.

    Args:
        num_records: N.
        seed: Integer.
        start_index: Position to start at.
        shuffle: Whether to draw a permutation each epoch.

    Returns:
        A tf.data.Dataset of (position, record number), scalar int64.
    """

    def epoch_numbers(epoch):
        if shuffle:
            numbers = draws.permutation(seed, draws.ORDER, epoch, num_records)
        else:
            numbers = tf.range(num_records, dtype=tf.int64)
        skip = tf.maximum(start_index - epoch * num_records, 0)
        positions = epoch * num_records + tf.range(
            skip, num_records, dtype=tf.int64
        )
        return tf.data.Dataset.from_tensor_slices((positions, numbers[skip:]))

    start_index = tf.constant(start_index, tf.int64)
    return _epochs(start_index // num_records).flat_map(epoch_numbers)


def in_sequence(shards):
    """One pass over all records in the order of the files.

    Args:
        shards: List of `description.Shard`.

    Returns:
        A tf.data.Dataset of (position, serialized record).
    """
    paths, counts = _tensors(shards)
    skips = tf.zeros_like(counts)
    records = tf.data.Dataset.from_tensor_slices((paths, counts, skips))
    return records.flat_map(_read_shard).enumerate()


def from_readers(shards, seed, start_index=0, num_readers=8, shuffle=4096):
    """The endless stream of records of a set that stays on disk.

    Args:
        shards: List of `description.Shard`.
        seed: Integer.
        start_index: Position to start at.
        num_readers: R; changing it changes the order.
        shuffle: Records held in memory for shuffling, over all readers; 0 to
            go through readers and shards in order.

    Returns:
        A tf.data.Dataset of (position, serialized record).
    """
    paths, counts = _tensors(shards)
    num_readers = min(num_readers, len(shards))
    block = -(-shuffle // num_readers)
    total = sum(shard.num_examples for shard in shards)

    def epoch_records(epoch):
        if shuffle:
            order = draws.permutation(seed, draws.ORDER, epoch, len(shards))
        else:
            order = tf.range(len(shards), dtype=tf.int64)
        dealt_counts = _deal(tf.gather(counts, order), num_readers, 0)
        dealt_paths = _deal(tf.gather(paths, order), num_readers, "")
        skip = tf.maximum(start_index - epoch * total, 0)
        skips, turns = _resume_readers(
            tf.reduce_sum(dealt_counts, axis=1), skip
        )

        def reader_records(reader):
            records = _reader_records(
                dealt_paths[reader],
                dealt_counts[reader],
                skips[reader],
                block,
                lambda b, n: draws.permutation(
                    seed,
                    draws.BLOCK,
                    (epoch * num_readers + reader) * _BLOCK_STRIDE + b,
                    n,
                ),
            )
            return records.prefetch(16)

        records = tf.data.Dataset.from_tensor_slices(turns).interleave(
            reader_records, cycle_length=num_readers, block_length=1
        )
        return records.enumerate(start=epoch * total + skip)

    start_index = tf.constant(start_index, tf.int64)
    return _epochs(start_index // total).flat_map(epoch_records)


def _epochs(first):
    """first, first + 1, ... without end, int64."""
    return tf.data.Dataset.counter(start=first, dtype=tf.int64)


def _tensors(shards):
    """Paths and record counts of shards as tensors [S]."""
    with tf.device("CPU:0"):
        paths = tf.constant([shard.path for shard in shards])
        counts = tf.constant([s.num_examples for s in shards], tf.int64)
    return paths, counts


def _deal(values, num_readers, empty):
    """Deals [S] out like cards: [R, ceil(S / R)], short hands filled up."""
    missing = -values.shape[0] % num_readers
    values = tf.pad(values, [[0, missing]], constant_values=empty)
    return tf.transpose(tf.reshape(values, [-1, num_readers]))


def _resume_readers(counts, skip):
    """Where each reader stands after `skip` records, dealt one by one.

    In every round each reader that has records left gives one. With the
    counts sorted, the number of readers left is constant between one count
    and the next, so the round that holds position `skip` is found directly.

    Args:
        counts: int64 [R], records of each reader.
        skip: Scalar int64, records already dealt in this epoch.

    Returns:
        Records each reader has given, int64 [R], and the readers in the order
        of their coming turns, int64 [readers with records left].
    """
    readers = tf.cast(tf.shape(counts)[0], tf.int64)
    ends = tf.sort(counts)  # rounds after which a reader is exhausted
    # Records dealt when the k-th shortest reader is exhausted.
    dealt = tf.reduce_sum(
        tf.minimum(ends[:, tf.newaxis], counts[tf.newaxis]), axis=1
    )
    k = tf.reduce_sum(tf.cast(dealt <= skip, tf.int64))
    before = tf.concat([[0], ends], 0)[k]
    dealt_before = tf.concat([[0], dealt], 0)[k]
    left = tf.maximum(readers - k, 1)
    rounds = before + (skip - dealt_before) // left
    rest = (skip - dealt_before) % left

    active = counts > rounds
    rank = tf.cumsum(tf.cast(active, tf.int64), exclusive=True)
    ahead = active & (rank < rest)
    skips = tf.minimum(counts, rounds) + tf.cast(ahead, tf.int64)
    numbers = tf.range(readers)
    turns = tf.concat(
        [
            tf.boolean_mask(numbers, active & ~ahead),
            tf.boolean_mask(numbers, ahead & (counts > skips)),
        ],
        axis=0,
    )
    return skips, turns


def _reader_records(paths, counts, skip, block, permutation):
    """What one reader gives in an epoch from its record `skip` on.

    Args:
        paths: string [s], its shards in order ("" for none).
        counts: int64 [s], their records.
        skip: Scalar int64.
        block: Records shuffled together, 0 for none.
        permutation: Function of (block number, records of the block).

    Returns:
        A tf.data.Dataset of serialized records.
    """
    first_block = skip // max(block, 1)
    start = first_block * block if block else skip
    begins = tf.cumsum(counts, exclusive=True)
    shard_skips = tf.clip_by_value(start - begins, 0, counts)
    unread = shard_skips < counts
    records = tf.data.Dataset.from_tensor_slices(
        tuple(tf.boolean_mask(x, unread) for x in (paths, counts, shard_skips))
    ).flat_map(_read_shard)
    if not block:
        return records

    def shuffled(number, serialized):
        order = permutation(number, tf.size(serialized))
        # The block the position lies in has given some of its records.
        given = tf.where(number == first_block, skip - start, 0)
        return tf.data.Dataset.from_tensor_slices(
            tf.gather(serialized, order[given:])
        )

    return records.batch(block).enumerate(start=first_block).flat_map(shuffled)


def _read_shard(path, count, skip):
    """Records of one shard from `skip` on: always count - skip of them.

    A damaged record becomes `LOST`, and so does all that a file lacks. A
    missing file is replaced by an empty one, because with `ignore_errors` the
    reader would try to open it for ever.
    """
    found = tf.size(tf.io.matching_files(_as_pattern(path))) > 0
    readable = tf.where(found, path, "/dev/null")
    records = tf.data.TFRecordDataset(
        readable, buffer_size=_READ_BUFFER_BYTES
    ).skip(skip)
    rest = damage.records_from_damage_on(readable, skip, LOST + path)
    lost = tf.data.Dataset.from_tensors(LOST + path).repeat()
    # What follows `records` is opened only if they end too early.
    records = records.ignore_errors().concatenate(rest).concatenate(lost)
    return records.take(count - skip)


def _as_pattern(path):
    """Escapes what a file pattern would read as wild cards."""
    return tf.strings.regex_replace(path, r"([\\*?\[\]])", r"\\\1")
