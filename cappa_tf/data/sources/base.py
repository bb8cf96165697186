"""Base classes of sources: their splits, and the shards of these.

A source provides images in some storage format:

    prepared.PreparedData      what tools/prepare_data.py wrote
    image_folder.ImageFolder   images with captions or labels, as they are
    webdataset.WebDataset, tfrecords.TFRecords, tfds_source.TFDS
    mixture.Mixture     several of them, by weight

`source.split("train")` returns `Records`: shards with their record counts, a
function that reads a shard from any record on, and one that parses a record.
The counts are essential: with them a run resumes inside an epoch by skipping
whole shards, and every epoch holds each record once.

Dimensions:
    N: records of the split.
    S: shards.
"""

import collections
import dataclasses
import os

import tensorflow as tf

from cappa_tf.data import prompts as prompts_lib
from cappa_tf.data import schema
from cappa_tf.data.stream import caching, corrupt_shards, shuffling

# Below this size, records are kept in memory and epochs are full permutations.
# The machine's memory does not matter, as the order must not depend on it.
RECORDS_IN_MEMORY_BYTES = 256 << 20
_READ_BUFFER_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Reading:
    """Options for reading the training stream, which determine its order.

    Attributes:
        seed: Integer.
        shuffle: Whether records are shuffled.
        shuffle_buffer: Number of records held to shuffle a set on disk.
        num_readers: Number of virtual readers of a set on disk.
        cache: "stream" or "records"; None decides by size.
        host: Index of the host whose positions to return.
        num_hosts: Number of hosts that share the stream.
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

    A subclass defines `read`, and `parse` and `deserialize` unless its records
    are those of `schema.py`.

    Args:
        name: Name of the records in messages.
        shards: List of objects with `path`, `num_examples` and `num_bytes`.

    Attributes:
        min_side: Minimum length of an image's shorter side; an image below it
            is a bad record.
        has_prompts: Whether captions answer prompts, such as questions.
    """

    min_side = 1
    has_prompts = False

    def __init__(self, name, shards):
        self.name = name
        self.shards = shards
        self._in_memory = self._max_captions = None

    def __iter__(self):
        """Iterates over the shards."""
        return iter(self.shards)

    @property
    def parts(self):
        """List of the `Records` that these consist of, in order."""
        return [self]

    @property
    def num_examples(self):
        """N, the number of records."""
        return sum(shard.num_examples for shard in self.shards)

    @property
    def max_captions(self):
        """Maximum number of captions of a record.

        The split is read once if this is not stored on disk.
        """
        if self._max_captions is None:
            self._max_captions = max(
                (len(example.captions) for example in self.read_examples()),
                default=0,
            )
        return self._max_captions

    @property
    def prompts(self):
        """Templates of the prompts that captions answer; none without any."""
        return (prompts_lib.QUESTION,) if self.has_prompts else ()

    @property
    def identity(self):
        """What tells these records from all others: a JSON value.

        The same where the same data lie elsewhere, as far as their files have
        a checksum or the time at which they were last changed.
        """
        return [
            type(self).__name__,
            [_file_identity(shard) for shard in self.shards],
            *self.settings,
        ]

    @property
    def settings(self):
        """What else the contents of the records depend on: JSON values."""
        return []

    def range_identity(self, shard, skip, count):
        """As `identity`, of a range of records of one shard.

        Args:
            shard: Index of the shard.
            skip: Number of records before the range.
            count: Number of records in it.
        """
        return [
            type(self).__name__,
            _file_identity(self.shards[shard]),
            [skip, count],
            *self.settings,
        ]

    def read(self, shard, skip, count):
        """Records of a shard in a tf.data graph.

        Args:
            shard: Index of the shard, scalar int64.
            skip: Number of records to skip, scalar int64.
            count: Number of records to return, scalar int64.

        Returns:
            A `tf.data.Dataset` of exactly `count` serialized records. One that
            cannot be read is replaced by `LOST` and the path.
        """
        raise NotImplementedError

    def parse(self, serialized):
        """Parses one record in a graph, into the dict of `schema.parse`."""
        return schema.parse(serialized)

    def deserialize(self, serialized):
        """Parses one record in Python, into a `schema.Example`."""
        return schema.deserialize(serialized)

    def check(self, counter):
        """Compares the files with the records about them.

        Args:
            counter: `bad_records.SkipCounter` to which records known to be bad
                are added.

        Raises:
            ValueError: If too many records are missing, or the data are other
                ones.
        """

    def check_captions(self):
        """Checks that the records are not known to have no captions at all.

        Raises:
            ValueError: If they have none.
        """
        if self._max_captions == 0:
            raise ValueError(
                f"{self.name}: no record has a caption. {self._where_to_look()}"
            )

    def label_counts(self):
        """Number of records with each label.

        Returns:
            A dict label -> number, without the records that have none; None if
            all of a large split would have to be read.
        """
        num_bytes = sum(shard.num_bytes for shard in self.shards)
        if num_bytes > RECORDS_IN_MEMORY_BYTES:
            return None
        labels = (example.label for example in self.read_examples())
        return dict(collections.Counter(x for x in labels if x is not None))

    def _where_to_look(self):
        """Hint for the message that there are no captions."""
        return ""

    def read_examples(self, limit=None):
        """Reads the records in order.

        Args:
            limit: Maximum number of examples to read; None for all.

        Yields:
            A `schema.Example` for each record; a bad one has neither image nor
            captions.
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
        """Returns the training stream as record numbers.

        Args:
            reading: `Reading`.
            start_index: Position to start at.

        Returns:
            A `tf.data.Dataset` of (position, record number).
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
        """Returns the training stream as records.

        Args:
            reading: `Reading`.
            start_index: Position to start at.

        Returns:
            A `tf.data.Dataset` of (position, serialized record).
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
        name: Name of the records in messages.
        shards: List of shards, as in `Records`.
        first: Index of the first record of each shard, if others precede it.
    """

    def __init__(self, name, shards, first=None):
        super().__init__(name, shards)
        with tf.device("CPU:0"):
            self._paths = tf.constant([shard.path for shard in shards])
            self._first = tf.constant(first or [0] * len(shards), tf.int64)

    def read(self, shard, skip, count):
        """Reads records of a shard, as in `Records`."""
        return read_tfrecords(
            self._paths[shard], self._first[shard] + skip, count
        )


