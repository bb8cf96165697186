"""Pictures with class labels, as evaluations of frozen features read them.

B: batch.  H, W: height and width the encoder takes.  N: examples.
"""

import collections
import os

import numpy as np
import tensorflow as tf

from cappa_tf.data.caption_dataset import CaptionDataset
from cappa_tf.data.description import DatasetDescription
from cappa_tf.data.images import decode_resize
from cappa_tf.data.sources import image_folder
from cappa_tf.evaluation import rows
from cappa_tf.utils.arguments import check_number, height_width

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
            forms of `data/sources/image_folder.py` ({"image", "label",
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
            found, self._malformed = rows.list_rows(self._path)
            # Of all splits: numbers must not depend on the split.
            self._label_names = image_folder.class_names(found)
            self.class_names = self._label_names or image_folder.named_classes(
                found
            )
            splits = sorted({image_folder.choose_split(row) for row in found})
            self._rows = [
                row
                for row in found
                if image_folder.choose_split(row) == self._split
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

    @property
    def _decode_size(self):
        # Rounded down as in the reference (configs/proj/cappa/pretrain.py).
        return tuple(int(side * self._margin) for side in self._size)

    def _record_batches(self, batch_size, host, num_hosts):
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
        part = data.evaluate(batch_size, host, num_hosts)
        for batch in part.as_numpy_iterator():
            real = batch["_mask"] > 0
            pictures = _central_crop(batch["image"], self._size)
            yield pictures[real], batch["label"][real], batch["index"][real]
        self.skipped.update(data.skipped)

    def _folder_batches(self, batch_size, host, num_hosts):
        # A run of rows: what is skipped then leaves the order as it is.
        first, end = (
            len(self._rows) * i // num_hosts for i in (host, host + 1)
        )
        noted = image_folder.Skipped()
        options = image_folder.Options(require_captions=False)

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
            lambda encoded, label: (self._picture(encoded), label),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
        data = data.enumerate(first).map(lambda i, pair: (*pair, i))
        yield from data.batch(batch_size).prefetch(2).as_numpy_iterator()
        if host == 0:
            self.skipped.update(self._malformed)
        self.skipped.update(noted.counts)

    def _picture(self, encoded):
        image = decode_resize.decode(encoded)
        if self._resize == "squash":
            image = decode_resize.resize(image, self._decode_size)
            image = _central_crop(image[None], self._size)[0]
        else:
            image = decode_resize.resize_small_central_crop(
                image, max(self._decode_size), self._size
            )
        return decode_resize.to_model_range(image)


def _central_crop(pictures, size):
    """The middle [B, H, W, 3] of pictures that are at least as large."""
    (height, width), (h, w) = pictures.shape[1:3], size
    top, left = (height - h) // 2, (width - w) // 2
    return pictures[:, top : top + h, left : left + w]


def extract_features(encode, data, batch_size=64, progress=None, hosts=None):
    """Runs a frozen encoder over labelled pictures.

    Args:
        encode: Maps images float32 [B, H, W, 3] to features float32 [B, D],
            such as `Predictor.features`.
        data: `LabelledImages`.
        batch_size: Pictures at once.
        progress: Optional function called with the number of pictures after
            each batch.
        hosts: Has `index`, `count` and `gather(value)`, where several
            processes encode a part each and all want the result.

    Returns:
        (features float32 [N, D], labels int64 [N]), in the order
        of the data.

    Raises:
        ValueError: If no labelled picture is left.
    """
    rows = []  # (order, features, label)
    part = (0, 1) if hosts is None else (hosts.index, hosts.count)
    for pictures, labels, order in data.part(batch_size, *part):
        encoded = encode(pictures)
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
