"""Where records come from: sources, their splits, and the shards of these.

A source says what images there are and how they are stored:

    prepared.PreparedData      what tools/prepare_data.py wrote
    image_folder.ImageFolder   images with captions or labels, as they are
    webdataset.WebDataset, img2dataset.TFRecords, tfds.TFDS
    mixture.Mixture     several of them, by weight

`source.split("train")` gives `Records`: shards with their record counts, a
function that reads a shard from any record on, and one that parses a record.
Counts are what everything rests on: with them a run resumes deep inside an
epoch by skipping whole shards, and every epoch holds each record once.

Dimensions:
    N: records of the split.
    S: shards.
"""

import dataclasses
import os

import tensorflow as tf

from cappa_tf.data import schema
from cappa_tf.data.stream import caching, corrupt_shards, shuffling

# Below this, records are kept in memory and epochs are full permutations. By
# the size of the data, not of the machine: the order must not depend on it.
RECORDS_IN_MEMORY_BYTES = 256 << 20
_READ_BUFFER_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the training stream is read; the order depends on all of it.

    Attributes:
        seed: Integer.
        shuffle: Whether records are shuffled.
        shuffle_buffer: Records held for shuffling of a set on disk.
        num_readers: Virtual readers of a set on disk.
        cache: "stream" or "records"; None decides by size.
        host: Whose positions to give.
        num_hosts: Hosts that share the stream.
    """

    seed: int
    shuffle: bool = True
    shuffle_buffer: int = 4096
    num_readers: int = 8
    cache: str | None = None
    host: int = 0
    num_hosts: int = 1


class Records:
    """The records of one split of a source.

    A subclass gives `read`, and `parse` where its records are not those of
    `schema.py`.

    Args:
        name: What to call them in messages.
        shards: List of objects with `path`, `num_examples` and `num_bytes`.

    Attributes:
        min_side: An image with a shorter side below this is a bad record.
    """

    min_side = 1

    def __init__(self, name, shards):
        self.name = name
        self.shards = shards
        self._in_memory = self._max_captions = None

    def __iter__(self):
        """The shards."""
        return iter(self.shards)

    @property
    def parts(self):
        """The `Records` these consist of, in order."""
        return [self]

    @property
    def num_examples(self):
        """N."""
        return sum(shard.num_examples for shard in self.shards)

    @property
    def max_captions(self):
        """Captions of the record that has most of them.

        Where nothing on disk says it, the split is read once.
        """
        if self._max_captions is None:
            self._max_captions = max(
                (len(example.captions) for example in self.read_examples()),
                default=0,
            )
        return self._max_captions

    @property
    def identity(self):
        """What tells these records from all others: a JSON value.

        The same where the same data lie elsewhere, as far as their files have
        a checksum or the time at which they were last changed.
        """
        return [
            type(self).__name__,
            [_file_identity(shard) for shard in self.shards],
        ]

    def read(self, shard, skip, count):
        """Records of a shard in a tf.data graph.

        Args:
            shard: Number of the shard, scalar int64.
            skip: Records to leave out, scalar int64.
            count: Records to give, scalar int64.

        Returns:
            A tf.data.Dataset of exactly `count` serialized records; `LOST`
            and the path stands for one that cannot be read.
        """
        raise NotImplementedError

    def parse(self, serialized):
        """Parses one record in a graph: as `schema.parse`."""
        return schema.parse(serialized)

    def deserialize(self, serialized):
        """Parses one record in Python: as `schema.deserialize`."""
        return schema.deserialize(serialized)

    def check(self, counter):
        """Compares the files with what is recorded of them.

        Args:
            counter: `bad_records.SkipCounter` that takes what is known to be
                bad.

        Raises:
            ValueError: Too much is missing, or the data are others.
        """

    def check_captions(self):
        """Refuses records that are known to have no caption at all.

        Raises:
            ValueError: They have none.
        """
        if self._max_captions == 0:
            raise ValueError(
                f"{self.name}: no record has a caption. {self._where_to_look()}"
            )

    def _where_to_look(self):
        """Where captions would be, for the message that there are none."""
        return ""

    def read_examples(self, limit=None):
        """The records as `schema.Example`s, in order.

        Args:
            limit: Most examples to read; None for all.

        Yields:
            One for each record; a bad one has neither image nor captions.
        """
        records = shuffling.in_sequence(self)
        if limit is not None:
            records = records.take(limit)
        for _, serialized in records.prefetch(16).as_numpy_iterator():
            try:
                if serialized.startswith(shuffling.LOST):
                    raise ValueError("lost")
                yield self.deserialize(serialized)
            except ValueError:
                yield schema.Example(key="", image=b"", captions=[])

    def in_memory(self):
        """All records, string [N] on the host, read at first use."""
        if self._in_memory is None:
            self._in_memory = caching.load_records(self, self.name)
        return self._in_memory

    def numbers(self, reading, start_index):
        """The training stream as numbers of records.

        Args:
            reading: `Reading`.
            start_index: Position to start at.

        Returns:
            A tf.data.Dataset of (position, record number).
        """
        return shuffling.in_memory(
            self.num_examples,
            reading.seed,
            start_index,
            reading.shuffle,
            reading.host,
            reading.num_hosts,
        )

    def stream(self, reading, start_index):
        """The training stream as records; arguments as `numbers`.

        Returns:
            A tf.data.Dataset of (position, serialized record).
        """
        if self._are_in_memory(reading):
            stored = self.in_memory()
            return self.numbers(reading, start_index).map(
                lambda index, number: (index, tf.gather(stored, number))
            )
        return self._from_readers(self, reading, start_index)

    def order(self, reading, start_index):
        """The order of `stream` without reading any record.

        For what is kept of records elsewhere, such as their features.

        Args:
            reading: `Reading`.
            start_index: Position to start at.

        Returns:
            A tf.data.Dataset of (position, record number): that of the record
            in `shuffling.in_sequence`.
        """
        if self._are_in_memory(reading):
            return self.numbers(reading, start_index)
        return self._from_readers(_Numbers(self), reading, start_index)

    def _are_in_memory(self, reading):
        """Whether `stream` reads all records into memory."""
        if reading.cache is not None:
            return reading.cache == "records"
        num_bytes = sum(shard.num_bytes for shard in self.shards)
        return num_bytes <= RECORDS_IN_MEMORY_BYTES

    def _from_readers(self, records, reading, start_index):
        return shuffling.from_readers(
            records,
            reading.seed,
            start_index,
            reading.num_readers,
            reading.shuffle_buffer if reading.shuffle else 0,
            reading.host,
            reading.num_hosts,
        )


class _Numbers(Records):
    """In place of each record its number."""

    def __init__(self, records):
        super().__init__(records.name, records.shards)
        counts = [shard.num_examples for shard in records.shards]
        with tf.device("CPU:0"):
            self._begins = tf.cumsum(
                tf.constant(counts, tf.int64), exclusive=True
            )

    def read(self, shard, skip, count):
        """As `Records.read`, of numbers."""
        first = self._begins[shard] + skip
        return tf.data.Dataset.range(first, first + count)


def _file_identity(shard):
    """Name, size, and checksum (or else time of the last change) of a file."""
    version = getattr(shard, "sha256", "")
    if not version:
        try:
            version = tf.io.gfile.stat(shard.path).mtime_nsec
        except tf.errors.OpError:
            version = None  # It is missing.
    name = os.path.basename(shard.path)
    return [name, shard.num_examples, shard.num_bytes, version]


class TFRecordFiles(Records):
    """Records in TFRecord files.

    Args:
        name: What to call them in messages.
        shards: As `Records`.
        first: Number of each shard's first record, where others precede it.
    """

    def __init__(self, name, shards, first=None):
        super().__init__(name, shards)
        with tf.device("CPU:0"):
            self._paths = tf.constant([shard.path for shard in shards])
            self._first = tf.constant(first or [0] * len(shards), tf.int64)

    def read(self, shard, skip, count):
        """As `Records.read`."""
        return read_tfrecords(
            self._paths[shard], self._first[shard] + skip, count
        )


def read_tfrecords(path, skip, count):
    """Records of one file: always `count` of them, from `skip` on.

    A damaged record becomes `LOST`, and so does all that a file lacks. A
    missing file is replaced by an empty one,
    because with `ignore_errors` the reader would try to open it for ever.

    Args:
        path: Scalar string.
        skip: Scalar int64.
        count: Scalar int64.

    Returns:
        A tf.data.Dataset of serialized records.
    """
    readable = tf.where(exists(path), path, "/dev/null")
    records = tf.data.TFRecordDataset(
        readable, buffer_size=_READ_BUFFER_BYTES
    ).skip(skip)
    rest = corrupt_shards.records_from_damage_on(
        readable, skip, shuffling.LOST + path
    )
    lost = tf.data.Dataset.from_tensors(shuffling.LOST + path).repeat()
    # What follows `records` is opened only if they end too early.
    records = records.ignore_errors().concatenate(rest).concatenate(lost)
    return records.take(count)


def exists(path):
    """Whether there is such a file, in a graph: scalar bool."""
    # What a file pattern would read as wild cards is escaped.
    pattern = tf.strings.regex_replace(path, r"([\\*?\[\]])", r"\\\1")
    return tf.size(tf.io.matching_files(pattern)) > 0
