"""Search strategies that choose the next token, and rules that ban tokens.

keras_nlp's samplers hold the options (temperature, top-k, top-p), but their
`get_next_token` cannot be used in this project's loop: it samples for a whole
batch from a seed variable, so the captions of an image would depend on its
neighbors and would not be reproducible. Here random numbers belong to each
image. keras_nlp also lacks a beam search with length penalty.

Abbreviations for dimensions:
    B: batch (of images).      S: sequences (beams or samples) per image.
    L: length of the text.     V: vocabulary.       N: B * S.
"""

import dataclasses

import tensorflow as tf

from cappa_tf.models.special_tokens import SpecialTokens
from cappa_tf.utils.arguments import (
    check_bool,
    check_counts,
    check_integer,
    check_number,
)

# Log-probability of a banned token. Finite, so that sums still have an order.
BANNED = -1e9


@dataclasses.dataclass(frozen=True)
class GreedySearch:
    """Chooses the most probable token.

    Attributes:
        draft: Whether parallel prediction drafts the captions of a batch, of
            which one pass left to right then checks all positions; decoding
            goes on where the first of them departs from its draft. The
            captions are the same, up to rounding where two tokens are equally
            probable. Faster for one image at a time if the image determines
            the words: slower for many images, and no faster for photos.
    """

    draft: bool = False

    def __post_init__(self):
        check_bool(draft=self.draft)

    def choose(self, totals, scores, lengths, uniform):
        """The most probable token, with arguments as in `BeamSearch`."""
        del totals, lengths, uniform
        return None, tf.argmax(scores, axis=-1, output_type=tf.int32)

    def rank(self, totals, lengths):
        """The log-likelihoods themselves, float32 [B, S]."""
        del lengths
        return totals


@dataclasses.dataclass(frozen=True)
class RandomSearch:
    """Samples a token according to its probability.

    Attributes:
        temperature: Divides the logits; below 1 sharpens.
        k: Number of most probable tokens to sample from; None for all.
        p: Samples from the fewest of these tokens whose probabilities sum up
            to more than p.
    """

    temperature: float = 1.0
    k: int | None = None
    p: float = 1.0

    def __post_init__(self):
        check_number("temperature", self.temperature, exclusive=True)
        check_counts(optional=True, k=self.k)
        check_number("p", self.p, 0.0, 1.0, exclusive=True)

    def choose(self, totals, scores, lengths, uniform):
        """A random token, with arguments as in `BeamSearch`."""
        del totals, lengths
        values = tf.nn.softmax(scores / self.temperature)
        tokens = None
        if self.k is not None or self.p < 1.0:
            most = min(self.k or scores.shape[-1], scores.shape[-1])
            values, tokens = tf.math.top_k(values, most)
            before = tf.cumsum(values, axis=-1, exclusive=True)
            values = tf.where(before <= self.p, values, 0.0)
        # The first token at which the cumulative sum exceeds the threshold,
        # kept just below 1: rounding could else choose a token of probability
        # 0.
        sums = tf.cumsum(values, axis=-1)
        threshold = (uniform * (1.0 - 2.0**-20))[..., None] * sums[..., -1:]
        chosen = tf.argmax(
            tf.cast(sums > threshold, tf.int32), axis=-1, output_type=tf.int32
        )
        if tokens is not None:
            chosen = tf.gather(tokens, chosen, batch_dims=2)
        return None, chosen

    def rank(self, totals, lengths):
        """The log-likelihoods themselves, float32 [B, S]."""
        del lengths
        return totals


@dataclasses.dataclass(frozen=True)
class BeamSearch:
    """Keeps the best partial captions by length-normalized log-likelihood.

    Attributes:
        num_beams: Number of partial captions to keep.
        length_penalty: Exponent a of ((5 + tokens) / 6)^a, which divides the
            log-likelihood (arXiv 1609.08144, eq. 14); 0 ranks by likelihood,
            which prefers short captions.
    """

    num_beams: int = 4
    length_penalty: float = 0.6

    def __post_init__(self):
        check_counts(num_beams=self.num_beams)
        check_number("length_penalty", self.length_penalty)

    def choose(self, totals, scores, lengths, uniform):
        """Chooses the next token of each sequence.

        Args:
            totals: float32 [B, S], log-likelihoods so far.
            scores: float32 [B, S, V], log-probabilities of the next token,
                `BANNED` for banned tokens; 0 for pad after the end.
            lengths: int32 [B, S], tokens of each sequence with the next one.
            uniform: float32 [B, S] in [0, 1), random numbers for sampling.

        Returns:
            (parents, tokens): the sequence that each one continues, int32
            [B, S], or None if each continues its own; and the next token,
            int32 [B, S].
        """
        del uniform
        beams, vocabulary = scores.shape[1:]
        ranked = (
            self.rank(totals, lengths)[..., None]
            + scores / self._penalty(lengths)[..., None]
        )
        ranked = tf.reshape(ranked, [-1, beams * vocabulary])
        places = tf.math.top_k(ranked, beams).indices
        return places // vocabulary, places % vocabulary

    def rank(self, totals, lengths):
        """Scores that order the sequences of an image, float32 [B, S].

        Args:
            totals: float32 [B, S], log-likelihoods.
            lengths: int32 [B, S], number of tokens including eos.
        """
        return totals / self._penalty(lengths)

    def _penalty(self, lengths):
        return ((5.0 + tf.cast(lengths, tf.float32)) / 6) ** self.length_penalty


