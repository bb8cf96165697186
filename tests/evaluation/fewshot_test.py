"""Few-shot accuracies equal those of the normal equations, for every l2."""

import numpy as np
import pytest
from conftest import shared_reference

from cappa_tf.evaluation import fewshot

GRID = 2.0 ** np.arange(-10, 21)


def random_task(examples, features=13, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, features))
    y = np.arange(examples) % classes
    x = centres[y] + 2 * rng.normal(size=(examples, features))
    return x.astype(np.float32) * rng.uniform(0.1, 9, features), y


@pytest.mark.parametrize("examples", [8, 60], ids=["wide", "tall"])
def test_scores_solve_the_normal_equations(examples):
    x, y = random_task(examples)
    x_test, _ = random_task(30, seed=1)
    model = fewshot.RidgeRegression(x, y, 4)

    def features(z):
        z = (z - x.mean(0)) / (x.std(0) + 1e-5)
        return np.hstack([z, np.full((len(z), 1), 100.0)])

    a, targets = features(x), 2.0 * np.eye(4)[y] - 1
    for l2 in GRID:
        gram = a.T @ a + l2 * np.eye(a.shape[1])
        weights = np.linalg.solve(gram, a.T @ targets)
        expected = features(x_test) @ weights
        found = model.scores(x_test, l2)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", ["wide", "tall"])
def test_accuracies_of_the_authors(shape):
    arrays = np.load(shared_reference("cappa_tiny.npz"))
    x, y, x_test, y_test, expected = (
        arrays[f"fewshot/{shape}/{name}"]
        for name in (
            "x",
            "y",
            "x_test",
            "y_test",
            "accuracy_l2_2pow_-10_to_20",
        )
    )
    model = fewshot.RidgeRegression(x, y, int(y.max()) + 1)
    for l2, wanted in zip(GRID, expected):
        top = np.sort(model.scores(x_test, l2), axis=1)[:, -2:]
        # Best two of the scores (of order 1) that the reference's float32,
        # with 100^2 in its Gram matrix, cannot tell apart: either may win.
        ties = np.sum(top[:, 1] - top[:, 0] < 1e-4)
        found = model.accuracy(x_test, y_test, l2)
        assert abs(found - wanted) * len(y_test) <= ties + 1e-3, l2


def test_shots_are_drawn_by_class_and_nested():
    labels = np.array([1, 0, 0, 1, 0, 1, 0, 2])
    few = fewshot.choose_shots(labels, 2, seed=5, num_classes=3)
    assert [list(labels[few])] == [[0, 0, 1, 1, 2]]  # Class 2 has only one.
    more = fewshot.choose_shots(labels, 3, seed=5, num_classes=3)
    assert set(few) < set(more)
    assert len(set(few)) == len(few)
    again = fewshot.choose_shots(labels, 2, seed=5, num_classes=3)
    np.testing.assert_array_equal(few, again)
    # The reference's generator: NumPy's default one, class after class.
    rng = np.random.default_rng(5)
    np.testing.assert_array_equal(few[:2], rng.permutation([1, 2, 4, 6])[:2])


def test_evaluation_covers_shots_penalties_and_seeds():
    train, test = random_task(200), random_task(100, seed=0)
    results = fewshot.evaluate(train, test, (1, 20), (1.0, 1024.0), 4)
    settings = [(r.shots, r.l2, len(r.accuracies)) for r in results]
    assert settings == [
        (1, 1.0, 4),
        (1, 1024.0, 4),
        (20, 1.0, 4),
        (20, 1024.0, 4),
    ]
    x, y = train
    chosen = fewshot.choose_shots(y, 20, 3, 4)
    model = fewshot.RidgeRegression(x[chosen], y[chosen], 4)
    assert results[2].accuracies[3] == model.accuracy(*test, 1.0)
    assert results[2].mean == pytest.approx(np.mean(results[2].accuracies))
    assert results[2].mean > results[0].mean  # More shots, more accurate.


def test_what_makes_no_sense_is_refused():
    x, y = random_task(8)
    with pytest.raises(ValueError, match="l2"):
        fewshot.RidgeRegression(x, y, 4).scores(x, 0.0)
    with pytest.raises(ValueError, match="Classes"):
        fewshot.RidgeRegression(x, y, 3)
    with pytest.raises(ValueError, match="shots"):
        fewshot.evaluate((x, y), (x, y), shots=(0,))
    with pytest.raises(ValueError, match="8 and 0"):
        fewshot.evaluate((x, y), (x[:0], y[:0]))
