"""Building blocks of encoder and decoder.

Written with `keras.ops` only, so that a saved encoder opens under every Keras
backend. Numerics follow big_vision (models/vit.py, models/proj/cappa/cappa.py).

Abbreviations for dimensions:
    B: batch (of images).      N: batch of captions, K captions an image.
    P: number of patches.      L: length of the text.
    T: queries.                S: keys and values.
    D: width.                  H: heads.  C: width of one head, D / H.
"""

import keras
import numpy as np
from keras import ops

from cappa_tf.checks import (
    check_bool,
    check_choice,
    check_counts,
    check_fraction,
)
from cappa_tf.models.random import StatelessDropout

_EPSILON = 1e-6  # of every LayerNorm (flax's default).


def layer_norm(name, dtype, use_bias=True):
    """A LayerNorm with the reference's epsilon; `use_bias` keeps `beta`."""
    return keras.layers.LayerNormalization(
        epsilon=_EPSILON, center=use_bias, name=name, dtype=dtype
    )


@keras.saving.register_keras_serializable("cappa_tf")
class MultiHeadAttention(keras.layers.Layer):
    """Multi-head dot-product attention with explicit keys and values.

    Keys and values are projected by a method of their own, `project`, so that
    those of an image are computed once however many captions attend to them,
    and so that a decoding loop can keep them (KV cache).

    Kernels are [D, H, C] and [H, C, D] like the reference's: the optimizer's
    factored statistics are then per head.

    Args:
        hidden_dim: Width D of queries and output.
        num_heads: Number of heads H; divides D.
        use_bias: Whether the four projections have biases.
        kernel_initializer: Of the four kernels (fans as of a [D, D] matrix).
    """

    def __init__(
        self,
        hidden_dim,
        num_heads,
        *,
        use_bias=True,
        kernel_initializer="glorot_uniform",
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_counts(hidden_dim=hidden_dim, num_heads=num_heads)
        check_bool(use_bias=use_bias)
        if hidden_dim % num_heads != 0:
            raise ValueError(
                "`hidden_dim` must be divisible by `num_heads`. Received: "
                f"hidden_dim={hidden_dim}, num_heads={num_heads}"
            )
        self.hidden_dim = hidden_dim
        self.num_heads = num_heads
        self.use_bias = use_bias
        self.kernel_initializer = kernel_initializer
        head_dim = hidden_dim // num_heads
        self._scale = head_dim**-0.5
        self._query, self._key, self._value = (
            self._projection(name, "btd,dhc->bthc", (None, num_heads, head_dim))
            for name in ("query", "key", "value")
        )
        self._out = self._projection("out", "bthc,hcd->btd", (None, hidden_dim))

    def _projection(self, name, equation, output_shape):
        return keras.layers.EinsumDense(
            equation,
            output_shape=output_shape,
            bias_axes=None
            if not self.use_bias
            else ("d" if name == "out" else "hc"),
            kernel_initializer=_FlatFans(self.kernel_initializer, name),
            name=name,
            dtype=self.dtype_policy,
        )

    def build(self, query_shape, memory_shape=None):
        """Creates the projections; memory_shape defaults to query_shape."""
        memory_shape = memory_shape or query_shape
        self._query.build((None, None, query_shape[-1]))
        self._key.build((None, None, memory_shape[-1]))
        self._value.build((None, None, memory_shape[-1]))
        head_dim = self.hidden_dim // self.num_heads
        self._out.build((None, None, self.num_heads, head_dim))

    def project(self, memory):
        """Keys and values of what is attended to.

        Args:
            memory: [B, S, E].

        Returns:
            Two tensors [B, H, S, C]: turned here, once, and not by each call
            that attends to them.
        """
        keys, values = self._key(memory), self._value(memory)
        return tuple(ops.transpose(x, (0, 2, 1, 3)) for x in (keys, values))

    def call(self, x, keys, values, attention_mask=None):
        """Attends from x to the given keys and values.

        Call arguments:
            x: [B, T, D].
            keys: [B, H, S, C], from `project`.
            values: [B, H, S, C], from `project`.
            attention_mask: Optional bool, broadcastable to [B, H, T, S];
                True where a query may look.

        Returns:
            [B, T, D].
        """
        query = self._query(x) * ops.cast(self._scale, self.compute_dtype)
        query = ops.transpose(query, (0, 2, 1, 3))  # -> [B, H, T, C]
        scores = ops.einsum("bhtc,bhsc->bhts", query, keys)
        scores = ops.cast(scores, "float32")
        if attention_mask is not None:
            scores = ops.where(attention_mask, scores, -1e30)
        weights = ops.cast(ops.softmax(scores, axis=-1), self.compute_dtype)
        out = ops.transpose(ops.matmul(weights, values), (0, 2, 1, 3))
        return self._out(out)  # [B, T, H, C] -> [B, T, D]

    def compute_output_shape(self, x_shape, *unused, **also_unused):
        """The shape of the queries."""
        return (*x_shape[:-1], self.hidden_dim)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "hidden_dim": self.hidden_dim,
            "num_heads": self.num_heads,
            "use_bias": self.use_bias,
            "kernel_initializer": self.kernel_initializer,
        }


