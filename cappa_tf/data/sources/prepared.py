"""Prepared data, as written by tools/prepare_data.py, and `as_source`."""

import functools
import os

import tensorflow as tf

from cappa_tf.data import description as description_lib
from cappa_tf.data.sources import image_folder, shard_index
from cappa_tf.data.sources.base import TFRecordFiles
from cappa_tf.data.sources.tfds_source import TFDS
from cappa_tf.data.sources.tfrecords import TFRecords
from cappa_tf.data.sources.webdataset import WebDataset
from cappa_tf.data.stream import bad_records

# Prefix of the name of a TFDS data set, which is not a path.
TFDS_PREFIX = "tfds:"


class PreparedData:
    """A data set written by `schema.write_dataset`.

    Args:
        path: Folder of the data set.
    """

    def __init__(self, path: str | os.PathLike):
        self.name = os.fspath(path)

    @property
    def splits(self):
        """Names of the splits."""
        return description_lib.DatasetDescription.load(self.name).splits

    @property
    def class_names(self):
        """Names of the classes by number; empty if there are none."""
        described = description_lib.DatasetDescription.load(self.name)
        return list(described.metadata.get("classes", []))

    def split(self, split):
        """Returns the `Records` of a split."""
        return _PreparedRecords(
            description_lib.DatasetDescription.load(self.name), split
        )


class Folder:
    """Data of any kind, which is determined when they are first opened.

    The folder may be written after this object is created.

        "data/mine"               `PreparedData`, if it has a dataset.json
        "tfds:coco_captions"      `tfds_source.TFDS`; also a folder of it
        "cc3m/{split}-*.tar"      `webdataset.WebDataset`; also a folder with
                                  train-*.tar or train/*.tar
        "laion/{split}/*.tfrecord"    `tfrecords.TFRecords`, likewise
        "photos"                  `image_folder.ImageFolder`; any other folder,
                                  or a table of images

    Args:
        path: One of these.
    """

    def __init__(self, path: str | os.PathLike):
        self.name = os.fspath(path)

    @functools.cached_property
    def source(self):
        """The source that the folder holds."""
        if self.name.startswith(TFDS_PREFIX):
            return TFDS.found(self.name.removeprefix(TFDS_PREFIX))
        for suffix, kind in SHARDS.items():
            if self.name.endswith(suffix) and "{split}" in self.name:
                return kind(self.name)
        described = os.path.join(self.name, description_lib.FILE_NAME)
        if tf.io.gfile.exists(described) or not tf.io.gfile.exists(self.name):
            return PreparedData(self.name)
        if tf.io.gfile.exists(os.path.join(self.name, "dataset_info.json")):
            return TFDS.found(self.name)
        for suffix, kind in SHARDS.items():
            if shard_index.has_shards(self.name, suffix):
                return kind(self.name)
        return image_folder.ImageFolder(self.name)

    @property
    def splits(self):
        """Names of the splits; None if the source does not tell them."""
        return getattr(self.source, "splits", None)

    @property
    def class_names(self):
        """Names of the classes by number; empty if there are none."""
        return getattr(self.source, "class_names", [])

    def split(self, split):
        """Returns the `Records` of a split."""
        return self.source.split(split)


# Suffixes of shards that are read in place.
SHARDS = {".tar": WebDataset, ".tfrecord": TFRecords}


class _PreparedRecords(TFRecordFiles):
    """Records with a description that tells their number."""

    def __init__(self, description, split):
        super().__init__(
            f"{description.directory} {split}", description.shards(split)
        )
        self._description, self._split = description, split
        self._max_captions = description.max_captions(split)
        self.has_prompts = description.num_prompts(split) > 0

    def label_counts(self):
        """Counts the labels, as `Records` does; without reading if possible."""
        counts = self._description.label_counts(self._split)
        return super().label_counts() if counts is None else counts

    def check(self, counter):
        """Checks the files, as in `Records`."""
        wrong = self._description.disagreements(self._split)
        bad_records.check_shards(
            wrong,
            description_lib.disagreement_message(
                self._description.directory, wrong
            ),
            self.num_examples,
            counter.max_fraction,
        )


def num_classes(path: str | os.PathLike):
    """Number of classes that labeled data names, for gin files.

    Args:
        path: Folder of the data, or a source.

    Raises:
        ValueError: If it names none.
    """
    names = getattr(as_source(path), "class_names", [])
    if not names:
        raise ValueError(
            f"{path} does not name its classes: set NUM_CLASSES. Received: "
            "data without class names"
        )
    return len(names)


def as_source(value):
    """Returns a source: the given one, or that of a folder.

    Raises:
        ValueError: If the value is neither a path nor a source.
    """
    if isinstance(value, str | os.PathLike):
        return Folder(value)
    if not (hasattr(value, "split") and hasattr(value, "name")):
        raise ValueError(
            "The data must be a folder or a source such as "
            f"`webdataset.WebDataset`. Received: {value!r}"
        )
    return value
