"""Muon: matrices are orthogonalized, the rest is AdamW's."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from harness import check_optimizer, relative_difference

from cappa_tf.training.optimizers.adamw import AdamW
from cappa_tf.training.optimizers.muon import Muon, orthogonalized

PLAIN = {"schedule": None, "weight_decay": 0.0, "global_clip_norm": None}


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def kernel(layer="block/mlp/expand", shape=(6, 8)):
    variable = keras.Variable(random(*shape), name="kernel")
    variable._path = f"{layer}/kernel"
    return variable


@pytest.mark.parametrize(
    "shape", [(48, 20), (20, 48), (24, 4, 6), (4, 6, 24), (32, 1)]
)
def test_all_singular_values_are_near_the_root_of_the_larger_side(shape):
    rows = shape[0] if shape[0] >= shape[-1] else np.prod(shape[:-1])
    given = random(*shape).reshape(rows, -1)
    left, values, right = np.linalg.svd(given, full_matrices=False)
    given = (left * np.geomspace(1.0, 0.05, len(values))) @ right
    found = orthogonalized(tf.constant(given.reshape(shape), "float32")).numpy()
    assert found.shape == shape
    values = np.linalg.svd(found.reshape(rows, -1), compute_uv=False)
    values /= np.sqrt(max(given.shape))
    assert values.min() > 0.6 and values.max() < 1.3
    # The size of an update does not depend on the shape.
    assert np.sqrt(np.mean(found**2)) == pytest.approx(1.0, abs=0.35)


def test_it_is_the_nearest_orthogonal_matrix():
    """That of the same singular vectors, by its inner product with them."""
    matrix = random(12, 30)
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    found = orthogonalized(tf.constant(matrix)).numpy() / np.sqrt(30)
    inside = left.T @ found @ right.T
    np.testing.assert_allclose(
        inside, np.diag(np.diag(inside)), atol=1e-5, rtol=0
    )
    np.testing.assert_array_equal(
        orthogonalized(tf.zeros([3, 4])), np.zeros([3, 4])
    )


@pytest.mark.parametrize("jit_compile", [False, True])
def test_equals_a_float64_rewrite(jit_compile):
    optimizer = Muon(0.1, momentum=0.9, **PLAIN)
    variable = kernel()
    wanted = variable.numpy().astype(np.float64)
    optimizer.build([variable])
    apply = tf.function(optimizer.apply, jit_compile=jit_compile)
    average = 0.0
    for t in range(1, 5):
        g = random(6, 8, seed=t)
        apply([tf.constant(g)])
        average = 0.9 * average + 0.1 * g.astype(np.float64)
        x = 0.9 * average + 0.1 * g
        x /= np.linalg.norm(x)
        for _ in range(5):
            s = x @ x.T
            x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
        wanted -= 0.1 * 0.2 * np.sqrt(8) * x
    assert relative_difference(variable, wanted) < 1e-5


def test_what_is_no_matrix_is_updated_as_by_adamw():
    options = {"learning_rate": 0.01, "weight_decay": 0.1}
    optimizers = [Muon(**options), AdamW(**options)]
    values = []
    for optimizer in optimizers:
        variables = [
            kernel("text_decoder/head"),
            kernel("vision_encoder/patches", (2, 2, 3, 5)),
            keras.Variable(random(7), name="bias"),
            keras.Variable(random(9, 4), name="embeddings"),
        ]
        optimizer.build(variables)
        for step in range(3):
            optimizer.apply(
                [tf.constant(random(*v.shape, seed=step)) for v in variables]
            )
        values.append([v.numpy() for v in variables])
    for ours, theirs in zip(*values):
        np.testing.assert_array_equal(ours, theirs)


def test_a_matrix_has_one_moment_and_other_kernels_have_two():
    optimizer = Muon()
    matrix, head = kernel(), kernel("text_decoder/head")
    optimizer.build([matrix, head])
    assert len(optimizer.state_of(0)) == 1
    assert len(optimizer.state_of(1)) == 2
    optimizer = Muon(adamw_layers=["expand"])
    optimizer.build([matrix, head])
    assert len(optimizer.state_of(0)) == 2
    assert len(optimizer.state_of(1)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, "`momentum` must be"),
        ({"adamw_layers": "head"}, "adamw_layers"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Muon(**options)


def test_contract(tmp_path):
    check_optimizer(Muon, {"learning_rate": 0.01}, tmp_path)
