"""Pictures with class labels, as evaluations of frozen features read them.

B: batch.  H, W: height and width the encoder takes.  N: examples.
"""

import collections
import os

import numpy as np
import tensorflow as tf

from cappa_tf.data.caption_dataset import CaptionDataset
from cappa_tf.data.description import DatasetDescription
from cappa_tf.data.preprocessing import ImagePreprocessing
from cappa_tf.data.sources import image_rows
from cappa_tf.evaluation import rows

_RESIZES = {
    "squash": "squash",
    "resize_small": "resize_small_central_crop",
}
RESIZES = tuple(_RESIZES)
# The paper resizes to 256 for a crop of 224.
PAPER_MARGIN = 256 / 224


class LabelledImages:
    """One split of a folder of labelled pictures, or of our TFRecords.

    Pictures are resized with the paper's margin (256 for 224) and their
    middle is cut out. What cannot be read or has no label is skipped and
    counted.

    Args:
        path: Folder with `dataset.json`, or with a labels file in one of the
            forms of `data/sources/image_rows.py` ({"image", "label",
            "split"} a line).
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
        self._preprocessing = ImagePreprocessing(
            image_size,
            _RESIZES[resize],
            reduced_decode=False,
        ).with_margin(margin)
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
            found, self._malformed = rows.list_rows(self._path)
            # Of all splits: numbers must not depend on the split.
            self._label_names = image_rows.class_names(found)
            self.class_names = self._label_names or image_rows.named_classes(
                found
            )
            splits = sorted({image_rows.choose_split(row) for row in found})
            self._rows = [
                row
                for row in found
                if image_rows.choose_split(row) == self._split
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
        for pictures, labels, _ in self.part(batch_size):
            yield pictures, labels

    def part(self, batch_size, host=0, num_hosts=1):
        """`batches` of one of several hosts, which share the pictures.

        Yields:
            As `batches`, and int64 [B] that order the pictures of all hosts.
        """
        self.skipped.clear()
        read = (
            self._record_batches if self._is_records else self._folder_batches
        )
        for pictures, labels, order in read(batch_size, host, num_hosts):
            known = labels >= 0
            self.skipped["no label"] += int((~known).sum())
            if known.any():
                yield pictures[known], labels[known], order[known]
        self.skipped = +self.skipped

    def _record_batches(self, batch_size, host, num_hosts):
        data = CaptionDataset(
            self._path,
            self._split,
            None,
            preprocessing=self._preprocessing,
            batch_size=batch_size,
        )
        part = data.evaluate(batch_size, host, num_hosts)
        for batch in part.as_numpy_iterator():
            real = batch["_mask"] > 0
            yield (
                batch["image"][real],
                batch["label"][real],
                batch["index"][real],
            )
        self.skipped.update(data.skipped)

    def _folder_batches(self, batch_size, host, num_hosts):
        # A run of rows: what is skipped then leaves the order as it is.
        first, end = (
            len(self._rows) * i // num_hosts for i in (host, host + 1)
        )
        noted = image_rows.Skipped()
        options = image_rows.Options(require_captions=False)

        def read():
            for example in rows.read_examples(
                self._rows[first:end], noted, options, self._label_names
            ):
                label = -1 if example.label is None else example.label
                yield example.image, label

        signature = (
            tf.TensorSpec([], tf.string),
            tf.TensorSpec([], tf.int64),
        )
        data = tf.data.Dataset.from_generator(read, output_signature=signature)
        data = data.map(
            lambda encoded, label: (self._preprocessing(encoded), label),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
        data = data.enumerate(first).map(lambda i, pair: (*pair, i))
        yield from data.batch(batch_size).prefetch(2).as_numpy_iterator()
        if host == 0:
            self.skipped.update(self._malformed)
        self.skipped.update(noted.counts)


def extract_features(encoder, data, batch_size=64, progress=None, hosts=None):
    """Runs a frozen encoder over labelled pictures.

    Args:
        encoder: A `VisionEncoder`.
        data: `LabelledImages`.
        batch_size: Pictures at once.
        progress: Optional function called with the number of pictures after
            each batch.
        hosts: Has `index`, `count` and `gather(value)`, where several
            processes encode a part each and all want the result.

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

    rows = []  # (order, features, label)
    part = (0, 1) if hosts is None else (hosts.index, hosts.count)
    for pictures, labels, order in data.part(batch_size, *part):
        encoded = encode(tf.constant(pictures)).numpy()
        rows += zip(order.tolist(), encoded, labels.tolist())
        if progress is not None:
            progress(len(labels))
    if hosts is not None:
        parts = hosts.gather((rows, data.skipped))
        rows = [row for part in parts for row in part[0]]
        data.skipped = sum((part[1] for part in parts), collections.Counter())
    if not rows:
        raise ValueError(
            f"No labelled picture was found. Received: skipped "
            f"{dict(data.skipped)}"
        )
    rows.sort(key=lambda row: row[0])
    _, features, labels = zip(*rows)
    return np.stack(features), np.array(labels, np.int64)
