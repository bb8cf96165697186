"""Stateless random numbers, a pure function of (seed, purpose, index).

TensorFlow's stateless generators take one seed per call. Here each example of a
batch has its own index, so that its random numbers do not depend on the batch,
device or process it is in. A counter-based hash (the finalizer of splitmix64,
Steele et al. 2014) computes all of them in a few vector operations.

Dimensions:
    B: batch size.
    N: random numbers per example, or elements to permute.
"""

import dataclasses

import tensorflow as tf

# Purposes, which give each kind of random choice its own numbers.
CAPTION = 1
FLIP = 2
CROP = 3
SHIFT = 4
ORDER = 5
BLOCK = 6
MIXTURE = 7
STEP = 8
# The first of those of a list of augmentations, two for each.
AUGMENTATION = 1000

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def bits(seed, purpose, index, count):
    """64 random bits for each example and slot.

    Slot j has the same bits whatever `count` is.

    Args:
        seed: Scalar integer.
        purpose: One of the constants above.
        index: Integers [B] or a scalar.
        count: N.

    Returns:
        uint64 [B, N], or [N] for a scalar index.
    """
    state = _mix(_uint64(seed) + _constant(_GOLDEN))
    state = _mix(state + _uint64(purpose) * _constant(_GOLDEN))
    state = _mix(state + _uint64(index) * _constant(_GOLDEN))
    slots = _uint64(tf.range(tf.cast(count, tf.int64)) + 1)
    return _mix(state[..., tf.newaxis] + slots * _constant(_GOLDEN))


def uniform(seed, purpose, index, count):
    """Uniform float32 in [0, 1), [B, N], with the arguments of `bits`."""
    # A float32 holds 24 bits exactly.
    top = tf.bitwise.right_shift(
        bits(seed, purpose, index, count), _constant(40)
    )
    return tf.cast(top, tf.float32) / float(1 << 24)


@dataclasses.dataclass(frozen=True)
class Draws:
    """Random numbers of one augmentation for a batch.

    Attributes:
        seed: Scalar integer.
        index: int64 [B], position of each example in the training stream.
        step: Position of the first example of the step, scalar int64.
        place: Place of the augmentation among others, which separates their
            numbers.
    """

    seed: int
    index: tf.Tensor
    step: tf.Tensor
    place: int = 0

    def examples(self, count):
        """Uniform numbers of each example, float32 [B, count]."""
        purpose = AUGMENTATION + 2 * self.place
        return uniform(self.seed, purpose, self.index, count)

    def one_of_step(self):
        """A uniform number of the step, the same on all hosts; a scalar."""
        return uniform(self.seed, STEP, self.step, 1 + self.place)[self.place]

    def beta(self, alpha, per_example):
        """Numbers of the distribution Beta(alpha, alpha), float32 [B].

        Args:
            alpha: Number above 0.
            per_example: Whether each example has its own; otherwise all have
                that of the step.
        """
        purpose = AUGMENTATION + 2 * self.place + 1
        index = self.index if per_example else self.step[tf.newaxis]
        seeds = tf.bitcast(bits(self.seed, purpose, index, 4), tf.int64)

        def ratio(seed):
            a, b = (
                tf.random.stateless_gamma([], seed[2 * i : 2 * i + 2], alpha)
                for i in range(2)
            )
            # For a small alpha both may underflow: one end of the interval.
            end = tf.cast(seed[0] > 0, a.dtype)
            return tf.where(a + b > 0.0, tf.math.divide_no_nan(a, a + b), end)

        found = tf.map_fn(ratio, seeds, fn_output_signature=tf.float32)
        return tf.broadcast_to(found, tf.shape(self.index))


def permutation(seed, purpose, index, count):
    """A random permutation of range(N), int64 [N], for a scalar index."""
    # One bit less, as sorting needs signed integers. Equal keys (a probability
    # of 2^-63 per pair) keep their order, which is still a permutation.
    keys = tf.cast(
        tf.bitwise.right_shift(bits(seed, purpose, index, count), _constant(1)),
        tf.int64,
    )
    return tf.cast(tf.argsort(keys, stable=True), tf.int64)


def _mix(x):
    """The finalizer of splitmix64: each input bit affects each output bit."""
    x = tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, _constant(30)))
    x = x * _constant(_MIX_1)
    x = tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, _constant(27)))
    x = x * _constant(_MIX_2)
    return tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, _constant(31)))


def _uint64(x):
    return tf.cast(x, tf.uint64)


def _constant(x):
    return tf.constant(x, tf.uint64)