@keras.saving.register_keras_serializable("cappa_tf")
class _FlatFans(keras.initializers.Initializer):
    """Initialises an attention kernel as the [D, H * C] matrix it stands for.

    Keras would read [D, H, C] as a convolution and take wrong fans.
    """

    def __init__(self, name, projection):
        self.name = name
        self.projection = projection
        self._initializer = keras.initializers.get(name)

    def __call__(self, shape, dtype=None):
        flat = (
            (shape[0] * shape[1], shape[2])
            if self.projection == "out"
            else (shape[0], shape[1] * shape[2])
        )
        return ops.reshape(self._initializer(flat, dtype=dtype), shape)

    def get_config(self):
        return {"name": self.name, "projection": self.projection}


@keras.saving.register_keras_serializable("cappa_tf")
class MLP(keras.layers.Layer):
    """Two dense layers with a tanh-approximated gelu between them.

    Args:
        mlp_dim: Width of the hidden layer.
        use_bias: Whether both layers have biases.
        dropout: Dropout rate after the gelu.
        salt: Name that tells this dropout's draws from others (unique
            within a model).
    """

    def __init__(
        self, mlp_dim, *, use_bias=True, dropout=0.0, salt="mlp", **kwargs
    ):
        super().__init__(**kwargs)
        check_counts(mlp_dim=mlp_dim)
        check_bool(use_bias=use_bias)
        check_fraction(dropout=dropout)
        self.mlp_dim = mlp_dim
        self.use_bias = use_bias
        self.dropout = dropout
        self.salt = salt
        self._dropout = StatelessDropout(
            dropout, salt, name="dropout", dtype=self.dtype_policy
        )

    def build(self, input_shape):
        """Creates both dense layers for inputs [B, T, D]."""
        args = {
            "use_bias": self.use_bias,
            "kernel_initializer": "glorot_uniform",
            "bias_initializer": keras.initializers.RandomNormal(stddev=1e-6),
            "dtype": self.dtype_policy,
        }
        width = input_shape[-1]
        self._expand = keras.layers.Dense(self.mlp_dim, name="expand", **args)
        self._project = keras.layers.Dense(width, name="project", **args)
        self._expand.build((None, None, width))
        self._project.build((None, None, self.mlp_dim))

    def call(self, x, seeds=None, training=False):
        """Maps x [B, T, D] to [B, T, D].

        Call arguments:
            x: [B, T, D].
            seeds: uint32 [B], see `StatelessDropout`.
            training: Whether to drop.
        """
        x = ops.gelu(self._expand(x), approximate=True)
        return self._project(self._dropout(x, seeds, training=training))

    def compute_output_shape(self, input_shape, *unused, **also_unused):
        """The shape of the input."""
        return input_shape

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "mlp_dim": self.mlp_dim,
            "use_bias": self.use_bias,
            "dropout": self.dropout,
            "salt": self.salt,
        }


