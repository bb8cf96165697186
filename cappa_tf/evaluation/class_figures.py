"""Figures of a classification: accuracies, confusion matrix, calibration.

Abbreviations for dimensions:
    N: images.  C: classes.  K: maximum number of labels of an image.
"""

import numpy as np

from cappa_tf.evaluation.evaluator import table

_MOST_COLUMNS = 20


def ranks(scores, labels):
    """Counts the wrong classes that score as high as the right one or higher.

    Args:
        scores: float [N, C].
        labels: int [N], or [N, K] padded with -1; of several labels the one
            with the highest score counts.

    Returns:
        int [N], 0 where a right class wins alone: a tie counts as lost.
    """
    right = _is_right(labels, scores.shape[1])
    best = np.where(right, scores, -np.inf).max(1, keepdims=True)
    return (~right & (scores >= best)).sum(1)


def _is_right(labels, num_classes):
    """Bool [N, C], True where a class is a label of an image."""
    labels = np.asarray(labels)
    labels = labels.reshape(len(labels), -1)
    right = np.zeros((len(labels), num_classes), bool)
    rows, columns = np.nonzero(labels >= 0)
    right[rows, labels[rows, columns]] = True
    return right


def figures(scores, labels):
    """Accuracies and the confusion matrix.

    Args:
        scores: float [N, C].
        labels: int [N], or [N, K] padded with -1: any of them is right. Each
            image has at least one.

    Returns:
        (dict of `top_1`, with more than five classes `top_5`, and
        `mean_per_class`, the mean of the top-1 of each class; int [C, C], true
        class by predicted class). An image with several labels belongs to each
        of these classes; in the matrix its true class is the predicted one if
        that is right, and the first label otherwise.
    """
    classes = scores.shape[1]
    position = ranks(scores, labels)
    right = _is_right(labels, classes)
    predicted = scores.argmax(1)
    each = np.arange(len(scores))
    first = np.asarray(labels).reshape(len(scores), -1)[:, 0]
    true = np.where(right[each, predicted], predicted, first)
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (true, predicted), 1)
    per_class = [
        np.mean(position[right[:, c]] == 0)
        for c in range(classes)
        if right[:, c].any()
    ]
    found = {"top_1": float(np.mean(position == 0))}
    if classes > 5:
        found["top_5"] = float(np.mean(position < 5))
    found["mean_per_class"] = float(np.mean(per_class))
    return found, confusion


def calibration_error(probabilities, labels, bins=15):
    """Expected calibration error of the predicted class.

    Images are put into bins of equal width by the probability of their
    predicted class. The error is the mean, weighted by the images of a bin, of
    the difference between its accuracy and its mean probability.

    Args:
        probabilities: float [N, C].
        labels: int [N].
        bins: Number of bins.

    Returns:
        (the error, from 0 to 1; list of (images, accuracy, mean probability)
        of each bin, the last two None of an empty one).

    Reference: Guo et al., arXiv 1706.04599, section 2.
    """
    probabilities, labels = np.asarray(probabilities), np.asarray(labels)
    sure = probabilities.max(1)
    right = probabilities.argmax(1) == labels
    # Bins are open on the left: 0.2 belongs to (0.1, 0.2].
    number = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    error, rows = 0.0, []
    for one in range(bins):
        inside = number == one
        count = int(inside.sum())
        if not count:
            rows.append((0, None, None))
            continue
        accuracy, mean = float(right[inside].mean()), float(sure[inside].mean())
        rows.append((count, accuracy, mean))
        error += count / len(labels) * abs(accuracy - mean)
    return error, rows


def confusion_lines(names, confusion):
    """The matrix as a table, if it fits the terminal."""
    if len(names) > _MOST_COLUMNS:
        return []
    rows = [
        (f"{number} {name}", *row)
        for number, (name, row) in enumerate(zip(names, confusion))
    ]
    head = ("true class, by predicted one", *range(len(names)))
    return ["", *table(head, rows)]


def first(batches, limit):
    """The first `limit` images of batches; all if it is None."""
    left = float("inf") if limit is None else limit
    for batch in batches:
        count = int(min(left, len(batch[0])))
        yield tuple(values[:count] for values in batch)
        left -= count
        if not left:
            return
