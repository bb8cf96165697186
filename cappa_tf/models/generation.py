"""Decoding loop with cached keys and values, shared by all samplers.

Abbreviations for dimensions:
    B: batch (of images).      S: sequences (beams or samples) per image.
    P: number of patches.      L: length of the text.  N: B * S.
    V: vocabulary.             D: width.                M: length of prompts.
"""

from typing import NamedTuple

import keras
import tensorflow as tf

from cappa_tf.models.attention import by_head
from cappa_tf.models.likelihood import show_prompts
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
    decoder,
    memory,
    search,
    rules,
    *,
    size,
    prefix,
    uniform,
    masked=False,
    prompts=None,
    drafts=False,
):
    """Generates captions token by token.

    The loop has static shapes (so that it compiles), uses the image's keys and
    values without copying them for each sequence, and stops when all sequences
    have ended.

    Args:
        decoder: `TextDecoder`.
        memory: From `decoder.project_memory`; None omits the image.
        search: A search of `sampling`, which chooses the next token.
        rules: `sampling.Rules`.
        size: (B, S, L); B may be a tensor.
        prefix: int32 [B or 1, fewer than L], the beginning of each caption.
        uniform: float32 [B, L, S] in [0, 1), random numbers for sampling, or
            None.
        masked: Whether the decoder fills in MASK tokens: the next token is
            read at its own position, with MASK there and after it. Without a
            cache, as all positions attend to each other.
        prompts: int32 [B, M], padded, what comes before each caption; None for
            nothing. All their keys and values are computed at once, and the
            loop goes over the caption. A caption whose prompt is so long that
            the decoder's positions are exhausted before L ends there.
        drafts: Whether captions are drafted in parallel first; greedy search
            without prompts, S = 1.

    Returns:
        tokens: int32 [B, S, L], the best sequence first; eos is kept, pad
            after it. A prompt is not part of it.
        log_probs: float32 [B, S, L], the model's log-probability of each token
            (before rules and temperature), 0 after eos.
    """
    batch, sequences, length = size
    special = decoder.special_tokens
    reader = (_MaskedReader if masked else _CachedReader)(
        decoder, memory, prompts, size
    )
    forced = tf.pad(prefix, [[0, 0], [0, length - prefix.shape[1]]])

    def unfinished(state):
        return (state.i < length) & ~tf.reduce_all(state.ended)

    def step(state):
        i, flat = state.i, tf.reshape(state.tokens, [-1, length])
        hidden, cache = reader.read(flat, state.cache, i)
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
        ended = state.ended | (chosen == special.eos)
        if prompts is not None:
            no_room = reader.lengths + i + 1 >= decoder.max_length  # [N]
            ended |= tf.reshape(no_room, [-1, sequences])
        return state._replace(
            i=i + 1,
            tokens=tf.where(here, chosen[..., None], state.tokens),
            log_probs=tf.where(here, gained[..., None], state.log_probs),
            totals=state.totals + tf.gather(scores, places, batch_dims=1),
            ended=ended,
        )

    # Only one beam starts: copies of the empty caption would remain copies.
    first = tf.where(tf.range(sequences) == 0, 0.0, BANNED)
    if uniform is not None:
        first = tf.zeros([sequences])
    state = _State(
        i=tf.constant(0),
        tokens=tf.fill((batch, sequences, length), special.pad),
        log_probs=tf.zeros((batch, sequences, length)),
        totals=tf.zeros((batch, sequences)) + first,
        lengths=tf.zeros((batch, sequences), tf.int32),
        ended=tf.fill((batch, sequences), False),
        cache=reader.cache,
    )
    if drafts:
        state = _verify_draft(decoder, memory, rules, prefix, state)
    with _weights_cast_once(decoder):
        (state,) = tf.while_loop(
            unfinished, lambda state: (step(state),), (state,)
        )
    rank = search.rank(state.totals, state.lengths)
    order = tf.argsort(rank, direction="DESCENDING", stable=True)
    return (
        tf.gather(state.tokens, order, batch_dims=1),
        tf.gather(state.log_probs, order, batch_dims=1),
    )


