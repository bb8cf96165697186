"""Image folder: a folder of images with captions or labels, as a source.

`image_rows.py` describes the supported layouts. tools/prepare_data.py converts
the same folders to shards.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import os

import tensorflow as tf

from cappa_tf.data import schema
from cappa_tf.data.images import image_files
from cappa_tf.data.schema import Example
from cappa_tf.data.sources import image_rows
from cappa_tf.data.sources.base import Records
from cappa_tf.data.stream import caching
from cappa_tf.utils.arguments import check_counts


class ImageFolder:
    """A source of image files, listed when first opened and read in place.

    Rows may name their split; the others are divided by a hash of their key,
    nine tenths to "train" and one tenth to "validation".

    Args:
        path: Path of the folder, or of a table in it.
        captions: Path of the table, if it should not be guessed.
        min_side: Minimum length of an image's shorter side; an image below it
            is a bad record.
        max_caption_characters: Maximum length of a caption, question or
            answer; longer ones are left out.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        captions: str | os.PathLike | None = None,
        min_side: int = 8,
        max_caption_characters: int = 1000,
    ):
        check_counts(
            min_side=min_side, max_caption_characters=max_caption_characters
        )
        self.name = os.fspath(path)
        self._captions = captions
        self._min_side = min_side
        self._max_characters = max_caption_characters

    @functools.cached_property
    def _listed(self):
        """(rows, `Skipped`, names of classes whose labels are text)."""
        skipped = image_rows.Skipped()
        rows = image_rows.read_rows(self.name, self._captions, skipped)
        # Over all splits, as numbers must not depend on the split.
        return rows, skipped, image_rows.class_names(rows)

    @property
    def class_names(self):
        """Names of the classes by number; empty if there are none."""
        rows, _, names = self._listed
        return names or image_rows.named_classes(rows)

    @property
    def splits(self):
        """Names of the splits, sorted."""
        return sorted({image_rows.choose_split(row) for row in self._listed[0]})

    def split(self, split):
        """Returns the `Records` of a split.

        Raises:
            ValueError: If there is no split of this name.
        """
        rows, skipped, names = self._listed
        chosen = [row for row in rows if image_rows.choose_split(row) == split]
        if not chosen:
            raise ValueError(
                f"`split` must be one of {self.splits} of {self.name}. "
                f"Received: split={split!r}"
            )
        left_out = [
            tuple(line.split("\t", 1)) for line in dict.fromkeys(skipped.lines)
        ]
        return _FolderRecords(
            f"{self.name} {split}",
            chosen,
            {name: i for i, name in enumerate(names)},
            left_out,
            self._min_side,
            self._max_characters,
        )


class _Files:
    """The image files of a split, in place of a shard.

    Attributes:
        path: Path of the first file.
        num_examples: Number of files.
    """

    def __init__(self, rows):
        self.path = rows[0].path
        self.num_examples = len(rows)
        self._rows = rows

    @functools.cached_property
    def num_bytes(self):
        """Total size of the files; missing ones count as 0."""
        total = 0
        for path in {row.path for row in self._rows}:
            with contextlib.suppress(tf.errors.OpError):
                total += tf.io.gfile.stat(path).length
        return total


