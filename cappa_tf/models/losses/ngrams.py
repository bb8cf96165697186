"""n-grams of token ids, found and counted inside a graph.

n-grams are hashed modulo a prime: two different ones share a hash once in some
billion pairs, and are then counted as one.

Abbreviations for dimensions:
    B: batch (of images).      S: sampled captions per image.
    K: references per image.   L, M: their lengths in tokens.
"""

from typing import NamedTuple

import tensorflow as tf

# n-grams of 1 to 4 tokens, in CIDEr as in BLEU.
ORDERS = 4

# A polynomial modulo a prime, whose products stay below 2 ** 62.
_BASE, _PRIME = 1_000_003, 2**31 - 1


class Ngrams(NamedTuple):
    """The n-grams that begin at each position of texts.

    Attributes:
        hashes: int64 [..., L].
        real: bool [..., L], whether all their tokens are in the text.
    """

    hashes: object
    real: object

    @classmethod
    def of(cls, tokens, n, pad):
        """Finds them.

        Args:
            tokens: int32 [..., L], padded at the end.
            n: Tokens of an n-gram.
            pad: Id of the padding.
        """
        tokens = tf.convert_to_tensor(tokens)
        length = tf.shape(tokens)[-1]
        room = [[0, 0]] * (tokens.shape.rank - 1) + [[0, n - 1]]
        tokens = tf.pad(tokens, room, constant_values=pad)
        hashes = tf.zeros([], tf.int64)
        for i in range(n):
            token = tf.cast(tokens[..., i : i + length], tf.int64)
            hashes = (hashes * _BASE + token + 1) % _PRIME
        # The last token is real only if those before it are.
        return cls(hashes, token != pad)

    def counts(self):
        """How often each occurs in its text, float32 [..., L], at least 1."""
        return tf.maximum(_count(self.hashes, self), 1.0)

    def counts_in(self, references):
        """How often each occurs in each reference, float32 [B, S, K, L].

        Args:
            references: `Ngrams` [B, K, M]; these are [B, S, L].
        """
        one = Ngrams(references.hashes[:, None], references.real[:, None])
        return _count(self.hashes[:, :, None], one)


def _count(hashes, ngrams):
    """How often hashes [..., L] occur among n-grams [..., M]."""
    same = hashes[..., None] == ngrams.hashes[..., None, :]
    same &= ngrams.real[..., None, :]
    return tf.reduce_sum(tf.cast(same, tf.float32), -1)


def lengths(tokens, pad):
    """Number of tokens of texts, float32 [...]."""
    return tf.reduce_sum(tf.cast(tokens != pad, tf.float32), -1)