class _Reader:
    """What predicts the next token of N captions.

    Args:
        decoder: As of `decode`, like all other arguments.
        memory: Keys and values of the images, or None.
        prompts: int32 [B, M] or None.
        size: (B, S, L).

    Attributes:
        cache: The cache at the start of the loop.
        lengths: int32 [N], tokens of each prompt; None without prompts.
    """

    def __init__(self, decoder, memory, prompts, size):
        self._decoder, self._memory = decoder, memory
        self._prompts = self.lengths = None
        self.cache = []
        if prompts is not None:
            self._prompts = tf.repeat(prompts, size[1], axis=0)  # -> [N, M]
            is_real = self._prompts != decoder.special_tokens.pad
            self.lengths = tf.reduce_sum(tf.cast(is_real, tf.int32), axis=1)

    def read(self, tokens, cache, i):
        """Hidden states [N, 1, D] that predict token i, and the cache.

        `tokens` are int32 [N, L], of which those before i count.
        """
        raise NotImplementedError


class _CachedReader(_Reader):
    """Left to right, with the keys and values of all tokens so far."""

    def __init__(self, decoder, memory, prompts, size):
        super().__init__(decoder, memory, prompts, size)
        batch, sequences, length = size
        if memory is not None:
            self._memory = tf.nest.map_structure(by_head, memory)
        if prompts is None:
            self.cache = decoder.empty_cache(batch * sequences, length)
            return
        # Prompts are read once an image, however many captions it gets.
        _, cache = decoder.fill_cache(prompts, memory, length)
        self.cache = tf.nest.map_structure(
            lambda x: tf.repeat(x, sequences, axis=0), cache
        )

    def read(self, tokens, cache, i):
        """As `_Reader.read`."""
        start = self._decoder.special_tokens.start
        last = tf.gather(tokens, tf.maximum(i - 1, 0), axis=1)
        if self._prompts is None:
            last = tf.where(i > 0, last, start)
            return self._decoder.call_with_cache(
                last[:, None], self._memory, cache, i
            )
        most, lengths = tf.shape(self._prompts)[1], self.lengths
        end = tf.gather(
            tf.pad(self._prompts, [[0, 0], [1, 0]], constant_values=start),
            lengths,
            batch_dims=1,
        )
        # A place in the cache is not the position in the text: those between
        # the end of a shorter prompt and the caption are never attended to.
        places = tf.range(tf.shape(cache[0][0])[2])
        mask = (places >= most) & (places <= most + i)
        mask = mask[None] | (places[None] < lengths[:, None])  # [N, places]
        return self._decoder.call_with_cache(
            tf.where(i > 0, last, end)[:, None],
            self._memory,
            cache,
            most + i,
            tf.minimum(lengths + i, self._decoder.max_length - 1),
            mask[:, None, None],
        )


class _MaskedReader(_Reader):
    """All positions attend to each other, MASK from the next token on."""

    def read(self, tokens, cache, i):
        """As `_Reader.read`."""
        most = self._decoder.max_length
        mask = self._decoder.special_tokens.require_mask()
        positions = tf.range(most)
        if self._prompts is None:
            tokens = tf.pad(tokens, [[0, 0], [0, most - tokens.shape[1]]])
            tokens = tf.where(positions < i, tokens, mask)
            place = tf.fill(tf.shape(tokens)[:1], i)
        else:
            first = self.lengths[:, None]
            rows = tf.maximum(positions[None] - first, 0)
            rows = tf.minimum(rows, tokens.shape[1] - 1)
            tokens = tf.gather(tokens, rows, batch_dims=1)
            tokens = tf.where(positions < first + i, tokens, mask)
            tokens = show_prompts(tokens, self._prompts, self.lengths)
            place = tf.minimum(self.lengths + i, most - 1)
        everywhere = tf.fill(tf.shape(tokens)[:1], True)
        hidden = self._decoder(tokens, self._memory, parallel=everywhere)
        return tf.gather(hidden, place[:, None], batch_dims=1), cache


