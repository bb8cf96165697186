"""The gelu of the blocks is Keras' approximate gelu, with its gradient."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from cappa_tf.models import block_style


def with_gradient(activation, x):
    """An activation's values at x, and the gradient of their weighted sum."""
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = activation(x)
        total = tf.reduce_sum(y * tf.cast(tf.range(tf.size(x)), y.dtype))
    return y, tape.gradient(total, x)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_equals_keras(jit_compile):
    x = np.linspace(-12, 12, 241).astype("float32")
    expected = with_gradient(
        lambda x: keras.ops.gelu(x, approximate=True), x.astype("float64")
    )
    computed = tf.function(
        lambda: with_gradient(block_style.gelu_tanh, x), jit_compile=jit_compile
    )()
    for one, other in zip(computed, expected):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-6)


def test_bfloat16_is_about_as_exact_as_keras():
    x = tf.cast(np.linspace(-6, 6, 4_001), tf.bfloat16)

    def keras_gelu(x):
        return keras.ops.gelu(x, approximate=True)

    def results(activation, x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = activation(x)
        gradient = tape.gradient(y, x)
        assert y.dtype == gradient.dtype == x.dtype
        return [tf.cast(found, tf.float64) for found in (y, gradient)]

    exact = results(keras_gelu, tf.cast(x, tf.float64))
    own, theirs = (
        [np.abs(a - b) for a, b in zip(results(f, x), exact)]
        for f in (block_style.gelu_tanh, keras_gelu)
    )
    for ours, other in zip(own, theirs):
        assert ours.mean() <= 1.1 * other.mean()
        assert ours.max() <= 1.5 * other.max()


def test_far_values_have_finite_gradients():
    x = np.array([-1e4, -50.0, 50.0, 1e4], "float32")
    y, gradient = with_gradient(block_style.gelu_tanh, x)
    np.testing.assert_array_equal(y, [0, 0, 50, 1e4])
    np.testing.assert_array_equal(gradient, [0, 0, 2, 3])


def test_only_its_input_is_kept_for_the_gradient():
    graph = tf.function(
        lambda x: tf.gradients(block_style.gelu_tanh(x), x),
        input_signature=[tf.TensorSpec([4, 8])],
        autograph=False,
    )
    operations = graph.get_concrete_function().graph.get_operations()
    # That of the result and those of the gradient.
    assert sum(op.type == "Sigmoid" for op in operations) == 3
    assert not any(op.type in ("Pow", "SigmoidGrad") for op in operations)
