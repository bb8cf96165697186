"""BLEU-4 of sampled captions, over token ids and inside a graph.

`evaluation.caption_metrics` scores all captions of a data set together, over
their words, as is commonly reported; a reward is needed for each caption, where
four words in a row are often right nowhere: the counts are smoothed.

Abbreviations for dimensions:
    B: batch (of images).      S: sampled captions per image.
    K: references per image.   L, M: their lengths in tokens.
"""

import tensorflow as tf

from cappa_tf.models.losses import ngrams
from cappa_tf.models.losses.ngrams import ORDERS, Ngrams


def bleu_4(captions, references, pad):
    """Smoothed BLEU-4 of captions, each against the references of its image.

    The precisions of 2-, 3- and 4-grams have one match more of one n-gram more;
    the brevity penalty is that of the reference whose length is closest, the
    shorter of two.

    Args:
        captions: int32 [B, S, L], padded. What ends a caption (eos) is a token
            like any other.
        references: int32 [B, K, M], padded; one that is all padding does not
            count.
        pad: Id of the padding.

    Returns:
        float32 [B, S], between 0 and 1; 0 for an image without references.

    Reference: Papineni et al. (ACL 2002); Lin and Och (ACL 2004), section 4,
    for the smoothing; pycocoevalcap/bleu/bleu_scorer.py for the length.
    """
    total = 0.0
    for n in range(1, ORDERS + 1):
        found = Ngrams.of(captions, n, pad)
        wanted = Ngrams.of(references, n, pad)
        own, real = found.counts(), tf.cast(found.real, tf.float32)
        there = tf.reduce_max(found.counts_in(wanted), 2)  # -> [B, S, L]
        # Every position has the share of its n-gram in the sum over n-grams.
        matches = tf.reduce_sum(tf.minimum(own, there) / own * real, -1)
        count = tf.reduce_sum(real, -1)
        more = 0.0 if n == 1 else 1.0
        total += tf.math.log(
            tf.math.divide_no_nan(matches + more, count + more)
        )
    length = ngrams.lengths(captions, pad)
    wanted = ngrams.lengths(references, pad)
    apart = tf.abs(length[:, :, None] - wanted[:, None])  # -> [B, S, K]
    # Of two that are as close, the shorter: lengths are whole numbers.
    apart = tf.where(wanted[:, None] > 0.0, apart + wanted[:, None] * 1e-4, 1e6)
    closest = tf.gather(wanted, tf.argmin(apart, 2), batch_dims=1)
    ratio = tf.math.divide_no_nan(closest, length)
    return tf.exp(total / ORDERS + tf.minimum(0.0, 1.0 - ratio))
