"""Stateless random numbers, one independent stream for each example.

Dropout masks, patch choices and objective draws must not depend on how a
batch is split over replicas or microbatches, and must repeat when a run is
resumed. So every draw is a pure function of (seed of the example, salt of the
place that draws, position in the tensor). No seed variable is involved: one
of another device cannot be read inside a compiled replica. Only a loop that
gives no seeds, such as `fit` of an exported encoder, gets them from a
`SeedGenerator`, as Keras' own layers do.

Abbreviations: B batch.
"""

import zlib

import keras
from keras import ops

_GOLDEN = 0x9E3779B9


def _mix(x):
    """A 32-bit finaliser: every input bit changes half the output bits.

    Constants: "lowbias32" of Chris Wellons' hash prospector.
    """
    x = _wrapped(x)
    x = ops.bitwise_xor(x, ops.right_shift(x, _u32(16)))
    x = _wrapped(x * _u32(0x7FEB352D))
    x = ops.bitwise_xor(x, ops.right_shift(x, _u32(15)))
    x = _wrapped(x * _u32(0x846CA68B))
    return ops.bitwise_xor(x, ops.right_shift(x, _u32(16)))


def _u32(value):
    return ops.convert_to_tensor(value, dtype="uint32")


def _wrapped(x):
    """Takes x modulo 2**32, where it is not so already.

    Keras holds uint32 in 64 signed bits under PyTorch, which has no
    arithmetic for it; products then agree in their low 32 bits.
    """
    return ops.bitwise_and(x, _u32(0xFFFFFFFF))


def salt_of(name):
    """A stable 32-bit number for a name (Python's `hash` changes per run)."""
    return zlib.crc32(name.encode())


def example_seeds(seed, index):
    """Mixes the run's seed with the position of each example in the stream.

    Args:
        seed: Python int, the seed of the run.
        index: int32 or int64 [B], position of each example in the stream.

    Returns:
        uint32 [B].
    """
    index = ops.cast(index, "int64")
    # In two steps: JAX has 32 bits by default, where 2**32 does not fit.
    high = ops.floor_divide(ops.floor_divide(index, 2**16), 2**16)
    low = ops.cast(index - high * 2**16 * 2**16, "uint32")
    high = ops.cast(high, "uint32")
    mixed = _mix(ops.bitwise_xor(low, _u32(seed % 2**32)))
    return _mix(mixed + high * _u32(_GOLDEN) + _u32(_GOLDEN))


def seed_generator(name):
    """A Keras seed generator that starts at a number made of a name.

    Not at a random one: that would be drawn from what decides the initial
    weights, which then depended on whether a layer drops.
    """
    # PyTorch's backend keeps the state in 32 signed bits.
    return keras.random.SeedGenerator(salt_of(name) % 2**31)


def next_seeds(generator, batch_size):
    """Seeds of the examples of a batch for which none were given.

    Args:
        generator: From `seed_generator`; it moves on.
        batch_size: B.

    Returns:
        uint32 [B], others at every call.
    """
    state = ops.cast(generator.next(), "uint32")
    stream = _mix(_mix(state[0]) + state[1] * _u32(_GOLDEN))
    index = ops.cast(ops.arange(batch_size, dtype="int32"), "uint32")
    return _mix(stream + index * _u32(_GOLDEN))


def uniform(seeds, shape, salt):
    """Uniform numbers in [0, 1), independent for each example.

    Args:
        seeds: uint32 [B], from `example_seeds`.
        shape: Tuple of ints without the batch, any dimension of it may be a
            scalar tensor.
        salt: Python int that tells this draw from others of the example.

    Returns:
        float32 [B, *shape], multiples of 2**-24.
    """
    size = 1
    for dim in shape:
        size = size * dim
    position = ops.cast(ops.arange(size, dtype="int32"), "uint32")
    stream = _mix(ops.bitwise_xor(seeds, _u32(salt % 2**32)))
    counter = position * _u32(_GOLDEN)
    bits = _mix(ops.expand_dims(stream, 1) + ops.expand_dims(counter, 0))
    # Through int32: a direct cast of uint32 to float is slow on CPU.
    bits = ops.cast(ops.right_shift(bits, _u32(8)), "int32")
    values = ops.cast(bits, "float32") * 2.0**-24
    return ops.reshape(values, (-1, *shape))


def dropout(x, rate, seeds, salt):
    """Zeroes a share `rate` of x [B, ...] and scales the rest up."""
    keep = uniform(seeds, tuple(ops.shape(x)[1:]), salt) >= rate
    scale = ops.cast(1.0 / (1.0 - rate), x.dtype)
    return ops.where(keep, x * scale, ops.zeros_like(x))


def set_salt_prefix(part, prefix):
    """Gives the draws of one part of a model salts of their own.

    Two towers whose blocks have the same names would drop the same elements.

    Args:
        part: A layer or model; whatever inside has `set_salt_prefix` is told.
        prefix: The part's name in the model.
    """
    for layer in part._flatten_layers():
        if hasattr(layer, "set_salt_prefix"):
            layer.set_salt_prefix(prefix)


@keras.saving.register_keras_serializable("cappa_tf")
class StatelessDropout(keras.layers.Layer):
    """Dropout whose mask is a function of the example's seed.

    Args:
        rate: Share of elements set to zero in training, in [0, 1).
        salt: Name that tells this layer's draws from others (unique within
            its part of the model: see `set_salt_prefix`).
    """

    def __init__(self, rate, salt, **kwargs):
        super().__init__(**kwargs)
        if not 0.0 <= rate < 1.0:
            raise ValueError(
                f"`rate` must be in [0, 1). Received: rate={rate!r}"
            )
        self.rate = rate
        self.salt = salt
        self._salt = salt_of(salt)
        self.seed_generator = seed_generator(salt) if rate > 0.0 else None

    def set_salt_prefix(self, prefix):
        """See the function of that name."""
        self._salt = salt_of(f"{prefix}/{self.salt}")

    def call(self, x, seeds=None, training=False):
        """Applies dropout.

        Call arguments:
            x: [B, ...].
            seeds: uint32 [B]; by default those of `seed_generator`.
            training: Whether to drop.

        Returns:
            The same shape and dtype as x.
        """
        if not training or self.rate == 0.0:
            return x
        if seeds is None:
            seeds = next_seeds(self.seed_generator, ops.shape(x)[0])
        return dropout(x, self.rate, seeds, self._salt)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "rate": self.rate, "salt": self.salt}
