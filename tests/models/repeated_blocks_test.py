"""Equal blocks are traced once, which changes nothing but the graph."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from cappa_tf.models import repeated_blocks
from cappa_tf.models.captioner import Captioner
from cappa_tf.models.text_decoder import TextDecoder
from cappa_tf.models.vision_encoder import VisionEncoder

SIZES = {"hidden_dim": 8, "num_heads": 2, "mlp_dim": 12}


def make(layers=3, precision="float32", dropout=0.0, **options):
    """A captioner whose head is random, and a batch for it."""
    keras.utils.set_random_seed(0)
    model = Captioner(
        VisionEncoder(
            **SIZES,
            num_layers=layers,
            patch_size=4,
            image_size=8,
            dropout=dropout,
            dtype=precision,
        ),
        TextDecoder(
            11,
            5,
            **SIZES,
            num_layers=layers,
            dropout=dropout,
            dtype=precision,
            **options,
        ),
        dtype=precision,
    )
    model.build()
    kernel = model.text_decoder.head_weights[0]
    kernel.assign(tf.random.stateless_normal(kernel.shape, (1, 2)))
    return model


BATCH = {
    "image": tf.random.stateless_uniform((2, 8, 8, 3), (3, 4)),
    "labels": tf.constant([[[5, 6, 1, 0, 0]], [[7, 8, 9, 5, 1]]]),
    "index": tf.constant([0, 1], tf.int64),
}


def gradients_of(model, jit_compile=None):
    """A traced function that returns loss and gradients of `BATCH`."""

    @tf.function(autograph=False, jit_compile=jit_compile)
    def gradients():
        values = [v.value for v in model.trainable_variables]
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model.example_losses(BATCH, True).loss)
        gradients = tape.gradient(loss, values, None, "zero")
        return loss, [tf.convert_to_tensor(g) for g in gradients]

    return gradients.get_concrete_function()


def functions_in(traced):
    return [
        f.signature.name for f in traced.graph.as_graph_def().library.function
    ]


def nodes(traced):
    graph = traced.graph.as_graph_def()
    return len(graph.node) + sum(
        len(f.node_def) for f in graph.library.function
    )


@pytest.mark.parametrize(
    "options, tolerance",
    [
        ({}, 1e-6),
        # TensorFlow optimizes each graph its own way, which rounds differently;
        # the step between neighbors of bfloat16 is up to 0.8%.
        ({"precision": "mixed_bfloat16"}, 2e-2),
        ({"remat": True, "position_embedding": "rotary"}, 1e-6),
    ],
    ids=["float32", "bfloat16", "remat, rotary"],
)
def test_gradients_are_those_of_each_block(options, tolerance, monkeypatch):
    model = make(**options)
    shared = gradients_of(model)
    monkeypatch.setattr(repeated_blocks, "_can_share", lambda blocks: False)
    plain = gradients_of(model)
    assert nodes(shared) < nodes(plain)
    (loss, found), (wanted_loss, wanted) = shared(), plain()
    np.testing.assert_allclose(loss, wanted_loss, rtol=tolerance)
    for variable, a, b in zip(
        model.trainable_variables, found, wanted, strict=True
    ):
        limit = tolerance * max(1.0, float(tf.reduce_max(tf.abs(b))))
        np.testing.assert_allclose(a, b, atol=limit, err_msg=variable.path)


def test_the_graph_does_not_grow_with_equal_blocks():
    """A further block adds its weights' reads and a few calls."""
    sizes = [nodes(gradients_of(make(layers))) for layers in (2, 3, 4)]
    weights = [len(make(layers).trainable_variables) for layers in (2, 3)]
    more = sizes[1] - sizes[0]
    assert sizes[2] - sizes[1] == more
    assert more < 7 * (weights[1] - weights[0])


def test_blocks_that_differ_are_traced_each_as_all_are_under_xla():
    for traced in (
        gradients_of(make(dropout=0.5)),
        gradients_of(make(), jit_compile=True),
    ):
        names = functions_in(traced)
        assert not any("with_weights" in name for name in names)
    assert any(
        "with_weights" in name for name in functions_in(gradients_of(make()))
    )