@keras.saving.register_keras_serializable("cappa_tf")
class PatchEmbedding(keras.layers.Layer):
    """Cuts images into patches and projects each one.

    A convolution with stride = kernel size (its kernel has that shape), done
    as one matrix product, which is faster on CPU in both directions.

    Args:
        hidden_dim: Width D of the embeddings.
        patch_size: (height, width) of a patch in pixels.
    """

    def __init__(self, hidden_dim, patch_size, **kwargs):
        super().__init__(**kwargs)
        self.hidden_dim = hidden_dim
        self.patch_size = tuple(patch_size)

    def build(self, input_shape):
        """Creates kernel [h, w, channels, D] and bias [D]."""
        self.kernel = self.add_weight(
            name="kernel",
            shape=(*self.patch_size, input_shape[-1], self.hidden_dim),
            initializer="lecun_normal",
        )
        self.bias = self.add_weight(
            name="bias", shape=(self.hidden_dim,), initializer="zeros"
        )

    def call(self, images):
        """Maps images [B, H, W, channels] to [B, P, D], row by row."""
        height, width, channels = images.shape[1:]
        h, w = self.patch_size
        rows, columns = height // h, width // w
        x = ops.reshape(images, (-1, rows, h, columns, w, channels))
        x = ops.transpose(x, (0, 1, 3, 2, 4, 5))
        x = ops.reshape(x, (-1, rows * columns, h * w * channels))
        kernel = ops.reshape(self.kernel, (-1, self.hidden_dim))
        return ops.matmul(x, kernel) + self.bias

    def compute_output_shape(self, input_shape):
        """[B, P, D]."""
        h, w = self.patch_size
        patches = (input_shape[1] // h) * (input_shape[2] // w)
        return (input_shape[0], patches, self.hidden_dim)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "hidden_dim": self.hidden_dim,
            "patch_size": self.patch_size,
        }


def sincos2d(height, width, dim, temperature=10_000.0):
    """Fixed two-dimensional sine / cosine positions (MoCo v3's order).

    Args:
        height: Rows of the grid.
        width: Columns of the grid.
        dim: Width D of the embedding, a multiple of 4 and at least 8.
        temperature: Ratio of the longest to the shortest wavelength.

    Returns:
        NumPy float32 [1, height * width, dim]: sin(x), cos(x), sin(y), cos(y).

    Reference: big_vision models/vit.py `posemb_sincos_2d`.
    """
    if dim % 4 != 0 or dim < 8:
        raise ValueError(
            "sincos2d positions need a width that is a multiple of 4 and at "
            f"least 8. Received: dim={dim}"
        )
    omega = np.arange(dim // 4) / (dim // 4 - 1)
    omega = 1.0 / temperature**omega
    y, x = np.mgrid[:height, :width]
    y = y.reshape(-1, 1) * omega  # -> [P, D / 4]
    x = x.reshape(-1, 1) * omega
    table = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], 1)
    return table[None].astype("float32")


@keras.saving.register_keras_serializable("cappa_tf")
class PositionEmbedding(keras.layers.Layer):
    """Adds positions of a grid (an image's patches, or one row of text).

    Args:
        grid: (rows, columns); text of length L has the grid (1, L).
        kind: "learned" (N(0, 1/sqrt(D)) at the start) or "sincos2d" (fixed).
    """

    def __init__(self, grid, kind="learned", **kwargs):
        super().__init__(**kwargs)
        check_choice(("learned", "sincos2d"), kind=kind)
        self.grid = tuple(grid)
        self.kind = kind

    def build(self, input_shape):
        """Creates the table [1, rows * columns, D]."""
        dim = input_shape[-1]
        rows, columns = self.grid
        if self.kind == "sincos2d":
            self.position_embedding = sincos2d(rows, columns, dim)
            return
        self.position_embedding = self.add_weight(
            name="position_embedding",
            shape=(1, rows * columns, dim),
            initializer=keras.initializers.RandomNormal(stddev=dim**-0.5),
        )

    def table(self):
        """The positions [1, rows * columns, D] in the compute dtype."""
        return ops.cast(self.position_embedding, self.compute_dtype)

    def call(self, x):
        """Adds the first T positions to x [B, T, D]."""
        return x + self.table()[:, : ops.shape(x)[1]]

    def compute_output_shape(self, input_shape):
        """The shape of the input."""
        return input_shape

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "grid": self.grid, "kind": self.kind}
