"""Pictures with captions, from a folder or from our TFRecords alike.

B: images at once.  H, W: height and width the model takes.
"""

import collections
import itertools
import os

import numpy as np

from cappa_tf.data.caption_dataset import CaptionDataset
from cappa_tf.data.description import DatasetDescription
from cappa_tf.data.images import image_files
from cappa_tf.data.sources import image_folder
from cappa_tf.evaluation import captioning
from cappa_tf.evaluation.rows import list_rows, read_examples
from cappa_tf.utils.arguments import check_counts


class CaptionedImages:
    """One split of a folder of captioned pictures, or of our TFRecords.

    What cannot be read or has no caption is skipped and counted.

    Args:
        path: Folder with `dataset.json`, or with captions in one of the forms
            of `data/sources/image_folder.py`.
        split: Name of the split.
        limit: Only the first `limit` pictures.

    Attributes:
        skipped: Counter of what `batches` left out, by reason.
    """

    def __init__(
        self, path: str | os.PathLike, split: str, limit: int | None = None
    ):
        check_counts(optional=True, limit=limit)
        self.path = os.fspath(path)
        self.split = split
        self._limit = limit
        self._rows = None
        self.skipped = collections.Counter()

    @property
    def _is_records(self):
        return os.path.exists(os.path.join(self.path, "dataset.json"))

    def open(self):
        """Looks whether there is such a split.

        Raises:
            ValueError: There is none.
        """
        if self._is_records:
            splits = DatasetDescription.load(self.path).splits
        else:
            rows, self._malformed = list_rows(self.path, log=self._rows is None)
            splits = sorted({image_folder.choose_split(row) for row in rows})
            rows = [
                r for r in rows if image_folder.choose_split(r) == self.split
            ]
            self._rows = rows[: self._limit]
        if self.split not in splits:
            raise ValueError(
                f"{self.path} has the splits {list(splits)}. "
                f"Received: split={self.split!r}"
            )

    def batches(self, predictor):
        """Reads the split in order, as a model takes it.

        Args:
            predictor: `Predictor` with the model's preprocessing and B.

        Yields:
            (images float32 [at most B, H, W, 3] in [-1, 1], their
            `schema.Example`s).

        Raises:
            ValueError: Nothing was left to read.
        """
        self.open()
        self.skipped = collections.Counter()
        read = self._of_records if self._is_records else self._of_folder
        empty = True
        for images, examples in read(predictor):
            empty = False
            yield images, examples
        if empty:
            raise ValueError(
                "Nothing to evaluate on. Received: split "
                f"{self.split!r} of {self.path}, skipped={dict(self.skipped)}"
            )

    def _of_records(self, predictor):
        data = CaptionDataset(
            self.path,
            self.split,
            predictor.tokenizer,
            **predictor.preprocessing,
        )
        for images, _, examples in captioning.batches(
            data, predictor.batch_size, self._limit
        ):
            yield images.numpy(), examples
        self.skipped.update(data.skipped)

    def _of_folder(self, predictor):
        noted = image_folder.Skipped()
        found = read_examples(self._rows, noted)
        good = self._decoded(found, predictor.reader)
        while some := list(itertools.islice(good, predictor.batch_size)):
            images, examples = zip(*some)
            yield np.stack(images), list(examples)
        self.skipped.update(self._malformed + noted.counts)

    def _decoded(self, found, reader):
        for example in found:
            try:
                yield reader.decode(example.image), example
            except image_files.UnusableError as error:
                self.skipped[error.reason] += 1
