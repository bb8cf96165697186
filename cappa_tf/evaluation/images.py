"""Images for evaluation: one split of any source.

Dimensions:
    B: batch of images.
    K: maximum number of labels of an image.
    H, W: height and width the model takes.
"""

import collections
import json
import os

import numpy as np
import tensorflow as tf

from cappa_tf.data.caption_dataset import CaptionDataset
from cappa_tf.data.prompts import check_template
from cappa_tf.data.sources import prepared
from cappa_tf.evaluation import captioning
from cappa_tf.utils import files
from cappa_tf.utils.arguments import check_counts


class EvaluationImages:
    """One split of a folder of images, of prepared data or of a source.

    Args:
        path: Path of the data or a source, as in `CaptionDataset`.
        split: Name of the split.
        limit: Maximum number of images, including bad ones; None for all.
        prompt: Template of the prompts of captions, as in `CaptionDataset`.

    Attributes:
        skipped: Counter of the images left out in the last pass, by reason.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split: str,
        limit: int | None = None,
        prompt: str | None = None,
    ):
        check_template(prompt)
        check_counts(optional=True, limit=limit)
        self._source = prepared.as_source(path)
        self.path, self.split = self._source.name, split
        self._limit, self._prompt = limit, prompt
        self.skipped = collections.Counter()

    @property
    def class_names(self):
        """Names of the classes by number, an empty list if there are none."""
        return list(getattr(self._source, "class_names", []))

    def open(self):
        """Checks that the split exists.

        Raises:
            ValueError: If it does not.
        """
        self._source.split(self.split)

    def _data(self, tokenizer, preprocessing):
        self.skipped = collections.Counter()
        # An evaluation reports what it left out, so it may skip bad records.
        # Prepared data were checked when they were written: an unreadable
        # record there means damage. But how long a question may be depends on
        # the model.
        source = getattr(self._source, "source", self._source)
        strict = isinstance(source, prepared.PreparedData) and not (
            self._prompt or source.split(self.split).has_prompts
        )
        return CaptionDataset(
            source,
            self.split,
            tokenizer,
            preprocessing=preprocessing,
            prompt=None if tokenizer is None else self._prompt,
            **({} if strict else {"max_skipped_fraction": 1.0}),
        )

    def captioned(self, predictor, limit=None):
        """Reads images with captions in order.

        Args:
            predictor: `Predictor` with the model's preprocessing and B.
            limit: Only the first images; by default that of the constructor.

        Yields:
            (images float32 [at most B, H, W, 3] in [-1, 1], their
            `schema.Example`s, with `prompts` as text if there are any).

        Raises:
            ValueError: If there is no image to read.
        """
        data = self._data(predictor.tokenizer, predictor.preprocessing)
        empty = True
        for images, _, examples in captioning.batches(
            data, predictor.batch_size, limit or self._limit
        ):
            empty = False
            yield images.numpy(), examples
        self.skipped = collections.Counter(data.skipped)
        if empty:
            raise ValueError(
                "There is no image to evaluate on. Received: split "
                f"{self.split!r} of {self.path}, skipped={data.skipped}"
            )

    def labelled(self, preprocessing, batch_size, host=0, num_hosts=1):
        """Reads images with labels in order.

        Args:
            preprocessing: `ImagePreprocessing`.
            batch_size: B.
            host: Index of the host whose part to read.
            num_hosts: Number of hosts, and of parts.

        Yields:
            (images float32 [at most B, H, W, 3] in [-1, 1], labels int64 [at
            most B], positions in the split int64 [at most B]).
        """
        data = self._data(None, preprocessing)
        without = 0
        part = data.evaluate(batch_size, host, num_hosts)
        for batch in part.as_numpy_iterator():
            real = batch["_mask"] > 0
            known = real & (batch["label"] >= 0)
            without += int((real & ~known).sum())
            if known.any():
                yield tuple(
                    batch[name][known] for name in ("image", "label", "index")
                )
        self.skipped = collections.Counter(data.skipped)
        self.skipped["no label"] += without
        if host:  # The first host reports these.
            self.skipped -= collections.Counter(data.noted)
        self.skipped = +self.skipped

    def multi_labelled(self, preprocessing, batch_size, labels):
        """Reads images with labels of another source, several an image.

        Args:
            preprocessing: `ImagePreprocessing`.
            batch_size: B.
            labels: Dict from the key of an image to a list of class numbers,
                from `read_labels`. Images without any are left out.

        Yields:
            (images float32 [at most B, H, W, 3] in [-1, 1], labels int64 [at
            most B, K] filled up with -1, their positions in the split).
        """
        data = self._data(None, preprocessing)
        most = max(map(len, labels.values()), default=0)
        without = 0
        for images, positions, examples in captioning.batches(data, batch_size):
            rows = [labels.get(example.key, []) for example in examples]
            known = np.array([bool(row) for row in rows])
            without += int((~known).sum())
            if known.any():
                filled = [row + [-1] * (most - len(row)) for row in rows if row]
                yield (
                    images.numpy()[known],
                    np.array(filled, np.int64),
                    np.array(positions)[known],
                )
        self.skipped = collections.Counter(data.skipped)
        self.skipped["no label"] += without
        self.skipped = +self.skipped


def read_labels(path, num_classes):
    """Reads a JSON file of several labels per image.

    Args:
        path: An object from the keys of images to lists of class numbers, as
            in {"val/1.jpg": [3, 7], "val/2.jpg": []}.
        num_classes: C.

    Returns:
        The dict.

    Raises:
        ValueError: The file is missing or has another form; names the image.
    """
    try:
        found = json.loads(files.read_text(path))
    except (OSError, ValueError, tf.errors.OpError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} must be an object from keys of images to lists of class "
            f"numbers. Received: a {type(found).__name__}"
        )
    for key, labels in found.items():
        numbers = labels if isinstance(labels, list) else [None]
        if not all(type(n) is int and 0 <= n < num_classes for n in numbers):
            raise ValueError(
                f"Labels in {path} must be lists of numbers from 0 to "
                f"{num_classes - 1}. Received: {labels!r} of {key!r}"
            )
    return found
