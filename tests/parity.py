"""Helpers of parity tests: losses and gradients of one objective by name."""

import numpy as np
import tensorflow as tf

from cappa_tf.saving import big_vision
from cappa_tf.saving import big_vision_names as names
from cappa_tf.training.gradients import TaskGradients

MODES = ("autoregressive", "parallel")
KEY_BIAS = "/key/bias"


def compiled(function, jit_compile):
    """The function under XLA, or unchanged (eager, without a graph)."""
    if not jit_compile:
        return function
    return tf.function(function, jit_compile=True, autograph=False)


def batches_of(captioner, image, text):
    """Training batches in which every example has the same objective.

    Args:
        captioner: Captioner; half of its examples become parallel.
        image: [B, H, W, 3].
        text: int [B, L].

    Returns:
        Dict from mode to batch: positions in the stream for which all draws
        fall that way.
    """
    captioner.masked_pred_prob = 0.5
    many = {
        "labels": tf.tile(text[:1, None], [64, 1, 1]),
        "index": tf.range(64),
    }
    many["image"] = tf.tile(image[:1], [64, 1, 1, 1])
    drawn = captioner.compute_losses(many, training=True)["parallel"]
    batches = {}
    for mode in MODES:
        wanted = np.flatnonzero(drawn == float(mode == "parallel"))
        assert len(wanted) >= len(text)
        batches[mode] = {
            "image": tf.constant(image),
            "labels": tf.constant(text[:, None], tf.int32),
            "index": tf.constant(wanted[: len(text)], tf.int64),
        }
    return batches


def loss_and_gradients(captioner, batch):
    """The training loss and its dense gradients."""
    with tf.GradientTape() as tape:
        parts = captioner.compute_losses(batch, training=True)
        loss = tf.reduce_mean(parts["loss"])
    found = tape.gradient(loss, captioner.trainable_variables)
    return loss, [tf.convert_to_tensor(g) for g in found]


def task_gradients(model, batch, accumulation_steps=1, jit_compile=False):
    """(loss, gradients) of a task as the trainer computes them."""
    size = batch["image"].shape[0]
    step = TaskGradients(model, size, accumulation_steps)

    @tf.function(jit_compile=jit_compile, autograph=False)
    def run():
        gradients, sums = step.of_batch(batch)
        total, weight = step.layout.unpacked(sums).figures["loss"]
        return total / weight, gradients

    return run()


def by_name(captioner, values):
    """Values in the order of `trainable_variables` by big_vision's names."""
    numbers = {id(v): i for i, v in enumerate(captioner.trainable_variables)}
    return {
        name: np.asarray(values[numbers[id(variable)]])
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
    return {
        **{
            f"encoder/{row.name}": variable
            for row, (variable,) in big_vision.paired(vision, encoder)
        },
        **{
            row.name: variable
            for row, (variable,) in big_vision.paired(text, decoder)
        },
    }


def check_gradients(found, expected):
    """The tolerance: 1e-4 of each array's norm, or of 1e-4 of all.

    The key biases of self-attention have a true gradient of zero (softmax
    ignores what is added to all its inputs): rounding noise, at most 1e-6 of
    all.
    """
    assert found.keys() == expected.keys()
    total = np.sqrt(sum(np.sum(np.square(g)) for g in expected.values()))
    for name, wanted in expected.items():
        difference = np.linalg.norm(found[name] - wanted)
        norm = max(np.linalg.norm(wanted), 1e-4 * total)
        if name.endswith(KEY_BIAS):
            norm = 1e-2 * total
        assert difference <= 1e-4 * norm, name
