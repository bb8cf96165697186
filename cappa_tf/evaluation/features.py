"""Frozen features of labeled images, as in the paper's evaluations.

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
    """Preprocessing of the reference's evaluations: resize, central crop.

    Args:
        image_size: H and W, an integer or a pair.
        resize: "squash" (both sides to the given length, as in the reference)
            or "resize_small" (the shorter side, keeping the aspect ratio).
        margin: Ratio of the resized side to that of the crop; the paper resizes
            to 256 for a crop of 224. With 1 nothing is cropped.

    Returns:
        An `ImagePreprocessing`.
    """
    return ImagePreprocessing(
        image_size, _RESIZES[resize], reduced_decode=False
    ).with_margin(margin)


def extract_features(
    predictor, data, resize="squash", batch_size=64, progress=None, hosts=None
):
    """Extracts features of labeled images.

    Args:
        predictor: A `Predictor` that has features.
        data: `EvaluationImages`.
        resize: "squash" or "resize_small", as in `preprocessing`.
        batch_size: B.
        progress: Optional function, called after each batch with its number of
            images.
        hosts: Object with `index`, `count` and `gather(value)` if several
            processes encode a part each and all need the result.

    Returns:
        (features float32 [N, D], labels int64 [N]), in the order of the data.

    Raises:
        ValueError: If there is no labeled image.
    """
    rows = []  # (order, features, label)
    part = (0, 1) if hosts is None else (hosts.index, hosts.count)
    for images, labels, order in data.labelled(
        preprocessing(predictor.image_size, resize), batch_size, *part
    ):
        encoded = predictor.features(images)
        rows += zip(order.tolist(), encoded, labels.tolist())
        if progress is not None:
            progress(len(labels))
    if hosts is not None:
        parts = hosts.gather((rows, data.skipped))
        rows = [row for part in parts for row in part[0]]
        data.skipped = sum((part[1] for part in parts), collections.Counter())
    if not rows:
        raise ValueError(
            f"No labeled image was found. Received: skipped "
            f"{dict(data.skipped)}"
        )
    rows.sort(key=lambda row: row[0])
    _, features, labels = zip(*rows)
    return np.stack(features), np.array(labels, np.int64)
