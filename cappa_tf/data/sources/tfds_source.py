"""TFDS: data sets of TensorFlow Datasets, by name or from a folder.

Their records are read as bytes, like any other TFRecords, so that they are
shuffled and resumed in the same way. TFDS only provides the list of files,
their record counts and the parser. Images remain encoded.
"""

import contextlib
import dataclasses
import functools
import os

import tensorflow as tf

from cappa_tf.data import description, schema
from cappa_tf.data.sources.base import TFRecordFiles
from cappa_tf.data.stream import bad_records

# Usual names of features, the first that is there.
_USUAL = {
    "image": ("image", "image/encoded", "jpg"),
    "captions": ("captions/text", "captions", "caption", "text"),
    "label": ("label",),
    "key": ("key", "image/filename", "file_name", "filename"),
}


class TFDS:
    """A source that TFDS has prepared.

    A split may be a part of one: "train[5%:]" and "train[:5%]".

    Args:
        path: Name of a data set, "coco_captions" or "coco_captions/2014", or
            the folder of an existing one (`builder_from_directory`).
        image: Name of the feature with the image.
        captions: Name of the feature with the caption or captions, or None. A
            slash separates nested features: "captions/text".
        label: Name of the feature with the class number, or None.
        key: Name of the feature that identifies records in messages, or None.
        data_dir: Folder in which TFDS stores its data; None for its default.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        image="image",
        captions: str | None = "captions/text",
        label: str | None = None,
        key: str | None = None,
        data_dir: str | None = None,
    ):
        self.name = os.fspath(path)
        self._features = {
            "image": image,
            "captions": captions,
            "label": label,
            "key": key,
        }
        self._data_dir = data_dir

    @classmethod
    def found(cls, path):
        """The source whose features are found by their usual names.

        Captions, label and key are left out if no feature is called so.

        Args:
            path: Name or folder, as of the class.
        """
        features = cls(path).builder.info.features

        def first(what, default=None):
            for name in _USUAL[what]:
                with contextlib.suppress(ValueError):
                    _find(path, features, what, name)
                    return name
            return default

        return cls(
            path,
            image=first("image", "image"),
            captions=first("captions"),
            label=first("label"),
            key=first("key"),
        )

    @functools.cached_property
    def builder(self):
        """The TFDS builder."""
        import tensorflow_datasets as tfds  # takes seconds

        if tf.io.gfile.isdir(self.name):
            return tfds.builder_from_directory(self.name)
        try:
            return tfds.builder(self.name, data_dir=self._data_dir)
        except tfds.core.DatasetNotFoundError as error:
            raise ValueError(
                "`path` must be a data set of TFDS or the folder of one. "
                f"Received: path={self.name!r} ({str(error).splitlines()[0]})"
            ) from None

    @property
    def splits(self):
        """Names of the splits."""
        return list(self.builder.info.splits)

    def split(self, split):
        """Returns the `Records` of a split."""
        builder = self.builder
        if not builder.info.splits:
            raise ValueError(
                f"TFDS has not prepared {self.name} in {builder.data_dir}: run "
                f"`tfds build {self.name}` first."
            )
        if builder.info.file_format.value != "tfrecord":
            raise ValueError(
                "TFDS must have written TFRecords (tf.data reads no other "
                f"format). Received: {builder.info.file_format.value} in "
                f"{builder.data_dir}"
            )
        try:
            files = builder.info.splits[split].file_instructions
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"`split` must be one of {list(builder.info.splits)} of "
                f"{self.name}, or a part of one. Received: split={split!r} "
                f"({error})"
            ) from None
        return _TFDSRecords(
            f"{self.name} {split}", files, builder.info.features, self._features
        )


class _TFDSRecords(TFRecordFiles):
    """Records of a TFDS split."""

    def __init__(self, name, files, features, names):
        shards = [
            description.Shard(
                file.filename,
                file.take,
                description.file_size(file.filename),
                "",
            )
            for file in files
        ]
        super().__init__(name, shards, [file.skip for file in files])
        # Kind of feature -> keys that lead to it.
        self._keys = {
            what: _find(name, features, what, path)
            for what, path in names.items()
            if path is not None
        }
        self._features, self._decoders = _partial(features, self._keys)

    @property
    def settings(self):
        """As `Records.settings`: the part of each file, and its keys."""
        keys = {what: list(path) for what, path in self._keys.items()}
        return [self._first.numpy().tolist(), keys]

    def check(self, counter):
        """Checks that all shards exist; TFDS does not record their sizes."""
        missing = [
            (dataclasses.replace(shard, num_bytes=1), 0)
            for shard in self.shards
            if not shard.num_bytes
        ]
        listed = ", ".join(shard.path for shard, _ in missing[:3])
        bad_records.check_shards(
            missing,
            f"{self.name} lacks {len(missing)} shards: {listed}.",
            self.num_examples,
            counter.max_fraction,
        )

    def parse(self, serialized):
        """Parses a record in a graph, as in `Records`."""
        found = self._features.deserialize_example(
            serialized, decoders=self._decoders
        )
        values = {
            "captions": tf.zeros([0], tf.string),
            "key": tf.constant(""),
            "label": tf.constant(-1, tf.int64),
        }
        for what, path in self._keys.items():
            values[what] = functools.reduce(lambda v, k: v[k], path, found)
        return {
            "image/encoded": values["image"],
            "captions": tf.reshape(values["captions"], [-1]),
            "prompts": tf.zeros([0], tf.string),
            "key": values["key"],
            "label": tf.cast(values["label"], tf.int64),
        }

    def deserialize(self, serialized):
        """Parses a record in Python, as in `Records`."""
        try:
            with tf.device("CPU:0"):
                found = self.parse(tf.constant(serialized))
        except tf.errors.OpError as error:
            raise ValueError(f"not a record of TFDS: {error}") from None
        label = int(found["label"])
        return schema.Example(
            key=found["key"].numpy().decode(errors="replace"),
            image=found["image/encoded"].numpy(),
            captions=[
                caption.decode(errors="replace")
                for caption in found["captions"].numpy()
            ],
            label=None if label < 0 else label,
        )


def _find(name, features, what, path):
    """The keys that lead to a feature, such as two for "captions/text"."""
    found, keys, rest = features, (), path
    while rest:
        level = getattr(found, "feature", found)  # of a Sequence
        known = list(level) if hasattr(level, "keys") else []
        # Names may contain slashes: "image/filename" beside "image", in an
        # order that differs from process to process.
        fitting = [k for k in known if f"{rest}/".startswith(f"{k}/")]
        key = max(fitting, key=len, default=None)
        if key is None:
            raise ValueError(
                f"`{what}` must be a feature of {name}: {features}. "
                f"Received: {what}={path!r}"
            )
        found, keys, rest = level[key], (*keys, key), rest[len(key) + 1 :]
    return keys


def _partial(features, paths):
    """Only the features at some paths, and decoders that skip images."""
    import tensorflow_datasets as tfds

    wanted = {}
    for path in paths.values():
        level = wanted
        for key in path[:-1]:
            level = level.setdefault(key, {})
        level[path[-1]] = True
    decoders = tfds.decode.SkipDecoding()
    for key in reversed(paths["image"]):
        decoders = {key: decoders}
    partial = tfds.decode.PartialDecoding(wanted)
    return partial.extract_features(features), decoders
