"""Captions from class labels, such as "a photo of a pug"."""

import tensorflow as tf

from cappa_tf.data.sources.base import Records
from cappa_tf.data.sources.prepared import as_source


class LabelCaptions:
    """A source whose captions are made from the labels of another source.

    Args:
        source: A source with labels, or a folder of prepared data.
        names: Class names by class number.
        templates: Sentences with {} in place of the name; each is a caption.
    """

    def __init__(
        self,
        source,
        names: list | tuple,
        templates: list | tuple = ("a photo of a {}",),
    ):
        if not names or not templates or not all("{}" in t for t in templates):
            raise ValueError(
                "`names` must be class names, and `templates` sentences with "
                f"{{}}. Received: {len(names)} names, templates={templates!r}"
            )
        self._source = as_source(source)
        self._captions = [
            [template.replace("{}", name) for template in templates]
            for name in names
        ]
        self.name = self._source.name

    def split(self, split):
        """Returns the `Records` of a split."""
        return _Captioned(self._source.split(split), self._captions)


class _Captioned(Records):
    """Records with captions by class.

    Args:
        records: The `Records` with labels.
        captions: List by class number of lists of captions.
    """

    def __init__(self, records, captions):
        super().__init__(records.name, records.shards)
        self._records, self._captions = records, captions
        self._max_captions = len(captions[0])
        with tf.device("CPU:0"):
            self._table = tf.constant(captions)  # [classes, templates]

    @property
    def identity(self):
        """As `Records.identity`, with the captions."""
        return [type(self).__name__, self._records.identity, self._captions]

    def read(self, shard, skip, count):
        """Reads records of a shard, as in `Records`."""
        return self._records.read(shard, skip, count)

    def check(self, counter):
        """Checks the files, as in `Records`."""
        self._records.check(counter)

    def label_counts(self):
        """Counts the labels, as `Records` does."""
        return self._records.label_counts()

    def parse(self, serialized):
        """Parses a record; one without a known label has no caption."""
        record = self._records.parse(serialized)
        label = record["label"]
        known = (label >= 0) & (label < len(self._captions))
        captions = tf.boolean_mask(
            tf.gather(self._table, tf.where(known, label, 0)),
            tf.repeat(known, self._max_captions),
        )
        return {**record, "captions": captions}

    def deserialize(self, serialized):
        """Parses a record in Python, as in `Records`."""
        example = self._records.deserialize(serialized)
        label = example.label
        known = label is not None and 0 <= label < len(self._captions)
        example.captions = list(self._captions[label]) if known else []
        return example
