"""Decoding loop with cached keys and values, shared by all samplers.

Abbreviations for dimensions:
    B: batch (of images).      S: sequences (beams or samples) per image.
    P: number of patches.      L: length of the text.  N: B * S.
    V: vocabulary.             D: width.
"""

from typing import NamedTuple

import tensorflow as tf

from cappa_tf.models.attention import by_head
from cappa_tf.models.sampling import BANNED


class _State(NamedTuple):
    """State of the loop between two steps.

    Attributes:
        i: int32, the position to fill next.
        tokens: int32 [B, S, L].
        log_probs: float32 [B, S, L], of the tokens.
        totals: float32 [B, S], sums of the scores of the chosen tokens.
        lengths: int32 [B, S], tokens so far, including eos.
        ended: bool [B, S].
        cache: Keys and values of N captions, from `TextDecoder.empty_cache`.
    """

    i: tf.Tensor
    tokens: tf.Tensor
    log_probs: tf.Tensor
    totals: tf.Tensor
    lengths: tf.Tensor
    ended: tf.Tensor
    cache: list


def decode(
    decoder, memory, search, rules, *, size, prefix, uniform, masked=False
):
    """Generates captions token by token.

    The loop has static shapes (so that it compiles), uses the image's keys and
    values without copying them for each sequence, and stops when all sequences
    have ended.

    Args:
        decoder: `TextDecoder`.
        memory: From `decoder.project_memory`.
        search: A search of `sampling`, which chooses the next token.
        rules: `sampling.Rules`.
        size: (B, S, L); B may be a tensor.
        prefix: int32 [B or 1, fewer than L], the beginning of each caption.
        uniform: float32 [B, L, S] in [0, 1), random numbers for sampling, or
            None.
        masked: Whether the decoder fills in MASK tokens: the next token is
            read at its own position, with MASK there and after it. Without a
            cache, as all positions attend to each other.

    Returns:
        tokens: int32 [B, S, L], the best sequence first; eos is kept, pad
            after it.
        log_probs: float32 [B, S, L], the model's log-probability of each token
            (before rules and temperature), 0 after eos.
    """
    batch, sequences, length = size
    special = decoder.special_tokens
    next_hidden = _masked_hidden if masked else _cached_hidden
    if not masked:
        memory = tf.nest.map_structure(by_head, memory)
    forced = tf.pad(prefix, [[0, 0], [0, length - prefix.shape[1]]])

    def unfinished(state):
        return (state.i < length) & ~tf.reduce_all(state.ended)

    def step(state):
        i, flat = state.i, tf.reshape(state.tokens, [-1, length])
        hidden, cache = next_hidden(decoder, memory, flat, state.cache, i)
        log_probs = tf.nn.log_softmax(decoder.logits(hidden)[:, 0])  # [N, V]
        scores = rules.apply(log_probs, flat, i)
        if prefix.shape[1] > 0:
            only = _only(log_probs, tf.repeat(forced[:, i], sequences))
            scores = tf.where(i < prefix.shape[1], only, scores)
        # Ended captions continue with pad, at no change to their total.
        vocabulary = scores.shape[-1]
        is_pad = tf.range(vocabulary) == special.pad
        after = tf.where(is_pad, 0.0, BANNED)
        scores = tf.where(tf.reshape(state.ended, [-1, 1]), after, scores)
        scores = tf.reshape(scores, [-1, sequences, vocabulary])
        log_probs = tf.reshape(log_probs, [-1, sequences * vocabulary])
        lengths = state.lengths + tf.cast(~state.ended, tf.int32)
        state = state._replace(lengths=lengths, cache=cache)
        parents, chosen = search.choose(
            state.totals,
            scores,
            lengths,
            None if uniform is None else tf.gather(uniform, i, axis=1),
        )
        places = chosen + vocabulary * (
            tf.range(sequences) if parents is None else parents
        )
        if parents is not None:
            state = _follow(state, parents)
        scores = tf.reshape(scores, [-1, sequences * vocabulary])
        gained = tf.gather(log_probs, places, batch_dims=1)
        gained = tf.where(state.ended, 0.0, gained)
        here = tf.range(length) == i
        return state._replace(
            i=i + 1,
            tokens=tf.where(here, chosen[..., None], state.tokens),
            log_probs=tf.where(here, gained[..., None], state.log_probs),
            totals=state.totals + tf.gather(scores, places, batch_dims=1),
            ended=state.ended | (chosen == special.eos),
        )

    # Only one beam starts: copies of the empty caption would remain copies.
    first = tf.where(tf.range(sequences) == 0, 0.0, BANNED)
    if uniform is not None:
        first = tf.zeros([sequences])
    (state,) = tf.while_loop(
        unfinished,
        lambda state: (step(state),),
        (
            _State(
                i=tf.constant(0),
                tokens=tf.fill((batch, sequences, length), special.pad),
                log_probs=tf.zeros((batch, sequences, length)),
                totals=tf.zeros((batch, sequences)) + first,
                lengths=tf.zeros((batch, sequences), tf.int32),
                ended=tf.fill((batch, sequences), False),
                cache=[]
                if masked
                else decoder.empty_cache(batch * sequences, length),
            ),
        ),
    )
    rank = search.rank(state.totals, state.lengths)
    order = tf.argsort(rank, direction="DESCENDING", stable=True)
    return (
        tf.gather(state.tokens, order, batch_dims=1),
        tf.gather(state.log_probs, order, batch_dims=1),
    )


