"""Products as TensorFlow fuses them are those of Keras' layers."""

import os
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import context

from cappa_tf.models.linear import linear
from cappa_tf.models.mlp import MLP

D, E, H, C = 6, 10, 2, 5


def has_onednn():
    """Whether TensorFlow uses oneDNN by itself, for bfloat16 as well.

    It depends on the processor, and the setting is read before any test.
    """
    cpus = pathlib.Path("/proc/cpuinfo")
    flags = cpus.read_text() if cpus.exists() else ""
    wanted = os.environ.get("TF_ENABLE_ONEDNN_OPTS", "1") == "1"
    return wanted and "avx512_bf16" in flags


def built(kind, bias, dtype="float32"):
    """A layer with random weights, and the shape of its rows."""
    if kind == "dense":
        layer, row = keras.layers.Dense(E, use_bias=bias, dtype=dtype), (D,)
    else:
        equation, output, axes, row = {
            "heads": ("btd,dhc->bthc", (None, H, C), "hc", (D,)),
            "from heads": ("bthc,hcd->btd", (None, D), "d", (H, C)),
        }[kind]
        layer = keras.layers.EinsumDense(
            equation, output, bias_axes=axes if bias else None, dtype=dtype
        )
    layer.build((None, *row) if kind == "dense" else (None, None, *row))
    random = np.random.RandomState(0)
    layer.set_weights([random.randn(*w.shape) for w in layer.get_weights()])
    return layer, random.randn(4, *row).astype("float32")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["dense", "heads", "from heads"])
def test_equals_the_layer(kind, bias):
    layer, rows = built(kind, bias)
    expected = layer(rows) if kind == "dense" else layer(rows[None])[0]
    found = linear(layer, rows)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "heads"])
def test_has_the_layers_precision(kind):
    """Whoever calls it, as a layer itself does."""
    layer, rows = built(kind, True, "mixed_bfloat16")
    assert linear(layer, rows).dtype == tf.bfloat16


@pytest.mark.parametrize("kind", ["dense", "heads"])
def test_low_rank_updates_count(kind):
    layer, rows = built(kind, True)
    before = linear(layer, rows)
    layer.enable_lora(2)
    layer.lora_kernel_b.assign(tf.random.normal(layer.lora_kernel_b.shape))
    expected = layer(rows) if kind == "dense" else layer(rows[None])[0]
    found = linear(layer, rows)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(found - before).max() > 0.1


def test_quantized_layers_stay_so():
    layer, rows = built("dense", True)
    exact = linear(layer, rows)
    layer.quantize("int8")
    found = linear(layer, rows)
    np.testing.assert_array_equal(found, layer(rows))
    assert 0 < np.abs(found - exact).max() < 0.1


@pytest.fixture
def grappler():
    """The optimizer of graphs, which is off in other tests."""
    option = "disable_meta_optimizer"
    tf.config.optimizer.set_experimental_options({option: False})
    yield
    tf.config.optimizer.set_experimental_options({option: True})


@pytest.mark.skipif(not has_onednn(), reason="needs oneDNN for bfloat16")
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_an_mlp_is_two_fused_products(grappler, dtype):
    """In inference; the gradient needs the input of the gelu."""
    mlp = MLP(32, dtype=dtype)
    mlp.build((2, 3, 8))
    x = tf.random.normal((2, 3, 8))
    context.enable_run_metadata()
    try:
        tf.function(mlp, autograph=False)(x)
        graphs = context.export_run_metadata().function_graphs
    finally:
        context.disable_run_metadata()
    nodes = graphs[-1].post_optimization_graph.node
    products = [n for n in nodes if "MatMul" in n.op]
    assert len(products) == 2
    fused = [list(n.attr["fused_ops"].list.s) for n in products]
    assert [b"BiasAdd", b"GeluApproximate"] in fused
    assert not any(n.op in ("Tanh", "Sigmoid", "AddV2", "Mul") for n in nodes)
