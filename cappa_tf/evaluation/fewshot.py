"""Few-shot classification: ridge regression on frozen features.

The paper's 10-shot results (section 4.1) use this method with l2 = 2^10 and
three seeds. Reference: big_vision evaluators/fewshot_lsr.py. Deviation: float64
in place of float32 (features are float32 in both), which matters only if two
classes tie.

Letters: N examples, D features, C classes, R = min(N, D + 1), M test examples.
"""

import dataclasses
import os

import numpy as np

from cappa_tf.evaluation.evaluator import Evaluator, Report
from cappa_tf.evaluation.features import RESIZES, extract_features
from cappa_tf.evaluation.images import EvaluationImages
from cappa_tf.inference.predictor import FEATURES
from cappa_tf.utils.arguments import check_choice

DEFAULT_SHOTS = (1, 5, 10, 25)
DEFAULT_L2 = (2.0**10,)
# Large, so that its weight (the bias) is hardly penalized.
_BIAS_FEATURE = 100.0


class RidgeRegression:
    """Linear regression to -1 / +1 targets, for many values of l2.

    The eigenvectors of the Gram matrix (of features, or of examples if there
    are fewer of them) are computed once; each l2 then takes two products.

    Args:
        x: float [N, D], features; standardized with their own mean and std.
        y: int [N], classes from 0.
        num_classes: C.
    """

    def __init__(self, x, y, num_classes):
        x, y = np.asarray(x, np.float64), np.asarray(y)
        if x.ndim != 2 or y.shape != x.shape[:1] or not len(y):
            raise ValueError(
                "`x` must be [N, D] and `y` [N] with N at least 1. Received: "
                f"x of shape {x.shape}, y of shape {y.shape}"
            )
        if y.min() < 0 or y.max() >= num_classes:
            raise ValueError(
                f"Classes must be from 0 to {num_classes - 1}. Received: "
                f"{y.min()} to {y.max()}"
            )
        self._mean = x.mean(0)
        self._std = x.std(0) + 1e-5
        x = self._standardized(x)
        targets = np.where(y[:, None] == np.arange(num_classes), 1.0, -1.0)
        if x.shape[0] >= x.shape[1]:
            # (x^T x + l2)^-1 x^T y
            self._eigenvalues, vectors = np.linalg.eigh(x.T @ x)
            self._left = vectors  # [D + 1, R]
            self._right = vectors.T @ (x.T @ targets)  # [R, C]
        else:
            # x^T (x x^T + l2)^-1 y
            self._eigenvalues, vectors = np.linalg.eigh(x @ x.T)
            self._left = x.T @ vectors
            self._right = vectors.T @ targets

    def _standardized(self, x):
        x = (np.asarray(x, np.float64) - self._mean) / self._std
        return np.pad(x, ((0, 0), (0, 1)), constant_values=_BIAS_FEATURE)

    def scores(self, x, l2):
        """Outputs for each class.

        Args:
            x: float [M, D].
            l2: Penalty on the squared weights, above 0.

        Returns:
            float64 [M, C].
        """
        if l2 <= 0:
            raise ValueError(f"`l2` must be above 0. Received: l2={l2}")
        weights = (self._left / (self._eigenvalues + l2)) @ self._right
        return self._standardized(x) @ weights

    def is_right(self, x, y, l2):
        """For which examples x [M, D] the class y [M] scores highest."""
        return self.scores(x, l2).argmax(1) == np.asarray(y)

    def accuracy(self, x, y, l2):
        """Fraction of examples x [M, D] whose class y [M] scores highest."""
        return float(np.mean(self.is_right(x, y, l2)))


def choose_shots(labels, shots, seed, num_classes):
    """Samples the same number of examples from each class.

    For a given seed, a larger sample contains the smaller ones. The samples are
    those of the reference for the same order of examples.

    Args:
        labels: int [N].
        shots: Examples per class (all of a class that has fewer).
        seed: Seed of the sample.
        num_classes: C.

    Returns:
        int [at most C * shots], positions in `labels`, class by class.
    """
    generator = np.random.default_rng(seed)
    chosen = [
        generator.permutation(np.flatnonzero(labels == c))[:shots]
        for c in range(num_classes)
    ]
    return np.concatenate(chosen)


@dataclasses.dataclass(frozen=True)
class Result:
    """Accuracies of one setting.

    Attributes:
        shots: Examples per class.
        l2: The penalty.
        accuracies: Accuracy for each seed.
        items: float [M], for how many of the seeds each example is right.
    """

    shots: int
    l2: float
    accuracies: tuple
    items: np.ndarray = dataclasses.field(repr=False, compare=False)

    @property
    def mean(self):
        """Mean over seeds."""
        return float(np.mean(self.accuracies))

    @property
    def std(self):
        """Standard deviation over seeds (of the population)."""
        return float(np.std(self.accuracies))


