"""Image use: how much a decoder depends on the images during training.

A decoder that has learned to write likely captions and ignores the image is
the most frequent failure of captioners, and its loss looks good. The captions
of a few evaluation images are therefore scored three times: with their own
image, with the image of another example, and without any. Where the image is
ignored, the first two are equal. (Without an image is a weaker sign: the
cross-attention may have become a constant that the decoder needs.)

B: examples of one host.
"""

import collections

import numpy as np
import tensorflow as tf

from cappa_tf.training.gradients import function

OWN, OTHER, NONE = "own_image", "other_image", "no_image"
IDENTICAL = "identical_captions"
# A decoder learns language before it looks, which is no reason for a warning.
_WARMUP_SHARE = 0.1


class ImageUse:
    """Scores the captions of the first images of a data set.

    Args:
        model: Built task that `predicts_texts`.
        data: Evaluation data set.
        count: Number of images.
        hosts: The run's `Hosts`, each of which scores its part.
        bound: Nats per token; the image must be worth more, or `warning` says
            that it is not used.
    """

    def __init__(self, model, data, count, hosts, bound):
        self._model, self._data = model, data
        self._count, self._hosts, self._bound = count, hosts, bound
        self._warned = False
        self._sums = function(self._batch_sums)

    def open(self):
        """Reads this host's part of the images."""
        hosts = self._hosts
        share = -(-self._count // hosts.count)
        batches = self._data.evaluate(share, hosts.index, hosts.count)
        batch = next(iter(batches))
        real = batch["_mask"].numpy() > 0
        self._batch = {
            name: tf.constant(value.numpy()[real])
            for name, value in batch.items()
        }
        self._examples = int(real.sum())
        # Neighbors may be alike, as frames of a video are.
        order = np.roll(np.arange(self._examples), self._examples // 2)
        swapped = {
            name: tf.gather(self._batch[name], order)
            for name in self._model.image_spec(1)
        }
        self._swapped = {**self._batch, **swapped}

    def __call__(self, captions=()):
        """Scores the captions with the current weights.

        Args:
            captions: Captions that the model generated for sample images.

        Returns:
            Dict of nats per token with the `own_image`, with an `other_image`
            and with `no_image`, and the share of `captions` that some other of
            them equals, `identical_captions`; empty if there are fewer than
            two examples.
        """
        sums = np.zeros(4)
        if self._examples > 1:
            sums = self._sums(self._batch, self._swapped).numpy()
        *nats, tokens = np.sum(self._hosts.gather(sums), axis=0).tolist()
        if not tokens:
            return {}
        figures = {
            name: value / tokens
            for name, value in zip((OWN, OTHER, NONE), nats)
        }
        if len(captions) > 1:
            figures[IDENTICAL] = identical_share(captions)
        return figures

    def warning(self, figures, progress):
        """What the log should say about figures, once a run.

        Args:
            figures: Dict of `__call__`.
            progress: Share of the run that is done.

        Returns:
            A line, or None.
        """
        if self._warned or not figures or progress < _WARMUP_SHARE:
            return None
        gain = figures[OTHER] - figures[OWN]
        if gain >= self._bound:
            return None
        self._warned = True
        line = (
            "WARNING: the decoder hardly uses the images: captions cost "
            f"{figures[OWN]:.4g} nats a token with their own image and "
            f"{figures[OTHER]:.4g} with that of another example, less than "
            f"{self._bound:g} more (EvaluationSettings.image_use_bound)."
        )
        if IDENTICAL in figures:
            line += (
                f" {figures[IDENTICAL]:.0%} of the sample captions are the "
                "same as another one."
            )
        return line + (
            " Check that images and captions belong together and that images "
            "are decoded as they should be (samples.png, attention.png), that "
            "the vision encoder is trained or has pretrained weights "
            "(FROZEN_PARTS, INITIALIZE_FROM), and try a longer warmup or "
            "another learning rate."
        )

    def _batch_sums(self, batch, swapped):
        """Nats with own, other and no image, and tokens, float32 [4]."""
        own, tokens = self._model.text_nll(batch)
        other, _ = self._model.text_nll(swapped)
        none, _ = self._model.text_nll(batch, with_images=False)
        return tf.stack([tf.reduce_sum(x) for x in (own, other, none, tokens)])


def identical_share(captions):
    """The share of captions that some other of them equals.

    identical_share(["a dog", "a cat", "a dog", "a man"]) -> 0.5
    """
    counts = collections.Counter(captions)
    return sum(n for n in counts.values() if n > 1) / len(captions)
