"""Mixtures of two training images, which have the labels of both.

An augmentation of `CaptionDataset.augmentations` is called with a batch and
`stateless_random.Draws`, and returns the batch. The batch has "image" float32
[B, H, W, 3] in 0..255, "label" int64 [B] and "index" int64 [B]. Its attribute
`mixes` tells whether it mixes images, `crops` whether it changes their size.

Dimensions:
    B: batch size, all examples of the step (of this host).
    H, W: height and width of the images.
"""

import dataclasses

import tensorflow as tf

from cappa_tf.utils import arguments


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


class Mixup:
    """Mixup as in the reference: one weight per step, at least one half.

    The weight is max(a, 1 - a) for a from Beta(alpha, alpha).

    Args:
        alpha: Parameter of the distribution; 0 does not mix.

    References: arXiv 1710.09412; big_vision utils.py `get_mixup`.
    """

    mixes, crops = True, False

    def __init__(self, alpha=0.2):
        self.alpha = arguments.check_number("alpha", alpha)

    def __call__(self, batch, draws):
        """Mixes a batch; the module describes it."""
        if not self.alpha:
            return mix(batch, tf.ones(tf.shape(batch["index"])))
        weights = draws.beta(self.alpha, per_example=False)
        return mix(batch, tf.maximum(weights, 1.0 - weights))


class OneOf:
    """One of several augmentations that mix, chosen anew in each step.

    Args:
        augmentations: List of them, each as likely as the others.
    """

    mixes, crops = True, False

    def __init__(self, augmentations):
        self.augmentations = list(augmentations)
        if not all(getattr(a, "mixes", False) for a in self.augmentations):
            raise ValueError(
                "`augmentations` of mixing.OneOf must all mix images. "
                f"Received: {self.augmentations}"
            )

    def __call__(self, batch, draws):
        """Mixes a batch; the module describes it."""
        count = len(self.augmentations)
        chosen = tf.cast(draws.one_of_step() * float(count), tf.int32)

        def branch(number):
            # Far from the places of other augmentations.
            place = draws.place + 100 * (number + 1)
            own = dataclasses.replace(draws, place=place)
            return lambda: self.augmentations[number](batch, own)

        return tf.switch_case(chosen, [branch(i) for i in range(count)])
