"""Pictures with class labels, as evaluations of frozen features read them.

B: batch.  H, W: height and width the encoder takes.  N: examples.
"""

import collections
import os

import numpy as np
import tensorflow as tf

from cappa_tf.checks import check_number, height_width
from cappa_tf.data import images, sources
from cappa_tf.data.description import DatasetDescription
from cappa_tf.data.pipeline import CaptionDataset

RESIZES = ("squash", "resize_small")
# The paper resizes to 256 for a crop of 224.
PAPER_MARGIN = 256 / 224


class LabelledImages:
    """One split of a folder of labelled pictures, or of our TFRecords.

    Pictures are resized with the paper's margin (256 for 224) and their
    middle is cut out. What cannot be read or has no label is skipped and
    counted.

    Args:
        path: Folder with `dataset.json`, or with a labels file in one of the
            forms of `data/sources.py` ({"image", "label", "split"} a line).
        split: Name of the split.
        image_size: H and W, an integer or a pair.
        resize: "squash" (the reference's: both sides to the length) or
            "resize_small" (the shorter side, aspect ratio kept).
        margin: Picture to crop, in length; 1 leaves nothing out.

    Attributes:
        class_names: Names of the classes by number, as the data has them; an
            empty list where it has none.
        skipped: Counter of what `batches` left out, by reason.
    """

    def __init__(
        self, path, split, image_size, resize="squash", margin=PAPER_MARGIN
    ):
        if resize not in RESIZES:
            raise ValueError(
                f"`resize` must be one of {RESIZES}. Received: {resize!r}"
            )
        self._path = os.fspath(path)
        self._split = split
        self._size = height_width("image_size", image_size)
        self._resize = resize
        self._margin = check_number("margin", margin, 1.0)
        self.skipped = collections.Counter()
        self._is_records = os.path.exists(
            os.path.join(self._path, "dataset.json")
        )
        self._check_split()

    def _check_split(self):
        if self._is_records:
            described = DatasetDescription.load(self._path)
            splits = described.splits
            self.class_names = list(described.metadata.get("classes", []))
        else:
            malformed = sources.Skipped()
            rows = sources.read_rows(self._path, skipped=malformed)
            self._malformed = malformed.counts
            # Of all splits: numbers must not depend on the split.
            self._label_names = sources.class_names(rows)
            self.class_names = self._label_names or sources.named_classes(rows)
            splits = sorted({sources.choose_split(row) for row in rows})
            self._rows = [
                row for row in rows if sources.choose_split(row) == self._split
            ]
        if self._split not in splits:
            raise ValueError(
                f"{self._path} has the splits {list(splits)}. "
                f"Received: split={self._split!r}"
            )

    def batches(self, batch_size):
        """Yields (images float32 [B, H, W, 3] in [-1, 1], labels int64 [B]).

        The last batch may be smaller.
        """
        self.skipped.clear()
        pairs = (
            self._record_batches(batch_size)
            if self._is_records
            else self._folder_batches(batch_size)
        )
        for pictures, labels in pairs:
            known = labels >= 0
            self.skipped["no label"] += int((~known).sum())
            if known.any():
                yield pictures[known], labels[known]
        self.skipped = +self.skipped

    @property
    def _decode_size(self):
        # Rounded down as in the reference (configs/proj/cappa/pretrain.py).
        return tuple(int(side * self._margin) for side in self._size)

    def _record_batches(self, batch_size):
        squash = self._resize == "squash"
        data = CaptionDataset(
            self._path,
            self._split,
            None,
            self._decode_size if squash else self._size,
            resize="squash" if squash else "resize_small_central_crop",
            resize_small=None if squash else max(self._decode_size),
            reduced_decode=False,
            batch_size=batch_size,
        )
        for batch in data.evaluate().as_numpy_iterator():
            real = batch["_mask"] > 0
            pictures = _central_crop(batch["image"], self._size)
            yield pictures[real], batch["label"][real]
        self.skipped.update(data.skipped)

    def _folder_batches(self, batch_size):
        noted = sources.Skipped()
        options = sources.Options(require_captions=False)

        def read():
            for _, example in sources.read_examples(
                self._rows,
                noted,
                options,
                os.cpu_count() or 1,
                self._label_names,
            ):
                label = -1 if example.label is None else example.label
                yield example.image, label

        signature = (
            tf.TensorSpec([], tf.string),
            tf.TensorSpec([], tf.int64),
        )
        data = tf.data.Dataset.from_generator(read, output_signature=signature)
        data = data.map(
            lambda encoded, label: (self._picture(encoded), label),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
        yield from data.batch(batch_size).prefetch(2).as_numpy_iterator()
        self.skipped.update(self._malformed + noted.counts)

    def _picture(self, encoded):
        image = images.decode(encoded)
        if self._resize == "squash":
            image = images.resize(image, self._decode_size)
            image = _central_crop(image[None], self._size)[0]
        else:
            image = images.resize_small_central_crop(
                image, max(self._decode_size), self._size
            )
        return images.to_model_range(image)


def _central_crop(pictures, size):
    """The middle [B, H, W, 3] of pictures that are at least as large."""
    (height, width), (h, w) = pictures.shape[1:3], size
    top, left = (height - h) // 2, (width - w) // 2
    return pictures[:, top : top + h, left : left + w]


def extract_features(encoder, data, batch_size=64, progress=None):
    """Runs a frozen encoder over labelled pictures.

    Args:
        encoder: A `VisionEncoder`.
        data: `LabelledImages`.
        batch_size: Pictures at once.
        progress: Optional function called with the number of pictures after
            each batch.

    Returns:
        (features float32 [N, D], labels int64 [N]), features being
        `pre_logits`, or the mean of `encoded` for an encoder that pools not.

    Raises:
        ValueError: If no labelled picture is left.
    """

    @tf.function(reduce_retracing=True)
    def encode(pictures):
        outputs = encoder(pictures, training=False)
        if "pre_logits" in outputs:
            return tf.cast(outputs["pre_logits"], tf.float32)
        return tf.reduce_mean(tf.cast(outputs["encoded"], tf.float32), 1)

    features, labels = [], []
    for pictures, numbers in data.batches(batch_size):
        features.append(encode(tf.constant(pictures)).numpy())
        labels.append(numbers)
        if progress is not None:
            progress(len(numbers))
    if not features:
        raise ValueError(
            f"No labelled picture was found. Received: skipped "
            f"{dict(data.skipped)}"
        )
    return np.concatenate(features), np.concatenate(labels)
