"""Mixtures of two training images, each with the label of both.

Dimensions:
    B: batch size.
"""

import tensorflow as tf


def mix(batch, weights, images=None):
    """Mixes each example with the one before it; the first with the last.

    Args:
        batch: Dict with "image" float32 [B, H, W, 3] and "label" [B] or [B, C].
        weights: float32 [B], of each example's own image in the mixture.
        images: Mixed images, if they are not the weighted sums.

    Returns:
        The batch with mixed images, "mix_label" (of the other image) and
        "mix_weight".

    Reference: big_vision utils.py `get_mixup`.
    """
    if images is None:
        own = tf.reshape(weights, [-1, 1, 1, 1])
        images = own * batch["image"]
        images += (1.0 - own) * tf.roll(batch["image"], 1, axis=0)
    return {
        **batch,
        "image": images,
        "mix_label": tf.roll(batch["label"], 1, axis=0),
        "mix_weight": weights,
    }
