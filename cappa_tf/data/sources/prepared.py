"""Data sets that tools/prepare_data.py wrote, and `as_source`."""

import functools
import os

import tensorflow as tf

from cappa_tf.data import description as description_lib
from cappa_tf.data.sources import image_folder
from cappa_tf.data.sources.base import TFRecordFiles
from cappa_tf.data.stream import bad_records


class PreparedData:
    """A data set written by `schema.write_dataset`.

    Args:
        path: Its folder.
    """

    def __init__(self, path: str | os.PathLike):
        self.name = os.fspath(path)

    @property
    def class_names(self):
        """Names of the classes by number; empty where they have none."""
        described = description_lib.DatasetDescription.load(self.name)
        return list(described.metadata.get("classes", []))

    def split(self, split):
        """The `Records` of a split."""
        return _PreparedRecords(
            description_lib.DatasetDescription.load(self.name), split
        )


class Folder:
    """A folder of either kind; which, is looked at when it is first opened.

    (It may be written after this object is made.) A folder with dataset.json
    is `PreparedData`, any other an `image_folder.ImageFolder`.

    Args:
        path: The folder, or a table of images.
    """

    def __init__(self, path: str | os.PathLike):
        self.name = os.fspath(path)

    @functools.cached_property
    def source(self):
        """The source it turns out to be."""
        described = os.path.join(self.name, "dataset.json")
        if tf.io.gfile.exists(described) or not tf.io.gfile.exists(self.name):
            return PreparedData(self.name)
        return image_folder.ImageFolder(self.name)

    @property
    def class_names(self):
        """Names of the classes by number; empty where they have none."""
        return self.source.class_names

    def split(self, split):
        """The `Records` of a split."""
        return self.source.split(split)


class _PreparedRecords(TFRecordFiles):
    """Records with a description that says how many there must be."""

    def __init__(self, description, split):
        super().__init__(
            f"{description.directory} {split}", description.shards(split)
        )
        self._description, self._split = description, split
        self._max_captions = description.max_captions(split)

    def check(self, counter):
        """As `Records.check`."""
        wrong = self._description.disagreements(self._split)
        bad_records.check_shards(
            wrong,
            description_lib.disagreement_message(
                self._description.directory, wrong
            ),
            self.num_examples,
            counter.max_fraction,
        )


def as_source(value):
    """A source: the one given, or what a folder holds."""
    if isinstance(value, str | os.PathLike):
        return Folder(value)
    if not (hasattr(value, "split") and hasattr(value, "name")):
        raise ValueError(
            "The data must be a folder or a source such as "
            f"`webdataset.WebDataset`. Received: {value!r}"
        )
    return value
