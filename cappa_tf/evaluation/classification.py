"""Classification by the head of a trained classifier.

Abbreviations for dimensions:
    B: images per batch.  N: images.  C: classes.
"""

import os

import numpy as np

from cappa_tf.evaluation.class_figures import (
    calibration_error,
    confusion_lines,
    figures,
    first,
    ranks,
)
from cappa_tf.evaluation.evaluator import (
    Evaluator,
    Report,
    skipped_lines,
    table,
)
from cappa_tf.evaluation.images import EvaluationImages
from cappa_tf.inference.predictor import CLASSIFY
from cappa_tf.utils.arguments import check_counts

# Classes of the printed table; the report has all.
_MOST_ROWS = 50
# Pairs of classes of the printed list of confusions.
_MOST_CONFUSIONS = 5


class Classification(Evaluator):
    """Accuracy of a classifier on labeled images, prepared as in its training.

    Args:
        path: Path of the data, as in `EvaluationImages`.
        split: Name of the split.
        bins: Number of bins of the calibration error.
        limit: Maximum number of images to use, or None for all.
        batch_size: Number of images per batch.
        name: Name of the evaluator in the results.
    """

    needs = (CLASSIFY,)

    def __init__(
        self,
        path: str | os.PathLike,
        split="test",
        *,
        bins=15,
        limit: int | None = None,
        batch_size=64,
        name="classification",
    ):
        super().__init__(name)
        check_counts(optional=True, limit=limit)
        check_counts(bins=bins, batch_size=batch_size)
        self._data = EvaluationImages(path, split)
        self._bins = bins
        self._limit = limit
        self._batch_size = batch_size

    def open(self):
        """Checks that the data can be found."""
        self._data.open()

    def evaluate(self, predictor):
        """Classifies every image.

        Returns:
            A `Report` of `top_1`, `top_5` (with more than five classes),
            `mean_per_class`, `calibration_error` and `nll`, the mean
            cross-entropy in nats. A label without a class in the head raises
            ValueError; classes without images are listed.
        """
        self.check(predictor)
        data = self._data
        batches = data.labelled(predictor.preprocessing, self._batch_size)
        found, labels = [], []
        for images, numbers, _ in first(batches, self._limit):
            found.append(predictor.class_probabilities(images))
            labels.append(numbers)
        if not labels:
            raise ValueError(
                f"There is no labeled image in split {data.split!r} of "
                f"{data.path}. Received: skipped={dict(data.skipped)}"
            )
        return report(
            np.concatenate(found),
            np.concatenate(labels),
            data.class_names,
            bins=self._bins,
            skipped=dict(data.skipped),
            source=f"split {data.split!r} of {data.path}",
        )


def report(
    probabilities, labels, names=(), *, bins=15, skipped=None, source="the data"
):
    """All figures of a classification.

    Args:
        probabilities: float [N, C].
        labels: int [N].
        names: Names of the classes, or none.
        bins: Number of bins of the calibration error.
        skipped: Dict reason -> number of images left out.
        source: Name of the data, for messages.

    Returns:
        A `Report`; `details` has the table of the classes (`per_class`), the
        confusion matrix (`confusion`, true class by predicted class) and the
        bins of the calibration error (`calibration`).

    Raises:
        ValueError: If a label is not a class of the head.
    """
    classes = probabilities.shape[1]
    if labels.max() >= classes:
        raise ValueError(
            "Every label must be a class of the head, 0 to "
            f"{classes - 1}. Received: label {labels.max()} in {source}"
        )
    if len(names) != classes:
        names = [str(number) for number in range(classes)]
    metrics, confusion = figures(probabilities, labels)
    error, calibration = calibration_error(probabilities, labels, bins)
    right = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    metrics["calibration_error"] = error
    metrics["nll"] = float(-np.log(np.maximum(right, 1e-38)).mean())
    per_class = _per_class(confusion, names)
    absent = [row["class"] for row in per_class if not row["images"]]
    lines = [
        f"{len(labels)} images, {classes} classes",
        *table(tuple(metrics), [tuple(metrics.values())]),
        "",
        *_class_lines(per_class),
        *confusion_lines(names, confusion.tolist()),
        *_mistakes(names, confusion),
        *skipped_lines(skipped or {}),
    ]
    if absent:
        some = ", ".join(absent[:_MOST_ROWS])
        more = " ..." if len(absent) > _MOST_ROWS else ""
        lines.append(f"classes without an image: {some}{more}")
    details = {
        "num_images": len(labels),
        "class_names": list(names),
        "per_class": per_class,
        "confusion": confusion.tolist(),
        "calibration": [
            {"images": n, "accuracy": accuracy, "probability": mean}
            for n, accuracy, mean in calibration
        ],
        "skipped": dict(skipped or {}),
    }
    hits = ranks(probabilities, labels) == 0
    items = {"top_1": hits.astype(float).tolist()}
    return Report(metrics, lines, details, items=items)


def _per_class(confusion, names):
    """Images, recall and precision of each class; None where undefined."""
    true, predicted = confusion.sum(1), confusion.sum(0)
    right = np.diag(confusion)
    return [
        {
            "class": name,
            "images": int(true[i]),
            "accuracy": float(right[i] / true[i]) if true[i] else None,
            "precision": (
                float(right[i] / predicted[i]) if predicted[i] else None
            ),
        }
        for i, name in enumerate(names)
    ]


def _class_lines(per_class):
    rows = [tuple(row.values()) for row in per_class[:_MOST_ROWS]]
    more = len(per_class) - len(rows)
    lines = table(("class", "images", "accuracy", "precision"), rows)
    return lines + [f"... and {more} more classes"] * (more > 0)


def _mistakes(names, confusion):
    """The most frequent pairs of a true and a wrongly predicted class."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_CONFUSIONS]
    pairs = [np.unravel_index(i, wrong.shape) for i in order]
    lines = [
        f"  {wrong[pair]} x {names[pair[0]]} taken for {names[pair[1]]}"
        for pair in pairs
        if wrong[pair]
    ]
    return ["", "most frequent mistakes:", *lines] if lines else []
