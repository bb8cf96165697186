"""FLOPs that are counted, against those that are derived on paper."""

import pytest
import tiny

from cappa_tf.training import flops

WIDTH, MLP, PATCHES, LENGTH, VOCABULARY = 16, 32, 4, tiny.LENGTH, 40


def encoder():
    """Forward pass of tiny's encoder on an image."""
    attention = 2 * 4 * WIDTH**2 * PATCHES + 2 * 2 * PATCHES**2 * WIDTH
    mlp = 2 * 2 * WIDTH * MLP * PATCHES
    return 2 * PATCHES * 8 * 8 * 3 * WIDTH + attention + mlp


def decoder():
    """Forward pass of tiny's decoder on a caption."""
    projections = 2 * (4 + 2) * WIDTH**2 * LENGTH
    attention = 2 * 2 * LENGTH * WIDTH * (LENGTH + PATCHES)
    mlp = 2 * 2 * WIDTH * MLP * LENGTH
    return projections + attention + mlp + 2 * LENGTH * WIDTH * VOCABULARY


def memory():
    """Keys and values of an image, of which several captions have one."""
    return 2 * 2 * WIDTH**2 * PATCHES


def make(frozen=()):
    model = tiny.make_model(VOCABULARY)
    model.build()
    if frozen:
        model.freeze(frozen)
    return model


@pytest.mark.parametrize("captions", [1, 3])
def test_a_captioner_takes_what_its_products_take(captions):
    found = flops.training_flops(make(), captions)
    forward = encoder() + memory() + captions * decoder()
    # The images themselves get no gradient.
    pixels = 2 * PATCHES * 8 * 8 * 3 * WIDTH
    # The loss computes logits again for the gradient.
    logits = captions * 2 * LENGTH * WIDTH * VOCABULARY
    assert found == 3 * forward - pixels + logits


def test_a_frozen_encoder_has_no_backward_pass():
    found = flops.training_flops(make(["vision_encoder"]))
    logits = 2 * LENGTH * WIDTH * VOCABULARY
    # Keys and values have a gradient of their kernels, and none of the patches.
    assert found == encoder() + 2 * memory() + 3 * decoder() + logits


def test_numbers_are_readable():
    assert flops.readable(35_200_000_000) == "35.2 GFLOP"
    assert flops.readable(0) == "0 FLOP"
    assert flops.readable(999) == "999 FLOP"
