"""Greedy captions from a parallel draft, verified left to right.

Abbreviations for dimensions:
    B: batch (of images).      L: length of the text.  V: vocabulary.
"""

import tensorflow as tf

from cappa_tf.models.sampling import BANNED
from cappa_tf.models.text_decoder import shift_right


def draft(decoder, memory, length):
    """The most probable token of each position, all at once: int32 [B, L].

    Args:
        decoder: `TextDecoder` with a MASK token.
        memory: From `decoder.project_memory`.
        length: L.
    """
    count = tf.shape(memory[0][0])[0]
    masks = tf.fill([count, decoder.max_length], decoder.mask_id)
    hidden = decoder(masks, memory, parallel=tf.fill([count], True))
    return _best(decoder.logits(hidden[:, :length]))[0]


def decode(decoder, memory, *, length, eos_id=1):
    """The greedy captions, exactly, in as few passes as the draft is good.

    One pass over all positions tells the greedy token after each prefix of
    the draft: those up to and including the first disagreement are right.
    The others become the next draft.

    Args:
        decoder: `TextDecoder` with a MASK token.
        memory: From `decoder.project_memory`.
        length: L.
        eos_id: Token that ends a caption.

    Returns:
        tokens int32 [B, L] and log_probs float32 [B, L], both 0 after eos,
        and the number of passes, the draft's left out.
    """

    def unfinished(passes, tokens, log_probs, done):
        del passes, tokens, log_probs
        return ~tf.reduce_all(done)

    def verify(passes, tokens, log_probs, done):
        del log_probs, done
        hidden = decoder(shift_right(tokens), memory)
        best, log_probs = _best(decoder.logits(hidden))
        agree = tf.cast(tf.equal(best, tokens), tf.int32)
        right = tf.reduce_sum(tf.math.cumprod(agree, axis=1), axis=1)
        known = tf.range(length)[None] <= right[:, None]  # [B, L]
        done = tf.reduce_any((best == eos_id) & known, axis=1)
        done |= right >= length - 1
        return passes + 1, best, log_probs, done

    tokens = draft(decoder, memory, length)
    passes, tokens, log_probs, _ = tf.while_loop(
        unfinished,
        verify,
        (
            tf.constant(0),
            tokens,
            tf.zeros(tf.shape(tokens)),
            tf.zeros(tf.shape(tokens)[:1], tf.bool),
        ),
        shape_invariants=(
            tf.TensorShape([]),
            tf.TensorShape([None, None]),
            tf.TensorShape([None, None]),
            tf.TensorShape([None]),
        ),
    )
    ended = tf.cumsum(
        tf.cast(tokens == eos_id, tf.int32), axis=1, exclusive=True
    )
    return (
        tf.where(ended > 0, 0, tokens),
        tf.where(ended > 0, 0.0, log_probs),
        passes,
    )


def _best(logits):
    """Best token other than pad, int32 [B, L], and its log-probability."""
    log_probs = tf.nn.log_softmax(logits)
    pad = tf.range(logits.shape[-1]) == 0
    scores = tf.where(pad, BANNED, log_probs)
    best = tf.argmax(scores, axis=-1, output_type=tf.int32)
    return best, tf.reduce_max(scores, axis=-1)
