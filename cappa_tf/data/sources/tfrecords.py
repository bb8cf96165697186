"""TFRecords of tf.train.Examples with other names, such as img2dataset's.

One feature holds the image file, one its caption or captions, others key and
class number. Their names are set in a gin file. The headers in the files are
scanned once to count their records (`shard_index.py`).
"""

import os
import struct

import tensorflow as tf
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from cappa_tf.data import schema, text
from cappa_tf.data.sources import shard_index
from cappa_tf.data.sources.base import TFRecordFiles


class TFRecords:
    """A source of TFRecord files.

    Args:
        path: A pattern with {split}, a dict from split to pattern, or a
            folder with train-*.tfrecord or train/*.tfrecord, as in
            `shard_index.find_files`.
        image: Names of the feature with the image file; the first one that a
            record has is used.
        captions: Names of the feature with the captions, one or more bytes.
        label: Name of an integer feature, or None.
        key: Name of the feature that identifies records in messages, with
            bytes or numbers.
    """

    def __init__(
        self,
        path: str | os.PathLike | dict,
        image: tuple | list = ("jpg", "png", "webp"),
        captions: tuple | list = ("txt", "caption"),
        label: str | None = None,
        key="key",
    ):
        for name, value in (("image", image), ("captions", captions)):
            if not isinstance(value, tuple | list) or not value:
                raise ValueError(
                    f"`{name}` must be a list of names. Received: "
                    f"{name}={value!r}"
                )
        self._path = path
        self._features = {
            "image": list(image),
            "captions": list(captions),
            "label": label,
            "key": key,
        }
        self.name = str(path)

    def split(self, split):
        """Returns the `Records` of a split."""
        files = shard_index.find_files(self._path, split, ".tfrecord")
        return _NamedRecords(
            f"{self.name} {split}",
            shard_index.Index(files, ["tfrecord", split], count_records),
            self._features,
        )


class _NamedRecords(TFRecordFiles):
    """Indexed records whose features have names of their own."""

    def __init__(self, name, shards, features):
        super().__init__(name, shards.shards)
        self._index = shards
        self._features = features

    @property
    def settings(self):
        """As `Records.settings`: the names of the features."""
        return [self._features]

    def check(self, counter):
        """Checks the files, as in `Records`."""
        self._index.check(counter)

    def parse(self, serialized):
        """Parses a record in a graph, as in `Records`."""
        names = self._features
        many = tf.io.FixedLenSequenceFeature([], tf.string, allow_missing=True)
        features = dict.fromkeys(names["image"] + names["captions"], many)
        if names["label"] is not None:
            features[names["label"]] = tf.io.FixedLenFeature([], tf.int64, -1)
        found = tf.io.parse_single_example(serialized, features)
        return {
            "image/encoded": _first_present(found, names["image"])[0],
            "captions": text.decode_in_graph(
                _first_present(found, names["captions"])
            ),
            "prompts": tf.zeros([0], tf.string),
            # It may be of any type, and is used only in messages.
            "key": tf.constant(""),
            "label": found.get(names["label"], tf.constant(-1, tf.int64)),
        }

    def deserialize(self, serialized):
        """Parses a record in Python, as in `Records`."""
        try:
            feature = tf.train.Example.FromString(serialized).features.feature
        except Exception as error:  # DecodeError's module moves.
            raise ValueError(f"not a tf.train.Example: {error}") from None

        def values(names):
            for name in names:
                if name in feature and feature[name].WhichOneof("kind"):
                    values = _values(feature, name, "bytes_list")
                    if values:
                        return values
            return []

        names = self._features
        key = _key(feature, names["key"])
        try:
            image = values(names["image"])
            if not image:
                raise ValueError(
                    f"the record has none of the features {names['image']}, "
                    f"but {sorted(feature)}"
                )
            captions = [text.decode(c) for c in values(names["captions"])]
            label = _values(feature, names["label"], "int64_list")
            if len(label) > 1:
                raise ValueError(
                    f"the feature {names['label']!r} holds {len(label)} numbers"
                )
        except ValueError as error:
            raise ValueError(f"{key}: {error}" if key else error) from None
        return schema.Example(
            key=key,
            image=image[0],
            captions=captions,
            label=next(iter(label), None),
        )


def _values(feature, name, kind):
    """The values of a feature of a given kind.

    Raises:
        ValueError: If the feature is of another kind.
    """
    if name is None or name not in feature:
        return []
    found = feature[name].WhichOneof("kind")
    if found not in (kind, None):
        raise ValueError(
            f"the feature {name!r} must be a {kind}. Received: a {found}"
        )
    return getattr(feature[name], kind).value


def _key(feature, name):
    """The key of a record as text; numbers are joined by commas."""
    kind = feature[name].WhichOneof("kind") if name in feature else None
    if kind is None:
        return ""
    return ",".join(
        value.decode(errors="replace")
        if isinstance(value, bytes)
        else f"{value:.7g}"
        if kind == "float_list"
        else str(value)
        for value in getattr(feature[name], kind).value
    )


def _first_present(found, names):
    """The first of several string features that is not empty."""
    values = found[names[-1]]
    for name in reversed(names[:-1]):
        values = tf.cond(
            tf.size(found[name]) > 0,
            lambda name=name: found[name],
            lambda values=values: values,
        )
    return values


def count_records(path, companion=None):
    """Counts the records of a TFRecord file by their lengths.

    Args:
        path: Path of the file.
        companion: Not written.

    Returns:
        (number of records, None, problems), as for `shard_index.Index`.
    """
    del companion
    size = tf.io.gfile.stat(path).length
    count = position = 0
    # A record: length (8 bytes), its checksum (4), content, checksum (4).
    with shard_index.open_binary(path) as file:
        while position < size:
            file.seek(position)
            head = file.read(12)
            if len(head) < 12:
                break
            length, checksum = struct.unpack("<QI", head)
            if position + length + 16 > size:
                if masked_crc32c(head[:8]) != checksum:
                    # Without a valid length the next record cannot be found.
                    lost = shard_index.estimate(count, position, size)
                    problem = (lost, f"not a record at byte {position}")
                    return count, None, {shard_index.DAMAGED: problem}
                break
            position += length + 16
            count += 1
    if position == size:
        return count, None, {}
    problem = (0, f"ends inside record {count}, at byte {position}")
    return count, None, {shard_index.DAMAGED: problem}
