"""Frozen features of labelled images, as the paper's evaluations take them.

B: batch.  H, W: height and width the encoder takes.  N: examples.
"""

import collections

import numpy as np

from cappa_tf.data.preprocessing import MARGIN, ImagePreprocessing

_RESIZES = {
    "squash": "squash",
    "resize_small": "resize_small_central_crop",
}
RESIZES = tuple(_RESIZES)


def preprocessing(image_size, resize="squash", margin=MARGIN):
    """What the reference does for evaluation: the middle of the whole image.

    Args:
        image_size: H and W, an integer or a pair.
        resize: "squash" (the reference's: both sides to the length) or
            "resize_small" (the shorter side, aspect ratio kept).
        margin: Image to crop, in length; the paper resizes to 256 for a crop
            of 224. 1 leaves nothing out.

    Returns:
        An `ImagePreprocessing`.
    """
    return ImagePreprocessing(
        image_size, _RESIZES[resize], reduced_decode=False
    ).with_margin(margin)


def extract_features(
    predictor, data, resize="squash", batch_size=64, progress=None, hosts=None
):
    """Features of labelled images.

    Args:
        predictor: A `Predictor` with features, which are frozen.
        data: `EvaluationImages`.
        resize: As `preprocessing`.
        batch_size: B.
        progress: Optional function called with the number of images after
            each batch.
        hosts: Has `index`, `count` and `gather(value)`, where several
            processes encode a part each and all want the result.

    Returns:
        (features float32 [N, D], labels int64 [N]), in the order
        of the data.

    Raises:
        ValueError: If no labelled image is left.
    """
    rows = []  # (order, features, label)
    part = (0, 1) if hosts is None else (hosts.index, hosts.count)
    for pictures, labels, order in data.labelled(
        preprocessing(predictor.image_size, resize), batch_size, *part
    ):
        encoded = predictor.features(pictures)
        rows += zip(order.tolist(), encoded, labels.tolist())
        if progress is not None:
            progress(len(labels))
    if hosts is not None:
        parts = hosts.gather((rows, data.skipped))
        rows = [row for part in parts for row in part[0]]
        data.skipped = sum((part[1] for part in parts), collections.Counter())
    if not rows:
        raise ValueError(
            f"No labelled image was found. Received: skipped "
            f"{dict(data.skipped)}"
        )
    rows.sort(key=lambda row: row[0])
    _, features, labels = zip(*rows)
    return np.stack(features), np.array(labels, np.int64)
