"""Data sets that tools/prepare_data.py wrote, and `as_source`."""

import os

from cappa_tf.data import description as description_lib
from cappa_tf.data.sources.base import TFRecordFiles
from cappa_tf.data.stream import bad_records


class PreparedData:
    """A data set written by `schema.write_dataset`.

    Args:
        path: Its folder.
    """

    def __init__(self, path: str | os.PathLike):
        self.name = os.fspath(path)

    def split(self, split):
        """The `Records` of a split."""
        return _PreparedRecords(
            description_lib.DatasetDescription.load(self.name), split
        )


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
    """A source: the one given, or the prepared data in a folder."""
    if isinstance(value, str | os.PathLike):
        return PreparedData(value)
    if not (hasattr(value, "split") and hasattr(value, "name")):
        raise ValueError(
            "The data must be a folder or a source such as "
            f"`webdataset.WebDataset`. Received: {value!r}"
        )
    return value