def draft(decoder, memory, size):
    """Captions from parallel prediction, all positions in one pass.

    Args:
        decoder: `TextDecoder` with a MASK token.
        memory: From `decoder.project_memory`, or None.
        size: (B, L).

    Returns:
        int32 [B, L], the most probable token other than pad at each position;
        tokens after the first eos are meaningless.
    """
    count, length = size
    special = decoder.special_tokens
    masks = tf.fill([count, decoder.max_length], special.require_mask())
    hidden = decoder(masks, memory, parallel=tf.fill([count], True))
    logits = decoder.logits(hidden[:, :length])
    is_pad = tf.range(logits.shape[-1]) == special.pad
    logits = tf.where(is_pad, BANNED, logits)
    return tf.argmax(logits, axis=-1, output_type=tf.int32)


def _verify_draft(decoder, memory, rules, prefix, state):
    """The state of the loop after the captions' beginnings that a draft gave.

    One pass left to right over the drafts gives what the loop would choose at
    each position, as long as all choices before it are the draft's. The loop
    goes on where the first caption of the batch departs from its draft,
    with the keys and values of this pass.

    Args:
        decoder: As of `decode`, like `memory`, `rules` and `prefix`.
        memory: Keys and values of the images, or None.
        rules: `Rules`.
        prefix: int32 [B or 1, fewer than L].
        state: `_State` before the first token, S = 1.

    Returns:
        `_State`.
    """
    batch, length = tf.shape(state.tokens)[0], state.tokens.shape[2]
    positions, first = tf.range(length), prefix.shape[1]
    prefix = tf.broadcast_to(prefix, [batch, first])
    drafted = draft(decoder, memory, (batch, length))
    drafted = tf.concat([prefix, drafted[:, first:]], axis=1)
    hidden, cache = decoder.fill_cache(drafted, memory, 0)
    log_probs = tf.nn.log_softmax(decoder.logits(hidden))  # [B, L, V]
    scores = rules.apply(
        tf.reshape(log_probs, [-1, log_probs.shape[-1]]),
        tf.repeat(drafted, length, axis=0),
        tf.tile(positions, [batch]),
    )
    chosen = tf.argmax(scores, axis=-1, output_type=tf.int32)
    chosen = tf.reshape(chosen, [batch, length])
    chosen = tf.concat([prefix, chosen[:, first:]], axis=1)

    def all_before(values):  # bool [B, L]
        values = tf.cast(values, tf.int32)
        return tf.math.cumprod(values, axis=1, exclusive=True) > 0

    is_known = all_before(chosen == drafted)
    is_eos = chosen == decoder.special_tokens.eos
    has_ended = tf.reduce_any(is_known & is_eos, axis=1)  # [B]
    known = tf.reduce_sum(tf.cast(is_known, tf.int32), axis=1)
    i = tf.reduce_min(tf.where(has_ended, length, known))
    is_kept = is_known & all_before(~is_eos) & (positions < i)
    ended = tf.reduce_any(is_kept & is_eos, axis=1)
    log_probs = tf.gather(log_probs, chosen, batch_dims=2)
    log_probs = tf.where(is_kept, log_probs, 0.0)
    return state._replace(
        i=i,
        tokens=tf.where(is_kept, chosen, decoder.special_tokens.pad)[:, None],
        log_probs=log_probs[:, None],
        totals=tf.reduce_sum(log_probs, axis=1, keepdims=True),
        lengths=tf.reduce_sum(
            tf.cast(is_kept, tf.int32), axis=1, keepdims=True
        ),
        ended=ended[:, None],
        cache=cache,
    )


def _weights_cast_once(decoder):
    """Scope in which a loop reads the blocks' kernels as cast before it.

    Under mixed precision each step would cast them, in a quarter of its time
    for one image (S/16, 6 blocks). All else is cast as usual.
    """
    dtype = decoder.compute_dtype
    scope = keras.StatelessScope(initialize_variables=False)
    for block in decoder.blocks:
        for variable in block.variables:
            is_float32 = variable.dtype == "float32"
            if variable.name == "kernel" and is_float32 and dtype != "float32":
                scope.add_update((variable, keras.ops.cast(variable, dtype)))
    return scope


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
