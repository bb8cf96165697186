"""Stateless random numbers, with an independent stream for each example.

Dropout masks, patch choices and sampled objectives must not depend on how a
batch is split over replicas or microbatches, and must repeat when a run is
resumed. So every random number is a pure function of (seed of the example,
salt of the place that uses it, position in the tensor). No seed variable is
involved, as a compiled replica cannot read one of another device. Only a loop
that passes no seeds, such as `fit` on an exported encoder, takes them from a
`SeedGenerator`, as Keras' own layers do.

B: batch.
"""

import zlib

import keras
from keras import ops

_GOLDEN = 0x9E3779B9


def _mix(x):
    """A 32-bit finalizer: every input bit changes half the output bits.

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
    """Reduces x modulo 2**32, which matters under PyTorch only.

    PyTorch has no arithmetic for uint32, so Keras holds it there in 64 signed
    bits; products then agree in their low 32 bits.
    """
    return ops.bitwise_and(x, _u32(0xFFFFFFFF))


def salt_of(name):
    """A stable 32-bit hash of a name (Python's `hash` changes per run)."""
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
    # In two steps, as 2**32 does not fit into the 32 bits of JAX's default.
    high = ops.floor_divide(ops.floor_divide(index, 2**16), 2**16)
    low = ops.cast(index - high * 2**16 * 2**16, "uint32")
    high = ops.cast(high, "uint32")
    mixed = _mix(ops.bitwise_xor(low, _u32(seed % 2**32)))
    return _mix(mixed + high * _u32(_GOLDEN) + _u32(_GOLDEN))


def seed_generator(name):
    """A Keras seed generator whose seed is a hash of a name.

    A random seed would come from the generator of the initial weights, which
    would then depend on whether a layer has dropout.
    """
    # The PyTorch backend keeps the state in 32 signed bits.
    return keras.random.SeedGenerator(salt_of(name) % 2**31)


def next_seeds(generator, batch_size):
    """Seeds for the examples of a batch that was passed without seeds.

    Args:
        generator: From `seed_generator`; its state advances.
        batch_size: B.

    Returns:
        uint32 [B], different at every call.
    """
    state = ops.cast(generator.next(), "uint32")
    stream = _mix(_mix(state[0]) + state[1] * _u32(_GOLDEN))
    index = ops.cast(ops.arange(batch_size, dtype="int32"), "uint32")
    return _mix(stream + index * _u32(_GOLDEN))


def uniform(seeds, shape, salt):
    """Uniform numbers in [0, 1), independent for each example.

    Args:
        seeds: uint32 [B], from `example_seeds`.
        shape: Tuple of ints without the batch dimension; any of them may be a
            scalar tensor.
        salt: Python int that separates this stream from others of the example.

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
    # Cast through int32, as a direct cast of uint32 to float is slow on CPU.
    bits = ops.cast(ops.right_shift(bits, _u32(8)), "int32")
    values = ops.cast(bits, "float32") * 2.0**-24
    return ops.reshape(values, (-1, *shape))


def keep_tokens(x, share, seeds, salt):
    """Keeps a random subset of each example's tokens, in their order.

    Args:
        x: [B, P, D], P static.
        share: Fraction of the tokens to keep; at least one is.
        seeds: uint32 [B].
        salt: As of `uniform`.

    Returns:
        [B, `num_kept(P, share)`, D].
    """
    order = uniform(seeds, (x.shape[1],), salt)
    kept = ops.argsort(order, axis=1)[:, : num_kept(x.shape[1], share)]
    kept = ops.sort(kept, axis=1)
    return ops.take_along_axis(x, ops.expand_dims(kept, -1), axis=1)


def num_kept(tokens, share):
    """Number of tokens that `keep_tokens` keeps, at least 1."""
    return max(1, round(tokens * share))


def dropout(x, rate, seeds, salt):
    """Zeroes a fraction `rate` of x [B, ...] and scales up the rest."""
    keep = uniform(seeds, tuple(ops.shape(x)[1:]), salt) >= rate
    scale = ops.cast(1.0 / (1.0 - rate), x.dtype)
    return ops.where(keep, x * scale, ops.zeros_like(x))


def set_salt_prefix(part, prefix):
    """Gives the random layers of one part of a model salts of their own.

    Otherwise two towers whose blocks have equal names would drop the same
    elements.

    Args:
        part: A layer or model; `set_salt_prefix` is called on every layer
            inside that has it.
        prefix: Name of the part in the model.
    """
    for layer in part._flatten_layers():
        if hasattr(layer, "set_salt_prefix"):
            layer.set_salt_prefix(prefix)


@keras.saving.register_keras_serializable("cappa_tf")
class StatelessDropout(keras.layers.Layer):
    """Dropout whose mask is a function of the example's seed.

    Args:
        rate: Fraction of elements set to zero in training, in [0, 1).
        salt: Name that separates this layer's random numbers from others,
            unique within its part of the model (`set_salt_prefix`).
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
        """Makes the salt unique across parts; `prefix` names the part."""
        self._salt = salt_of(f"{prefix}/{self.salt}")

    def call(self, x, seeds=None, training=False):
        """Applies dropout.

        Call arguments:
            x: [B, ...].
            seeds: uint32 [B]; by default from `seed_generator`.
            training: Whether to drop elements.

        Returns:
            Tensor of the shape and dtype of x.
        """
        if not training or self.rate == 0.0:
            return x
        if seeds is None:
            seeds = next_seeds(self.seed_generator, ops.shape(x)[0])
        return self._drop(x, seeds)

    def _drop(self, x, seeds):
        return dropout(x, self.rate, seeds, self._salt)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "rate": self.rate, "salt": self.salt}


@keras.saving.register_keras_serializable("cappa_tf")
class StochasticDepth(StatelessDropout):
    """Drops the whole residual branch of an example, or scales it up.

    Args:
        rate: Fraction of examples whose branch is zero in training, in [0, 1).
        salt: As of `StatelessDropout`.

    Reference: "Deep Networks with Stochastic Depth" (arXiv 1603.09382).
    """

    def _drop(self, x, seeds):
        keep = uniform(seeds, (1,) * (len(x.shape) - 1), self._salt)
        scale = ops.cast(keep >= self.rate, x.dtype) / (1.0 - self.rate)
        return x * ops.cast(scale, x.dtype)