class _FolderRecords(Records):
    """Records of a folder, which refer to their image files.

    A record is one of `schema.py` with an empty image and the features
    "image/path" and "image/cell". The file is read when the record is parsed.
    The records are small enough to be kept in memory, so each epoch is a full
    permutation.
    """

    def __init__(self, name, rows, classes, left_out, min_side, max_characters):
        super().__init__(name, [_Files(rows)])
        self.min_side = min_side
        self._rows = rows
        self._left_out = list(left_out)
        self._has_cells = any(row.cell is not None for row in rows)
        self._max_captions = 0
        listed = []
        self._labels = collections.Counter()
        for row in rows:
            if row.label is not None:
                self._labels[classes.get(row.label, row.label)] += 1
            reasons = [tuple(refused) for refused in row.refused]
            captions, *prompts = image_rows.clean_texts(
                row, max_characters, reasons
            )
            self._left_out += reasons
            self._max_captions = max(self._max_captions, len(captions))
            self.has_prompts |= prompts[0] is not None
            listed.append(_reference(row, captions, prompts, classes))
        with tf.device("CPU:0"):
            self._references = tf.constant(listed)

    @property
    def identity(self):
        """As `Records.identity`: of each image file, and of all captions."""
        return self.range_identity(0, 0, self.num_examples)

    def range_identity(self, shard, skip, count):
        """As `Records.range_identity`: of image files, and of captions."""
        del shard
        chosen = slice(skip, skip + count)
        digest = hashlib.sha256()
        for reference in self._references[chosen].numpy():
            digest.update(len(reference).to_bytes(8, "little") + reference)
        for path in sorted({row.path for row in self._rows[chosen]}):
            with contextlib.suppress(tf.errors.OpError):
                found = tf.io.gfile.stat(path)
                digest.update(f"{found.length} {found.mtime_nsec}\n".encode())
        return [type(self).__name__, self.min_side, digest.hexdigest()]

    def label_counts(self):
        """Counts the labels, as `Records` does; no image is read."""
        return dict(self._labels)

    def check(self, counter):
        """Checks the files, as in `Records`."""
        for reason, name in self._left_out:
            counter.note(reason, name)

    def _where_to_look(self):
        return "A folder has them in a table or in text files beside images."

    def read(self, shard, skip, count):
        """Reads records of a shard, as in `Records`."""
        del shard
        references = tf.data.Dataset.from_tensor_slices(self._references)
        return references.skip(skip).take(count)

    def parse(self, serialized):
        """Parses a record in a graph; reads the image file."""
        record = schema.parse(serialized)
        places = tf.io.parse_single_example(
            serialized,
            {
                name: tf.io.FixedLenFeature([], tf.string, default_value="")
                for name in ("image/path", "image/cell")
            },
        )
        path, cell = places["image/path"], places["image/cell"]

        def read():
            if not self._has_cells:
                return tf.io.read_file(path)
            image = tf.numpy_function(_read_place, [path, cell], tf.string)
            return tf.ensure_shape(image, [])

        image = tf.cond(path == "", lambda: record["image/encoded"], read)
        return {**record, "image/encoded": image}

    def deserialize(self, serialized):
        """Parses a record in Python; reads the image file.

        Raises:
            image_files.UnusableError: It cannot be read.
        """
        example = schema.deserialize(serialized)
        feature = tf.train.Example.FromString(serialized).features.feature
        places = [
            (feature[name].bytes_list.value or [b""])[0]
            for name in ("image/path", "image/cell")
        ]
        if not places[0]:
            return example
        try:
            image = _read_place(*places)
        except image_files.UnusableError as error:
            raise image_files.UnusableError(error.reason, example.key) from None
        return dataclasses.replace(example, image=image)

    def in_memory(self):
        """All records with the bytes of their images, string [N]."""
        if self._in_memory is None:
            self._in_memory = caching.load_records(_Loaded(self), self.name)
        return self._in_memory

    def order(self, reading, start_index):
        """As `Records.order`."""
        return self.numbers(reading, start_index)

    def stream(self, reading, start_index):
        """Returns the training stream, as in `Records`."""
        is_held = reading.cache == "records"
        stored = self.in_memory() if is_held else self._references
        return self.numbers(reading, start_index).map(
            lambda index, number: (index, tf.gather(stored, number))
        )


class _Loaded(Records):
    """The same records with their images, if these can be read."""

    def __init__(self, records):
        super().__init__(records.name, records.shards)
        self._records = records

    def read(self, shard, skip, count):
        """Reads records of a shard, as in `Records`."""

        def load(serialized):
            try:
                return schema.serialize(self._records.deserialize(serialized))
            except image_files.UnusableError:
                return serialized

        def load_in_graph(serialized):
            loaded = tf.numpy_function(load, [serialized], tf.string)
            return tf.ensure_shape(loaded, [])

        return self._records.read(shard, skip, count).map(
            load_in_graph, num_parallel_calls=tf.data.AUTOTUNE
        )


def _reference(row, captions, prompts, classes):
    """Serializes the record of a row."""
    label = classes[row.label] if isinstance(row.label, str) else row.label
    place = {"image/path": row.path.encode()}
    if row.cell is not None:
        place["image/cell"] = json.dumps(row.cell).encode()
    feature = {
        name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        for name, value in place.items()
    }
    features = tf.train.Features(feature=feature)
    # Concatenated protocol buffers are merged into one.
    return (
        schema.serialize(Example(row.key, b"", captions, label, *prompts))
        + tf.train.Example(features=features).SerializeToString()
    )


def _read_place(path, cell):
    """Reads the image file at the "image/path" and "image/cell" of a record."""
    return image_rows.read_bytes(
        path.decode(), json.loads(cell) if cell else None
    )
