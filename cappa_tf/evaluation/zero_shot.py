"""Zero-shot classification: the class with the most likely prompt.

Reference: arXiv 2306.07915, section 4.2; big_vision
evaluators/proj/cappa/scoring_classifier.py. The score of a class is the
log-likelihood of its prompt, summed over the tokens and not divided by their
number. With several templates it is the mean of their log-likelihoods.

Letters: N images, C classes, B images per batch, M templates.
"""

import os

import numpy as np

from cappa_tf.evaluation.evaluator import (
    Evaluator,
    Report,
    named,
    skipped_lines,
    table,
)
from cappa_tf.evaluation.features import RESIZES, preprocessing
from cappa_tf.evaluation.images import EvaluationImages
from cappa_tf.inference.predictor import BLIND, MINUS_BLIND, PARALLEL, SCORE
from cappa_tf.utils.arguments import check_choice, check_counts

DEFAULT_TEMPLATES = ("a photo of a {}",)
_MOST_COLUMNS = 20


def prompts(class_names, templates=DEFAULT_TEMPLATES):
    """Prompts of all classes.

    prompts(["cat", "dog"], ["a {}", "the {}"])
        -> ["a cat", "the cat", "a dog", "the dog"]

    Args:
        class_names: C names.
        templates: M texts, each with one {} in place of the name.

    Returns:
        A list of C * M texts, class by class.
    """
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ValueError(
                "A template must have {} once, in place of the name. "
                f"Received: {template!r} of {tuple(templates)}"
            )
    if not class_names or not templates:
        raise ValueError(
            "There must be class names and templates. Received: "
            f"class_names={class_names}, templates={templates}"
        )
    return [t.replace("{}", name) for name in class_names for t in templates]


def ranks(scores, labels):
    """Number of wrong classes that score at least as high as the right one.

    Args:
        scores: float [N, C].
        labels: int [N].

    Returns:
        int [N], 0 if the right class wins alone; a tie counts as an error.
    """
    right = np.take_along_axis(scores, labels[:, None], 1)
    return (scores >= right).sum(1) - 1


def figures(scores, labels):
    """Accuracies and the confusion matrix.

    Args:
        scores: float [N, C].
        labels: int [N].

    Returns:
        (metrics, confusion): a dict of `top_1`, `top_5` (with more than five
        classes) and `mean_per_class`, the mean of the classes' own top-1; and
        the matrix int [C, C] of true class by predicted class.
    """
    classes = scores.shape[1]
    position = ranks(scores, labels)
    confusion = np.zeros((classes, classes), np.int64)
    np.add.at(confusion, (labels, scores.argmax(1)), 1)
    per_class = [
        np.mean(position[labels == c] == 0)
        for c in range(classes)
        if (labels == c).any()
    ]
    found = {"top_1": float(np.mean(position == 0))}
    if classes > 5:
        found["top_5"] = float(np.mean(position < 5))
    found["mean_per_class"] = float(np.mean(per_class))
    return found, confusion


class ZeroShot(Evaluator):
    """Zero-shot classification of a folder or data set of labeled images.

    Args:
        path: Path of the data, as in `EvaluationImages`.
        split: Name of the split.
        class_names: C names by class number; None for those of the data.
        templates: M texts, each with one {} in place of the name.
        resize: "squash" (the whole image) or "resize_small" (its center).
        parallel: Whether to also score by parallel prediction.
        limit: Maximum number of images to use, or None for all.
        name: Name of the evaluator in the results.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split="test",
        *,
        class_names: list | tuple | None = None,
        templates: list | tuple = DEFAULT_TEMPLATES,
        resize="squash",
        parallel=False,
        limit: int | None = None,
        name="zero_shot",
    ):
        super().__init__(name)
        check_choice(RESIZES, resize=resize)
        check_counts(optional=True, limit=limit)
        prompts(["name"], templates)
        self._data = EvaluationImages(path, split)
        self._class_names = class_names
        self._templates = templates
        self._resize = resize
        self.needs = (SCORE, PARALLEL)[: 1 + parallel]
        self._limit = limit

    def open(self):
        """Checks that the data can be found."""
        self._data.open()
        self._names()

    def _names(self):
        names = self._class_names or self._data.class_names
        if not names:
            raise ValueError(
                f"{self._data.path} does not name its classes: pass "
                "`class_names`"
            )
        return list(names)

    def evaluate(self, predictor):
        """Classifies every image.

        Returns:
            A `Report` with the metrics of `figures`. Those of parallel
            prediction have the prefix `parallel/`; those of scores minus the
            score of the text without an image have `minus_blind/`.
        """
        self.check(predictor)
        data, names = self._data, self._names()
        # The whole image is used, as in training: no margin is cropped.
        prepare = preprocessing(predictor.image_size, self._resize, margin=1.0)
        plain = predictor.score_kinds[0]
        kinds = (plain, *self.needs[1:])
        texts = prompts(names, self._templates)
        scores, labels = {kind: [] for kind in kinds}, []
        for images, numbers, _ in _first(
            data.labelled(prepare, predictor.batch_size), self._limit
        ):
            if numbers.max() >= len(names):
                raise ValueError(
                    f"A label has no name. Received: label {numbers.max()} "
                    f"with the {len(names)} names {names}"
                )
            labels.append(numbers)
            for kind, parts in scores.items():
                found = predictor.score(images, texts, kind)  # -> [B, C * M]
                parts.append(found.reshape(len(images), len(names), -1).mean(2))
        if not labels:
            raise ValueError(
                f"No labeled image in split {data.split!r} of "
                f"{data.path}. Received: skipped={dict(data.skipped)}"
            )
        labels = np.concatenate(labels)
        scores = {kind: np.concatenate(scores[kind]) for kind in kinds}
        if predictor.can(BLIND):
            blind = predictor.blind(texts).reshape(len(names), -1).mean(1)
            scores[MINUS_BLIND] = scores[plain] - blind
        return self._report(scores, labels, names, data.skipped)

    def _report(self, scores, labels, names, skipped):
        metrics, rows, confusions = {}, [], {}
        plain = next(iter(scores))
        for kind, values in scores.items():
            found, confusion = figures(values, labels)
            confusions[kind] = confusion.tolist()
            metrics |= named(kind, found, plain)
            rows.append((kind, *found.values()))
        lines = [
            f"{len(labels)} images, {len(names)} classes",
            *table(("score", *found), rows),
            *_confusion_lines(names, confusions[plain]),
            *skipped_lines(skipped),
        ]
        details = {
            "num_images": len(labels),
            "class_names": names,
            "templates": list(self._templates),
            "confusion": confusions[plain],
            "skipped": dict(skipped),
        }
        return Report(metrics, lines, details)


def _confusion_lines(names, confusion):
    """The matrix as a table, if it fits the terminal."""
    if len(names) > _MOST_COLUMNS:
        return []
    rows = [
        (f"{number} {name}", *row)
        for number, (name, row) in enumerate(zip(names, confusion))
    ]
    head = ("true class, by predicted one", *range(len(names)))
    return ["", *table(head, rows)]


def _first(batches, limit):
    """The first `limit` images of batches; all if it is None."""
    left = float("inf") if limit is None else limit
    for batch in batches:
        count = int(min(left, len(batch[0])))
        yield tuple(values[:count] for values in batch)
        left -= count
        if not left:
            return
