"""How metrics follow size and length: power laws, and what they predict.

Of a study with several sizes and several lengths the law has two factors,

    error = scale * (FLOPs an image) ** a * (images) ** b,

as a small model that is trained for long and a large one that is trained for a
short time differ at equal FLOPs. Otherwise the factor is the FLOPs of training.
"""

import dataclasses
import itertools

import numpy as np

from cappa_tf.studies.results import lower_is_better
from cappa_tf.studies.statistics import LEVEL

FLOPS, SIZE, IMAGES = "FLOPs of training", "FLOPs an image", "images"
_QUANTILES = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """y = scale * product of x_i ** exponent_i, fitted in logarithms.

    Attributes:
        scale: Factor.
        exponents: F of them, negative where y falls with x.
        exponent_ranges: Their 95% confidence intervals.
        samples: float [S, 1 + F], (log scale, exponents) of resampled fits.
    """

    scale: float
    exponents: tuple
    exponent_ranges: tuple
    samples: np.ndarray

    @classmethod
    def fit(cls, x, y, seed=0, samples=2_000):
        """Fits points by least squares; resampled points give the bands.

        Args:
            x: float [N, F], above 0.
            y: float [N], above 0.
            seed: Seed of the samples.
            samples: S.

        Raises:
            ValueError: If the places are too few or too much alike to tell the
                factors apart, or a number is not above 0.
        """
        x, y = (np.asarray(values, np.float64) for values in (x, y))
        num_factors = x.shape[1]
        if (x <= 0).any() or (y <= 0).any():
            raise ValueError(
                "A power law needs numbers above 0. Received: "
                f"x={x.tolist()}, y={y.tolist()}"
            )
        design = _design(x)
        different = len(np.unique(x, axis=0))
        rank = np.linalg.matrix_rank(design)
        if different < num_factors + 2 or rank < num_factors + 1:
            raise ValueError(
                f"A power law of {num_factors} factors needs at least "
                f"{num_factors + 2} places that differ in all of them. "
                f"Received: x={x.tolist()}"
            )
        y = np.log(y)
        found = _solve(design, y)
        # Residuals are sampled, as there are few places: leaving one of them
        # out would often leave too few.
        predicted = design @ found
        degrees = max(1, len(y) - num_factors - 1)
        residuals = (y - predicted) * np.sqrt(len(y) / degrees)
        random = np.random.default_rng(seed)
        noise = random.choice(residuals, size=(samples, len(y)))
        again = _solve(design, (predicted + noise).T).T
        ranges = np.quantile(again[:, 1:], _QUANTILES, axis=0)
        return cls(
            float(np.exp(found[0])),
            tuple(found[1:].tolist()),
            tuple(map(tuple, ranges.T.tolist())),
            again,
        )

    def at(self, x):
        """Value, lower and upper bound (95%) of the law at float [M, F]."""
        design = _design(np.asarray(x, np.float64))
        value = np.exp(design @ [np.log(self.scale), *self.exponents])
        lines = np.exp(self.samples @ design.T)
        return value, *np.quantile(lines, _QUANTILES, axis=0)


def _design(x):
    """Rows (1, logarithms of x) of the regression, [N, 1 + F]."""
    return np.concatenate([np.ones([len(x), 1]), np.log(x)], 1)


def _solve(design, y):
    return np.linalg.lstsq(design, y, rcond=None)[0]


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How a metric of a method follows size and length.

    Attributes:
        metric: Name of the metric.
        method: Name of the method.
        index: Its number in the study.
        factors: Names of the factors of the law.
        sizes: Name of the size of each point.
        places: Tuple of the factors of each point.
        errors: The metric if lower is better, 1 minus it otherwise.
        law: `PowerLaw` of the two.
    """

    metric: str
    method: str
    index: int
    factors: tuple
    sizes: list
    places: list
    errors: list
    law: PowerLaw

    @property
    def next_place(self):
        """Where to predict.

        With two factors, the next size at the greatest length, in the mean
        ratio of the sizes that there are; else four times the most FLOPs.
        """
        if self.factors == (FLOPS,):
            return (4.0 * max(x for (x,) in self.places),)
        sizes = sorted({size for size, _ in self.places})
        ratio = (sizes[-1] / sizes[0]) ** (1 / (len(sizes) - 1))
        return sizes[-1] * ratio, max(images for _, images in self.places)

    def predict(self):
        """What the law says of `next_place`, JSON-able."""
        place = self.next_place
        value, low, high = (float(v[0]) for v in self.law.at([place]))
        if not lower_is_better(self.metric):
            value, low, high = 1 - value, 1 - high, 1 - low
        names = self.factors
        return {
            "method": self.method,
            "metric": self.metric,
            "exponents": dict(zip(names, self.law.exponents)),
            "exponent_ranges": dict(zip(names, self.law.exponent_ranges)),
            "at": dict(zip(names, place)),
            "flops": float(np.prod(place)),
            "predicted": value,
            "interval": (low, high),
        }


def scalings(study, found, metrics):
    """`Scaling`s of every metric and method with enough different points.

    Args:
        study: The `Study`.
        found: List of `table.Group`.
        metrics: Names of metrics.
    """
    scalings = []
    for metric, (index, method) in itertools.product(
        metrics, enumerate(study.methods)
    ):
        groups = [
            group
            for group in found
            if group.method is method
            and group.flops
            and metric in group.entries
        ]
        errors = [group.entries[metric].mean for group in groups]
        if not lower_is_better(metric):
            errors = [1.0 - value for value in errors]
        factors, places = _places(groups)
        try:
            law = PowerLaw.fit(np.reshape(places, [-1, len(factors)]), errors)
        except ValueError:
            continue  # Too few points, or errors of zero.
        sizes = [group.size for group in groups]
        scalings.append(
            Scaling(
                metric, method.name, index, factors, sizes, places, errors, law
            )
        )
    return scalings


def _places(groups):
    """Names of the factors, and their values for each group."""
    # One size is one number, whatever the length that it was divided by.
    places = [
        (float(f"{group.flops / group.images:.9g}"), group.images)
        for group in groups
    ]
    if all(len(set(values)) > 1 for values in zip(*places)) and places:
        return (SIZE, IMAGES), places
    return (FLOPS,), [(size * images,) for size, images in places]
