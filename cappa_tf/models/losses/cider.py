"""CIDEr-D of sampled captions, over token ids and inside a graph.

`evaluation.caption_metrics` scores the words of texts, as is commonly reported;
this is the same formula on tokens, fast enough for every training step. n-grams
are hashed: those that share an entry of the table share its count.

Abbreviations for dimensions:
    B: batch (of images).      S: sampled captions per image.
    K: references per image.   L, M: their lengths in tokens.
"""

import numpy as np
import tensorflow as tf

# n-grams of 1 to 4 tokens.
ORDERS = 4
# Entries of the table of each order.
BUCKETS = 2**18

# Standard deviation of the penalty for another length, in tokens.
_SIGMA = 6.0
# A polynomial modulo a prime, whose products stay below 2 ** 62.
_BASE, _PRIME = 1_000_003, 2**31 - 1


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
        hashed, real = (x.numpy() for x in _ngrams(rows, n, pad))
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
            *_ngrams(tf.convert_to_tensor(captions), n, pad),
            *_ngrams(tf.convert_to_tensor(references), n, pad),
            frequencies[n - 1],
            documents,
        )
    lengths, wanted = (
        tf.reduce_sum(tf.cast(x != pad, tf.float32), -1)
        for x in (captions, references)
    )
    apart = lengths[:, :, None] - wanted[:, None]  # -> [B, S, K]
    penalty = tf.exp(-(apart**2) / (2 * _SIGMA**2))
    real = tf.cast(wanted > 0.0, tf.float32)[:, None]  # -> [B, 1, K]
    total = tf.reduce_sum(similarity * penalty * real, -1)
    return 10 / ORDERS * tf.math.divide_no_nan(total, tf.reduce_sum(real, -1))


def _ngrams(tokens, n, pad):
    """Hashes int64 and whether they are real, both [..., L], of n-grams.

    The one at position i begins there; it is real if its last token is, as
    padding comes last.
    """
    length = tf.shape(tokens)[-1]
    room = [[0, 0]] * (tokens.shape.rank - 1) + [[0, n - 1]]
    tokens = tf.pad(tokens, room, constant_values=pad)
    hashed = tf.zeros([], tf.int64)
    for i in range(n):
        token = tf.cast(tokens[..., i : i + length], tf.int64)
        hashed = (hashed * _BASE + token + 1) % _PRIME
    return hashed, token != pad


def _similarity(hashed, real, wanted, wanted_real, frequencies, documents):
    """Cosine similarity of clipped tf-idf vectors, float32 [B, S, K]."""

    def squared_idf(hashes, real):
        found = tf.gather(frequencies, hashes % BUCKETS)
        idf = tf.math.log(tf.maximum(documents, 1.0) / tf.maximum(found, 1.0))
        idf = tf.where(documents > 0.0, idf, 1.0)
        return tf.where(real, idf**2, 0.0)

    def count(ones, others, real):
        """How often n-grams [..., L] occur among others [..., M]."""
        same = (ones[..., None] == others[..., None, :]) & real[..., None, :]
        return tf.reduce_sum(tf.cast(same, tf.float32), -1)

    weight = squared_idf(hashed, real)  # -> [B, S, L]
    own = tf.maximum(count(hashed, hashed, real), 1.0)
    length = tf.sqrt(tf.reduce_sum(own * weight, -1))  # -> [B, S]
    theirs = count(wanted, wanted, wanted_real)
    weights = squared_idf(wanted, wanted_real)
    wanted_length = tf.sqrt(tf.reduce_sum(theirs * weights, -1))  # -> [B, K]
    there = count(
        hashed[:, :, None], wanted[:, None], wanted_real[:, None]
    )  # -> [B, S, K, L]
    # Every position has the share of its n-gram in the sum over n-grams.
    both = tf.minimum(own[:, :, None], there) * there / own[:, :, None]
    product = tf.reduce_sum(both * weight[:, :, None], -1)
    return tf.math.divide_no_nan(
        product, length[:, :, None] * wanted_length[:, None]
    )
