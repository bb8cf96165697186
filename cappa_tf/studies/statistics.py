"""Statistics of a study: spread, paired bootstrap, power laws."""

import dataclasses

import numpy as np

_SAMPLES = 10_000
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Difference:
    """How a method differs from the reference in one metric.

    Attributes:
        mean: Difference of the means over the test items.
        low: Lower bound of its 95% confidence interval.
        high: Upper bound.
        p_value: Two-sided, of no difference.
        items: Number of test items.
    """

    mean: float
    low: float
    high: float
    p_value: float
    items: int


def spread(values):
    """(mean, standard deviation over seeds or None for one) of values."""
    values = np.asarray(values, np.float64)
    deviation = float(values.std(ddof=1)) if len(values) > 1 else None
    return float(values.mean()), deviation


def paired_bootstrap(ours, theirs, seed=0, samples=_SAMPLES):
    """Compares two methods on the same test items.

    Items are sampled with replacement; a method's score of an item is the mean
    over its seeds. So it says whether the difference would hold on other items
    of this kind, and not whether it would with other seeds: see `spread`.

    Args:
        ours: float [seeds, items], or another number of seeds than `theirs`.
        theirs: float [seeds, items], of the reference.
        seed: Seed of the samples.
        samples: Their number.

    Returns:
        `Difference`, ours minus theirs.
    """
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    if ours.ndim != 2 or ours.shape[1:] != theirs.shape[1:] or not ours.size:
        raise ValueError(
            "Scores must be [seeds, items], of the same items. Received: "
            f"{ours.shape} and {theirs.shape}"
        )
    differences = ours.mean(0) - theirs.mean(0)
    count = len(differences)
    random = np.random.default_rng(seed)
    means = np.empty(samples)
    # A few samples at a time, for memory.
    step = max(1, 10_000_000 // count)
    for start in range(0, samples, step):
        size = min(step, samples - start)
        chosen = random.integers(count, size=(size, count))
        means[start : start + size] = differences[chosen].mean(1)
    tail = min((means <= 0).mean(), (means >= 0).mean())
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Difference(
        float(differences.mean()),
        float(low),
        float(high),
        # No sample beyond zero says less than one in so many, not zero.
        float(min(1.0, 2 * max(tail, 1 / samples))),
        count,
    )
