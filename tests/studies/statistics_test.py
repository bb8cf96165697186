"""Statistics of studies against closed forms and known laws."""

import numpy as np
import pytest

from cappa_tf.studies import statistics


def test_spread_is_mean_and_sample_deviation():
    assert statistics.spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert statistics.spread([1.0]) == (1.0, None)


def test_bootstrap_of_a_constant_difference_is_certain():
    theirs = np.random.default_rng(0).random((2, 50))
    found = statistics.paired_bootstrap(theirs + 0.25, theirs, samples=500)
    assert found.mean == pytest.approx(0.25)
    assert (found.low, found.high) == pytest.approx((0.25, 0.25))
    # No sample was beyond zero: less than one in so many.
    assert found.p_value == pytest.approx(2 / 500)


def test_bootstrap_of_equal_methods_says_nothing():
    scores = np.random.default_rng(0).random((3, 40))
    assert statistics.paired_bootstrap(scores, scores).p_value == 1.0


def test_bootstrap_interval_is_that_of_the_normal_law():
    random = np.random.default_rng(1)
    ours, theirs = random.random((2, 1, 2_000)) < [[[0.6]], [[0.5]]]
    found = statistics.paired_bootstrap(ours, theirs)
    error = np.std(ours[0].astype(float) - theirs[0]) / np.sqrt(2_000)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    # Paired: the same items in another order would not be compared.
    assert found.mean == pytest.approx(ours.mean() - theirs.mean())


def test_bootstrap_needs_the_same_items():
    with pytest.raises(ValueError, match="of the same items"):
        statistics.paired_bootstrap(np.ones((1, 3)), np.ones((1, 4)))
