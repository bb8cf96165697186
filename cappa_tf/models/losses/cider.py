"""CIDEr-D of sampled captions, over token ids and inside a graph.

`evaluation.caption_metrics` scores the words of texts, as is commonly reported;
this is the same formula on tokens, fast enough for every training step. n-grams
that share an entry of the table share its count.

Abbreviations for dimensions:
    B: batch (of images).      S: sampled captions per image.
    K: references per image.   L, M: their lengths in tokens.
"""

import numpy as np
import tensorflow as tf

from cappa_tf.models.losses import ngrams
from cappa_tf.models.losses.ngrams import ORDERS, Ngrams

# Entries of the table of each order.
BUCKETS = 2**18

# Standard deviation of the penalty for another length, in tokens.
_SIGMA = 6.0


def count_documents(tokens, pad):
    """In how many of some images' captions each n-gram occurs.

    Args:
        tokens: List of int arrays [K, L], the captions of each image, padded.
        pad: Id of the padding.

    Returns:
        int64 [ORDERS, BUCKETS].
    """
    image = np.repeat(np.arange(len(tokens)), [len(some) for some in tokens])
    rows = tf.constant(np.concatenate(tokens))  # [captions, L]
    counts = []
    for n in range(1, ORDERS + 1):
        hashed, real = (x.numpy() for x in Ngrams.of(rows, n, pad))
        of_image = np.broadcast_to(image[:, None], real.shape)[real]
        once = np.unique(of_image * BUCKETS + hashed[real] % BUCKETS)
        counts.append(np.bincount(once % BUCKETS, minlength=BUCKETS))
    return np.stack(counts)


def cider_d(captions, references, frequencies, documents, pad):
    """CIDEr-D of captions, each against the references of its image.

    Args:
        captions: int32 [B, S, L], padded. What ends a caption (eos) is a token
            like any other.
        references: int32 [B, K, M], padded; one that is all padding does not
            count.
        frequencies: float32 [ORDERS, BUCKETS], from `count_documents`.
        documents: float32 scalar, the number of images counted; as long as it
            is 0, all n-grams weigh alike.
        pad: Id of the padding.

    Returns:
        float32 [B, S], between 0 and 10; 0 for an image without references.

    Reference: arXiv 1411.5726, section 4; pycocoevalcap/cider/cider_scorer.py.
    """
    similarity = 0.0
    for n in range(1, ORDERS + 1):
        similarity += _similarity(
            Ngrams.of(captions, n, pad),
            Ngrams.of(references, n, pad),
            frequencies[n - 1],
            documents,
        )
    lengths, wanted = (ngrams.lengths(x, pad) for x in (captions, references))
    apart = lengths[:, :, None] - wanted[:, None]  # -> [B, S, K]
    penalty = tf.exp(-(apart**2) / (2 * _SIGMA**2))
    real = tf.cast(wanted > 0.0, tf.float32)[:, None]  # -> [B, 1, K]
    total = tf.reduce_sum(similarity * penalty * real, -1)
    return 10 / ORDERS * tf.math.divide_no_nan(total, tf.reduce_sum(real, -1))


def _similarity(found, wanted, frequencies, documents):
    """Cosine similarity of clipped tf-idf vectors, float32 [B, S, K]."""

    def squared_idf(one):
        images = tf.gather(frequencies, one.hashes % BUCKETS)
        idf = tf.math.log(tf.maximum(documents, 1.0) / tf.maximum(images, 1.0))
        idf = tf.where(documents > 0.0, idf, 1.0)
        return tf.where(one.real, idf**2, 0.0)

    own, weights = found.counts(), squared_idf(found)  # [B, S, L]
    length = tf.sqrt(tf.reduce_sum(own * weights, -1))  # -> [B, S]
    wanted_length = tf.sqrt(
        tf.reduce_sum(wanted.counts() * squared_idf(wanted), -1)
    )  # -> [B, K]
    there = found.counts_in(wanted)  # [B, S, K, L]
    # Every position has the share of its n-gram in the sum over n-grams.
    both = tf.minimum(own[:, :, None], there) * there / own[:, :, None]
    product = tf.reduce_sum(both * weights[:, :, None], -1)
    return tf.math.divide_no_nan(
        product, length[:, :, None] * wanted_length[:, None]
    )