def _cached_hidden(decoder, memory, tokens, cache, i):
    """Hidden states [N, 1, D] that predict position i, and the cache.

    `tokens` are int32 [N, L], of which those before position i count.
    """
    last = tf.gather(tokens, tf.maximum(i - 1, 0), axis=1)
    last = tf.where(i > 0, last, decoder.special_tokens.start)
    return decoder.call_with_cache(last[:, None], memory, cache, i)


def _masked_hidden(decoder, memory, tokens, cache, i):
    """As `_cached_hidden`, with MASK from position i on."""
    most = decoder.max_length
    tokens = tf.pad(tokens, [[0, 0], [0, most - tokens.shape[1]]])
    mask = decoder.special_tokens.require_mask()
    tokens = tf.where(tf.range(most) < i, tokens, mask)
    everywhere = tf.fill(tf.shape(tokens)[:1], True)
    hidden = decoder(tokens, memory, parallel=everywhere)
    return tf.gather(hidden, [i], axis=1), cache


def draft(decoder, memory, length):
    """Captions from parallel prediction, all positions in one pass.

    Verifying these drafts left to right until they equal the greedy captions
    costs more time than greedy decoding: a position of a full pass is hardly
    cheaper than one of the loop, and most drafts need many passes.

    Args:
        decoder: `TextDecoder` with a MASK token.
        memory: From `decoder.project_memory`.
        length: L.

    Returns:
        int32 [B, L], the most probable token other than pad at each position;
        tokens after the first eos are meaningless.
    """
    count = tf.shape(memory[0][0])[0]
    special = decoder.special_tokens
    masks = tf.fill([count, decoder.max_length], special.require_mask())
    hidden = decoder(masks, memory, parallel=tf.fill([count], True))
    logits = decoder.logits(hidden[:, :length])
    is_pad = tf.range(logits.shape[-1]) == special.pad
    logits = tf.where(is_pad, BANNED, logits)
    return tf.argmax(logits, axis=-1, output_type=tf.int32)


def _only(scores, tokens):
    """Scores [N, V] in which all but the given tokens [N or S] are banned."""
    shape = tf.shape(scores)
    tokens = tf.reshape(tokens, [-1, 1])
    repeats = shape[0] // tf.shape(tokens)[0]
    tokens = tf.tile(tokens, [repeats, 1])
    return tf.where(tf.range(shape[1]) == tokens, scores, BANNED)


def _follow(state, parents):
    """The state in which each sequence continues `parents`, int32 [B, S]."""
    sequences = parents.shape[1]

    def gather(x):
        return tf.gather(x, parents, batch_dims=1)

    def gather_flat(x):
        split = tf.reshape(x, [-1, sequences, *x.shape[1:]])
        return tf.reshape(gather(split), [-1, *x.shape[1:]])

    return state._replace(
        tokens=gather(state.tokens),
        log_probs=gather(state.log_probs),
        totals=gather(state.totals),
        lengths=gather(state.lengths),
        ended=gather(state.ended),
        cache=tf.nest.map_structure(gather_flat, state.cache),
    )
