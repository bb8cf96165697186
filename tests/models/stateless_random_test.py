"""Random numbers depend on seed, example and place only, and are uniform."""

import numpy as np
import pytest
import tensorflow as tf

from cappa_tf.models import stateless_random


def _seeds(seed, index):
    return stateless_random.example_seeds(seed, tf.constant(index, tf.int64))


def test_an_example_draws_the_same_in_any_batch():
    together = stateless_random.uniform(_seeds(3, [5, 6, 2**40]), (4, 2), 9)
    alone = stateless_random.uniform(_seeds(3, [2**40]), (4, 2), 9)
    np.testing.assert_array_equal(together[2:], alone)


def test_compiled_draws_are_the_same():
    def draw():
        return stateless_random.uniform(_seeds(3, [0, 7, 2**33]), (64,), 1)

    np.testing.assert_array_equal(draw(), tf.function(draw, jit_compile=True)())


@pytest.mark.parametrize(
    "other",
    [
        lambda: stateless_random.uniform(_seeds(1, range(2000)), (16,), 0),
        lambda: stateless_random.uniform(_seeds(0, range(2000)), (16,), 1),
        lambda: stateless_random.uniform(
            _seeds(0, range(2000, 4000)), (16,), 0
        ),
    ],
    ids=["seed", "salt", "examples"],
)
def test_other_seed_salt_or_examples_draw_independently(other):
    a = (
        stateless_random.uniform(_seeds(0, range(2000)), (16,), 0)
        .numpy()
        .ravel()
    )
    b = other().numpy().ravel()
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.02


def test_draws_are_uniform_in_every_direction():
    """32,000 samples: 10 bins within 5 sigma; uncorrelated neighbors."""
    draws = stateless_random.uniform(_seeds(0, range(2000)), (16,), 0).numpy()
    counts = np.histogram(draws, 10, (0, 1))[0]
    assert np.all(abs(counts - 3200) < 5 * np.sqrt(3200))
    for a, b in ((draws[:-1], draws[1:]), (draws[:, :-1], draws[:, 1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.03


def test_dropout_keeps_the_mean_and_drops_its_share():
    x = tf.ones((100, 400))
    dropped = stateless_random.dropout(
        x, 0.25, _seeds(0, range(100)), 3
    ).numpy()
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert abs(np.mean(dropped == 0) - 0.25) < 0.01


def test_dropout_without_seeds_takes_those_of_its_generator():
    layer = stateless_random.StatelessDropout(0.5, "here")
    dropped = [layer(tf.ones((8, 64)), training=True) for _ in range(3)]
    masks = np.array(dropped) > 0
    assert len({mask.tobytes() for mask in masks.reshape(-1, 64)}) == 3 * 8
    assert abs(masks.mean() - 0.5) < 0.05
    assert not layer.weights