def evaluate(
    train, test, shots=DEFAULT_SHOTS, l2=DEFAULT_L2, num_seeds=3, classes=None
):
    """Few-shot accuracies of frozen features.

    Args:
        train: (features float [N, D], labels int [N]) to sample shots from.
        test: (features float [M, D], labels int [M]).
        shots: Values of the number of examples per class.
        l2: Penalties; one decomposition serves all.
        num_seeds: Number of samples, with the seeds 0 ... num_seeds - 1.
        classes: C; by default one more than the largest label.

    Returns:
        List of `Result`, ordered by shots, then by l2.

    Raises:
        ValueError: If there are no examples, or a number is out of range.
    """
    for name, values in (("shots", shots), ("num_seeds", (num_seeds,))):
        if not len(values) or min(values) < 1:
            raise ValueError(
                f"`{name}` must be at least 1. Received: {name}={values}"
            )
    (x, y), (x_test, y_test) = train, test
    x, y, y_test = np.asarray(x), np.asarray(y), np.asarray(y_test)
    if not len(y) or not len(y_test):
        raise ValueError(
            "Few-shot evaluation needs examples for training and for testing. "
            f"Received: {len(y)} and {len(y_test)}"
        )
    classes = classes or int(max(y.max(), y_test.max())) + 1
    results = []
    for count in shots:
        rows = []
        for seed in range(num_seeds):
            chosen = choose_shots(y, count, seed, classes)
            model = RidgeRegression(x[chosen], y[chosen], classes)
            rows.append([model.is_right(x_test, y_test, one) for one in l2])
        results += [
            Result(
                count,
                one,
                tuple(float(np.mean(right)) for right in column),
                np.mean(column, axis=0),
            )
            for one, column in zip(l2, zip(*rows))
        ]
    return results


class Fewshot(Evaluator):
    """Few-shot accuracy of the encoder's features on labeled images.

    Args:
        path: Path of the data, as in `EvaluationImages`.
        train_split: Split to sample the shots from.
        test_split: Split to test on.
        shots: Values of the number of examples per class.
        l2: Penalties.
        num_seeds: Number of samples of the shots.
        resize: "squash" or "resize_small", as in `features.preprocessing`.
        batch_size: Number of images encoded per batch.
        name: Name of the evaluator in the results.
    """

    needs = (FEATURES,)
    on_all_hosts = True

    def __init__(
        self,
        path: str | os.PathLike,
        train_split="train",
        test_split="test",
        *,
        shots: list | tuple = DEFAULT_SHOTS,
        l2: list | tuple = DEFAULT_L2,
        num_seeds=3,
        resize="squash",
        batch_size=64,
        name="fewshot",
    ):
        super().__init__(name)
        check_choice(RESIZES, resize=resize)
        self._data = {
            "train": EvaluationImages(path, train_split),
            "test": EvaluationImages(path, test_split),
        }
        self._settings = (shots, l2, num_seeds)
        self._resize = resize
        self._batch_size = batch_size

    def open(self):
        """Checks that the data can be found."""
        for data in self._data.values():
            data.open()

    def evaluate(self, predictor):
        """Measures the features of a model.

        Returns:
            A `Report` of the mean over seeds. A metric is called `10_shot`, or
            `10_shot_l2_1024` if there is more than one penalty.
        """
        self.check(predictor)
        features, skipped = [], {}
        for name, data in self._data.items():
            features.append(
                extract_features(
                    predictor,
                    data,
                    self._resize,
                    self._batch_size,
                    hosts=predictor.hosts,
                )
            )
            skipped[name] = dict(data.skipped)
        results = evaluate(*features, *self._settings)
        counts = [len(labels) for _, labels in features]
        classes = max(int(labels.max()) for _, labels in features) + 1
        lines = [
            f"{classes} classes, {counts[0]} images to sample from, "
            f"{counts[1]} to test on",
            *_table(results),
        ]
        for split, reasons in skipped.items():
            lines += [
                f"skipped in {split}: {n} x {r}" for r, n in reasons.items()
            ]
        details = {
            "classes": classes,
            "examples": dict(zip(self._data, counts)),
            "skipped": skipped,
            "resize": self._resize,
            "results": [
                {
                    "shots": r.shots,
                    "l2": r.l2,
                    "accuracies": r.accuracies,
                    "mean": r.mean,
                    "std": r.std,
                }
                for r in results
            ],
        }
        several = len({result.l2 for result in results}) > 1
        named = {
            f"{r.shots}_shot" + (f"_l2_{r.l2:g}" if several else ""): r
            for r in results
        }
        return Report(
            {name: result.mean for name, result in named.items()},
            lines,
            details,
            items={name: r.items.tolist() for name, r in named.items()},
        )


def _table(results):
    lines = [f"{'shots':>5}{'l2':>10}{'accuracy':>10}{'+-':>8}   each seed"]
    for result in results:
        seeds = " ".join(f"{a:.2%}" for a in result.accuracies)
        lines.append(
            f"{result.shots:>5}{result.l2:>10g}{result.mean:>10.2%}"
            f"{result.std:>8.2%}   {seeds}"
        )
    return lines
