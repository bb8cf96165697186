"""Greedy decoding with cached keys and values.

Abbreviations for dimensions:
    B: batch.  P: number of patches.  L: length of the text.  D: width.
    V: vocabulary.
"""

import tensorflow as tf


def greedy(decoder, encoded, *, max_length=None, start_id=0, eos_id=1):
    """The most probable token at each position, left to right.

    The loop has static shapes (it compiles), computes the image's keys and
    values once and stops when every caption has ended.

    Args:
        decoder: `TextDecoder`.
        encoded: [B, P, E].
        max_length: Longest caption L; the decoder's by default.
        start_id: Input at the first position (pad, as in training).
        eos_id: Token that ends a caption.

    Returns:
        tokens: int32 [B, L]; eos is kept, 0 after it.
        log_probs: float32 [B, L], of each token; 0 after eos.
    """
    length = max_length or decoder.max_length
    if not 1 <= length <= decoder.max_length:
        raise ValueError(
            "`max_length` must be between 1 and the decoder's "
            f"{decoder.max_length}. Received: max_length={max_length}"
        )
    batch = encoded.shape[0] or tf.shape(encoded)[0]
    memory = decoder.project_memory(encoded)

    def unfinished(i, tokens, log_probs, last, ended, cache):
        del tokens, log_probs, last, cache
        return (i < length) & ~tf.reduce_all(ended)

    def step(i, tokens, log_probs, last, ended, cache):
        hidden, cache = decoder.call_with_cache(last[:, None], memory, cache, i)
        scores = tf.nn.log_softmax(decoder.logits(hidden)[:, 0])  # -> [B, V]
        best = tf.argmax(scores, axis=-1, output_type=tf.int32)
        best = tf.where(ended, 0, best)
        score = tf.gather(scores, best, batch_dims=1)
        score = tf.where(ended, 0.0, score)
        column = tf.one_hot(i, length, dtype=tf.int32)[None]
        tokens += best[:, None] * column
        log_probs += score[:, None] * tf.cast(column, tf.float32)
        return i + 1, tokens, log_probs, best, ended | (best == eos_id), cache

    state = (
        tf.constant(0),
        tf.zeros((batch, length), tf.int32),
        tf.zeros((batch, length), tf.float32),
        tf.fill((batch,), start_id),
        tf.fill((batch,), False),
        decoder.empty_cache(batch, length),
    )
    _, tokens, log_probs, *_ = tf.while_loop(unfinished, step, state)
    return tokens, log_probs
