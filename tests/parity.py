"""What parity tests share: losses and gradients of one objective by name."""

import functools

import numpy as np
import tensorflow as tf

from cappa_tf.export import big_vision
from cappa_tf.export import big_vision_names as names

MODES = ("autoregressive", "parallel")
KEY_BIAS = "/key/bias"


def compiled(function, jit_compile):
    """The function as a graph, with or without XLA."""
    return tf.function(function, jit_compile=jit_compile, autograph=False)


def batch_of(image, text):
    """A training batch; with all examples of one objective, index is any."""
    return {
        "image": tf.constant(image),
        "labels": tf.constant(text, tf.int32),
        "index": tf.range(len(text), dtype=tf.int64),
    }


def set_mode(captioner, mode):
    """Makes every example autoregressive or parallel."""
    captioner.masked_pred_prob = float(mode == "parallel")


def loss_and_gradients(captioner, batch):
    """The training loss and its dense gradients."""
    with tf.GradientTape() as tape:
        parts = captioner.compute_losses(batch, training=True)
        loss = tf.reduce_mean(parts["loss"])
    found = tape.gradient(loss, captioner.trainable_variables)
    return loss, [tf.convert_to_tensor(g) for g in found]


def gradients_by_name(captioner, batch, mode, jit_compile=False):
    """Loss, and a dict of gradients with big_vision's names."""
    set_mode(captioner, mode)
    step = functools.partial(loss_and_gradients, captioner)
    loss, found = compiled(step, jit_compile)(batch)
    found = [g.numpy() for g in found]
    return float(loss), by_name(captioner, found)


def by_name(captioner, values):
    """Values in the order of `trainable_variables` by big_vision's names."""
    numbers = {id(v): i for i, v in enumerate(captioner.trainable_variables)}
    return {
        name: values[numbers[id(variable)]]
        for name, variable in variables_by_name(captioner).items()
    }


def variables_by_name(captioner):
    """Every variable of a captioner by its name in big_vision."""
    encoder, decoder = captioner.vision_encoder, captioner.text_decoder
    vision = names.vision_rows(
        num_layers=encoder.num_layers,
        learned=encoder.position_embedding == "learned",
    )
    text = names.text_rows(
        num_layers=decoder.num_layers,
        learned=decoder.position_embedding == "learned",
        use_bias=decoder.use_bias,
    )
    found = {}
    for rows, model, prefix in (
        (vision, encoder, "encoder/"),
        (text, decoder, ""),
    ):
        for row, (variable,) in big_vision.paired(rows, model):
            found[prefix + row.name] = variable
    return found


def check_gradients(found, expected):
    """The tolerance: 1e-4 of each array's norm, or of 1e-4 of all.

    The encoder's key biases have a true gradient of zero (softmax ignores
    what is added to all its inputs): rounding noise, within the same bound.
    """
    assert found.keys() == expected.keys()
    total = np.sqrt(sum(np.sum(np.square(g)) for g in expected.values()))
    for name, wanted in expected.items():
        difference = np.linalg.norm(found[name] - wanted)
        norm = np.linalg.norm(wanted)
        assert difference <= 1e-4 * max(norm, 1e-4 * total), name
