"""Cross-entropy of an image's distribution over tokens and its captions' bags.

Abbreviations for dimensions:
    B: batch (of images).  K: captions per image.  L: length of the text.
    V: vocabulary.
"""

import tensorflow as tf


def inverse_document_frequency(counts, documents):
    """Weights of tokens by how few documents have them.

    Args:
        counts: float32 [V], the number of documents with each token.
        documents: float32 scalar, the number of documents.

    Returns:
        float32 [V]: log((documents + 1) / (counts + 1)), which is 0 for a
        token of every document; 1 for all as long as there are no documents.
    """
    weights = tf.math.log((documents + 1.0) / (counts + 1.0))
    return tf.where(documents > 0.0, weights, tf.ones_like(weights))


def bag_targets(labels, weights, special):
    """Target probabilities of the tokens of each caption.

    Args:
        labels: int32 [B, K, L].
        weights: float32 [V], of the tokens.
        special: Ids that are not targets.

    Returns:
        float32 [B, K, L], the weights divided by their sum over a caption, 0
        for special tokens and for all but the first occurrence of a token; all
        0 for a caption without weight.
    """
    length = tf.shape(labels)[-1]
    before = tf.range(length)[:, None] > tf.range(length)[None]
    equal = labels[..., :, None] == labels[..., None, :]  # -> [B, K, L, L]
    counted = ~tf.reduce_any(equal & before, axis=-1)
    for token in special:
        counted &= labels != token
    found = tf.where(counted, tf.gather(weights, labels), 0.0)
    total = tf.reduce_sum(found, axis=-1, keepdims=True)
    return tf.math.divide_no_nan(found, total)


def bag_cross_entropy(logits, labels, targets, k):
    """Softmax cross-entropy of each image, and how much is among the best k.

    Args:
        logits: float32 [B, V].
        labels: int32 [B, K, L].
        targets: float32 [B, K, L], from `bag_targets`.
        k: Number of tokens to predict.

    Returns:
        (loss, recall, known), each float32 [B]: the cross-entropy, the mean
        over the captions that have a target; the sum of targets, likewise,
        whose token is among the k of the largest logits; 1 for images of
        which a caption has a target (0, as both others then are).
    """
    shape = tf.shape(labels)
    flat = tf.reshape(labels, [shape[0], -1])  # -> [B, K * L]
    targets = tf.reshape(targets, [shape[0], -1])
    captions = tf.reduce_sum(targets, axis=-1)  # Each sums to 1 or to 0.
    targets = tf.math.divide_no_nan(targets, captions[:, None])
    known = tf.cast(captions > 0.0, tf.float32)
    log_sum = tf.reduce_logsumexp(logits, axis=-1)
    chosen = tf.gather(logits, flat, batch_dims=1)
    loss = known * log_sum - tf.reduce_sum(targets * chosen, axis=-1)
    best = tf.math.top_k(logits, k).indices  # [B, k]
    among = tf.reduce_any(flat[:, :, None] == best[:, None], axis=-1)
    recall = tf.reduce_sum(tf.where(among, targets, 0.0), axis=-1)
    return loss, recall, known
