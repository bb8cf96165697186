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


def test_bfloat16_is_no_worse_than_keras():
    x = np.linspace(-6, 6, 1_001).astype("float32")
    rounded = tf.cast(x, tf.bfloat16)
    exact = keras.ops.gelu(tf.cast(rounded, tf.float64), approximate=True)

    def error(activation):
        found = activation(rounded)
        assert found.dtype == tf.bfloat16
        return np.abs(tf.cast(found, tf.float64) - exact).mean()

    assert error(block_style.gelu_tanh) <= error(
        lambda x: keras.ops.gelu(x, approximate=True)
    )


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
    # That of the result and that of the gradient.
    assert sum(op.type == "Sigmoid" for op in operations) == 2
    assert not any(op.type in ("Pow", "SigmoidGrad") for op in operations)
