"""Softmax regression: the gradient at its minimum is zero."""

import numpy as np
import pytest
from scipy.special import softmax

from cappa_tf.training import softmax_regression
from cappa_tf.training.softmax_regression import SoftmaxRegression

N, D, C = 120, 5, 3


@pytest.fixture(name="data", scope="module")
def _data():
    random = np.random.default_rng(0)
    labels = np.arange(N) % C
    # Of very different scales, one of them constant.
    features = random.normal(size=(N, D)) + random.normal(size=(C, D))[labels]
    features = features * [1e-3, 1.0, 50.0, 1.0, 0.0] + [0, 0, 300, -5, 7]
    return features.astype(np.float32), labels


@pytest.mark.parametrize("decay", [0.0003, 0.1])
def test_the_gradient_of_the_standardised_problem_is_zero(
    data, decay, monkeypatch
):
    """Computed in float64 from the head for plain features."""
    monkeypatch.setattr(softmax_regression, "_CHUNK", 50)  # 50, 50 and 20.
    features, labels = data
    head = SoftmaxRegression(features, labels, C).lbfgs(decay)
    assert head.converged
    x = features.astype(np.float64)
    deviation = x.std(0)
    deviation[deviation < 1e-5] = 1.0
    standard = (x - x.mean(0)) / deviation
    wrong = softmax(head.logits(x), axis=1) - np.eye(C)[labels]
    kernel = head.kernel * deviation[:, None]
    gradient = standard.T @ wrong / N + decay * kernel
    assert np.abs(gradient[:4]).max() < 1e-4
    assert np.abs(wrong.mean(0)).max() < 1e-4
    # It is worth something, and what never changes has no weight.
    assert (head.logits(x).argmax(1) == labels).mean() > 0.7
    assert np.abs(head.kernel[4]).max() * 7 < 1e-3


def test_sgd_finds_the_same_minimum(data):
    problem = SoftmaxRegression(*data, C)
    best = problem.lbfgs(0.01).logits(data[0])
    found = problem.sgd(0.1, 0.01, epochs=60, batch_size=40).logits(data[0])
    assert np.abs(softmax(found, 1) - softmax(best, 1)).max() < 0.02
    again = problem.sgd(0.1, 0.01, epochs=60, batch_size=40).logits(data[0])
    np.testing.assert_array_equal(found, again)


def test_a_start_nearby_takes_fewer_steps(data):
    problem = SoftmaxRegression(*data, C)
    near = problem.lbfgs(0.012)
    alone, started = problem.lbfgs(0.01), problem.lbfgs(0.01, start=near)
    assert started.steps < alone.steps
    np.testing.assert_allclose(
        started.kernel, alone.kernel, rtol=0.02, atol=0.01
    )
