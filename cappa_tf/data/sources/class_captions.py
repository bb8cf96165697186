"""Captions from class labels, such as "a photo of a pug"."""

import tensorflow as tf

from cappa_tf.data.sources.base import Records
from cappa_tf.data.sources.prepared import as_source


class LabelCaptions:
    """A source whose captions are made from the labels of another source.

    Args:
        source: A source with labels, or a folder of prepared data.
        names: Class names by class number; by default those of the source,
            when it is opened.
        templates: Sentences with {} in place of the name; each is a caption.
            ("{}",) makes the name itself the caption, for a decoder that
            answers a prompt such as "classify:".
    """

    def __init__(
        self,
        source,
        names: list | tuple | None = None,
        templates: list | tuple = ("a photo of a {}",),
    ):
        if names is not None and not names:
            raise ValueError("`names` must be class names. Received: none")
        if not templates or not all("{}" in t for t in templates):
            raise ValueError(
                "`templates` must be sentences with {}. Received: "
                f"templates={templates!r}"
            )
        self._source = as_source(source)
        self._names, self._templates = names, templates
        self.name = self._source.name

    @property
    def class_names(self):
        """Names of the classes by number.

        Raises:
            ValueError: If there are none, given or of the source.
        """
        names = self._names or getattr(self._source, "class_names", ())
        if not names:
            raise ValueError(
                "LabelCaptions needs the `names` of the classes, as its source "
                f"does not know them. Received: {self.name}"
            )
        return list(names)

    def split(self, split):
        """Returns the `Records` of a split."""
        captions = [
            [template.replace("{}", name) for template in self._templates]
            for name in self.class_names
        ]
        return _Captioned(self._source.split(split), captions)


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

    def range_identity(self, shard, skip, count):
        """As `Records.range_identity`, with the captions."""
        own = self._records.range_identity(shard, skip, count)
        return [type(self).__name__, own, self._captions]

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
        # These captions do not answer the record's own prompts.
        prompts = tf.zeros([0], tf.string)
        return {**record, "captions": captions, "prompts": prompts}

    def deserialize(self, serialized):
        """Parses a record in Python, as in `Records`."""
        example = self._records.deserialize(serialized)
        label = example.label
        known = label is not None and 0 <= label < len(self._captions)
        example.captions = list(self._captions[label]) if known else []
        example.prompts = example.question_types = None
        return example