def search_of(sampler):
    """Returns the search that implements a sampler.

    Args:
        sampler: None (greedy), a search of this module, or a `GreedySampler`,
            `RandomSampler`, `TopKSampler` or `TopPSampler` of
            `keras_nlp.samplers`.

    Raises:
        ValueError: If the sampler is of another kind or has its own seed.
    """
    if sampler is None:
        return GreedySearch()
    if isinstance(sampler, GreedySearch | RandomSearch | BeamSearch):
        return sampler
    # Takes seconds to import, and the default does not need it.
    from keras_nlp import samplers

    known = (
        samplers.GreedySampler,
        samplers.RandomSampler,
        samplers.TopKSampler,
        samplers.TopPSampler,
    )
    if type(sampler) not in known:
        names = ", ".join(kind.__name__ for kind in known)
        raise ValueError(
            "`sampler` must be None, a `BeamSearch` of cappa_tf or one of "
            f"keras_nlp's {names}. Received: sampler={sampler!r}"
        )
    if isinstance(sampler, samplers.GreedySampler):
        return GreedySearch()
    if sampler.seed is not None:
        raise ValueError(
            "The seed is an argument of `generate`, not of the sampler. "
            f"Received: {type(sampler).__name__}(seed={sampler.seed!r})"
        )
    return RandomSearch(
        sampler.temperature,
        getattr(sampler, "k", None),
        getattr(sampler, "p", 1.0),
    )


@dataclasses.dataclass(frozen=True)
class Rules:
    """Constraints on a caption, for every search.

    Attributes:
        min_length: Minimum number of tokens before eos.
        no_repeat_ngram: Size of the n-grams that may occur only once; 0 for
            no such rule. If it leaves no token at all, the caption ends.
        special_tokens: Eos ends a caption; pad is never chosen before it.
    """

    min_length: int = 0
    no_repeat_ngram: int = 0
    special_tokens: SpecialTokens = SpecialTokens()

    def __post_init__(self):
        check_integer("min_length", self.min_length)
        check_integer("no_repeat_ngram", self.no_repeat_ngram)

    def apply(self, scores, tokens, i):
        """Bans tokens at position i.

        Args:
            scores: float32 [N, V].
            tokens: int32 [N, L], of which those before i are filled.
            i: int32 [] or [N].

        Returns:
            float32 [N, V], with `BANNED` for banned tokens.
        """
        vocabulary = tf.range(scores.shape[-1])
        is_eos = vocabulary == self.special_tokens.eos
        banned = vocabulary == self.special_tokens.pad
        i = tf.reshape(i, [-1, 1])
        banned |= is_eos & (i < self.min_length)
        free, scores = scores, tf.where(banned, BANNED, scores)
        if not 0 < self.no_repeat_ngram <= tokens.shape[1]:
            return scores
        scores = _ban(scores, self._repeating(tokens, i[:, 0]))
        nothing = tf.reduce_max(scores, -1, keepdims=True) <= BANNED
        return tf.where(nothing & is_eos, free, scores)

    def _repeating(self, tokens, i):
        """Tokens [N, windows] that would repeat an n-gram; pad for none."""
        n = self.no_repeat_ngram
        windows = tokens.shape[1] - n + 1
        same = tf.ones([tf.shape(tokens)[0], windows], tf.bool)
        i = tf.broadcast_to(i, [tf.shape(tokens)[0]])[:, None]
        for offset in range(n - 1):
            place = tf.maximum(i - n + 1 + offset, 0)
            last = tf.gather(tokens, place, batch_dims=1)  # -> [N, 1]
            same &= tokens[:, offset : offset + windows] == last
        # Only complete n-grams count, after n - 1 tokens to compare with.
        same &= tf.range(windows) + n <= i
        return tf.where(same, tokens[:, n - 1 :], self.special_tokens.pad)


def _ban(scores, tokens):
    """Bans tokens [N, any]; pad, which is banned anyway, stands for none."""
    rows = tf.range(tf.shape(tokens)[0])[:, None]
    places = tf.stack([tf.broadcast_to(rows, tf.shape(tokens)), tokens], -1)
    return tf.tensor_scatter_nd_update(
        scores, places, tf.fill(tf.shape(tokens), BANNED)
    )