def read_tfrecords(path, skip, count):
    """Reads exactly `count` records of one file, from record `skip` on.

    Damaged and missing records are replaced by `LOST`. A missing file is
    replaced by an empty one. A file that vanishes before the reader opens it is
    an error each time the reader is asked, and `ignore_errors` would ask
    forever: the range ends that, as each question takes a number from it.

    Args:
        path: Scalar string.
        skip: Scalar int64.
        count: Scalar int64.

    Returns:
        A `tf.data.Dataset` of serialized records.
    """
    readable = tf.where(exists(path), path, "/dev/null")
    records = tf.data.TFRecordDataset(
        readable, buffer_size=_READ_BUFFER_BYTES
    ).skip(skip)
    rest = corrupt_shards.records_from_damage_on(
        readable, skip, shuffling.LOST + path
    )
    lost = tf.data.Dataset.from_tensors(shuffling.LOST + path).repeat()
    numbered = tf.data.Dataset.zip(tf.data.Dataset.range(count), records)
    records = numbered.ignore_errors().map(lambda _, record: record)
    # The data sets after `records` are opened only if those end too early.
    records = records.concatenate(rest).concatenate(lost)
    return records.take(count)


def exists(path):
    """Whether a file exists, in a graph, scalar bool."""
    # Characters that are wildcards in file patterns are escaped.
    pattern = tf.strings.regex_replace(path, r"([\\*?\[\]])", r"\\\1")
    return tf.size(tf.io.matching_files(pattern)) > 0
