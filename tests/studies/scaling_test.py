"""Power laws of sizes and lengths: found, bounded, and what they predict."""

import itertools

import numpy as np
import pytest

from cappa_tf.studies import scaling
from cappa_tf.studies.scaling import PowerLaw
from cappa_tf.studies.study import Method, Study
from cappa_tf.studies.table import Entry, Group

SIZES, LENGTHS = (1e6, 2e6, 4e6), (1e3, 3e3, 9e3, 27e3)


def test_a_power_law_is_found_and_its_bands_cover_it():
    x = np.geomspace(1e3, 1e6, 8)[:, None]
    exponents, values = 0, 0
    for seed in range(40):
        noise = np.exp(np.random.default_rng(seed).normal(0, 0.02, 8))
        law = PowerLaw.fit(x, 5 * x[:, 0] ** -0.3 * noise, samples=500)
        ((low, high),) = law.exponent_ranges
        assert low < law.exponents[0] < high and high - low < 0.05
        value, below, above = law.at([[1e7]])
        assert below[0] < value[0] < above[0]
        exponents += low < -0.3 < high
        values += below[0] < 5 * 1e7**-0.3 < above[0]
    # 95% of 40, but the residuals of 8 points are few to sample from.
    assert exponents >= 32 and values >= 32


def test_two_factors_are_told_apart():
    x = np.array([*itertools.product(SIZES, LENGTHS)])
    law = PowerLaw.fit(x, 7 * x[:, 0] ** -0.2 * x[:, 1] ** -0.6)
    assert law.exponents == pytest.approx((-0.2, -0.6))
    assert law.at([[8e6, 81e3]])[0] == pytest.approx(7 * 8e6**-0.2 * 81e3**-0.6)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([[1], [2]], [1, 2]),
        ([[1], [1], [2]], [1, 2, 3]),
        ([[1], [2], [3]], [1, 0, 1]),
        # The size determines the length.
        ([[1, 2], [2, 4], [3, 6], [4, 8]], [4, 3, 2, 1]),
        ([[1, 2], [1, 4], [1, 6], [1, 8]], [4, 3, 2, 1]),
    ],
)
def test_too_few_or_impossible_points_are_refused(x, y):
    with pytest.raises(ValueError, match="power law"):
        PowerLaw.fit(x, y)


def groups(method, sizes, lengths, metric, error):
    """Groups whose cells know FLOPs and images only."""

    class Row:
        def __init__(self, flops, images):
            self.cell = self
            self.flops, self.images = flops, images

    found = []
    for (name, size), images in itertools.product(sizes.items(), lengths):
        group = Group("", method, name, [Row(size * images, images)])
        group.entries[metric] = Entry(error(size, images), None, 1)
        found.append(group)
    return found


def study_of(method):
    return Study(name="x", methods=[method], batch_size=1, images=10)


def test_sizes_and_lengths_predict_the_next_size():
    method = Method(name="ours", gin_files=["ours.gin"])
    sizes = dict(zip("abc", SIZES))

    def error(size, images):
        return 9 * size**-0.25 * images**-0.5

    (found,) = scaling.scalings(
        study_of(method),
        groups(method, sizes, LENGTHS, "nll_per_token", error),
        ["nll_per_token"],
    )
    prediction = found.predict()
    assert prediction["at"] == {
        "FLOPs an image": pytest.approx(8e6),
        "images": 27e3,
    }
    assert prediction["flops"] == pytest.approx(8e6 * 27e3)
    assert prediction["exponents"] == {
        "FLOPs an image": pytest.approx(-0.25),
        "images": pytest.approx(-0.5),
    }
    assert prediction["predicted"] == pytest.approx(error(8e6, 27e3))


def test_of_a_better_metric_the_error_follows_the_law():
    method = Method(name="ours", gin_files=["ours.gin"])
    (found,) = scaling.scalings(
        study_of(method),
        groups(
            method,
            {"a": 2e6},
            LENGTHS,
            "accuracy",
            lambda size, images: 1 - (size * images) ** -0.1,
        ),
        ["accuracy"],
    )
    prediction = found.predict()
    flops = 4 * 2e6 * 27e3
    assert prediction["at"] == {"FLOPs of training": pytest.approx(flops)}
    assert prediction["predicted"] == pytest.approx(1 - flops**-0.1)
    low, high = prediction["interval"]
    assert low <= prediction["predicted"] + 1e-9 and high >= low


def test_a_size_is_one_whatever_the_length():
    """The FLOPs of a run, divided by its images, differ in the last digit."""
    method = Method(name="ours", gin_files=["ours.gin"])
    found = groups(
        method, {"a": 0.1}, (3, 7, 30, 49), "nll_per_token", lambda *_: 1.0
    )
    sizes = {group.flops / group.images for group in found}
    assert len(sizes) > 1
    (one,) = scaling.scalings(study_of(method), found, ["nll_per_token"])
    assert one.factors == ("FLOPs of training",)
