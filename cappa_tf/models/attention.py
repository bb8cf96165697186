"""Multi-head attention with cached keys and values.

Written with `keras.ops` only, so that a saved encoder opens under every Keras
backend. Numerics follow big_vision (models/vit.py, models/proj/cappa/cappa.py).

Abbreviations for dimensions:
    B: batch (of images).      N: batch of captions, K captions an image.
    T: queries.                S: keys and values.
    D: width.                  H: heads.  C: width of one head, D / H.
"""

import keras
from keras import ops

from cappa_tf.models.linear import linear
from cappa_tf.models.norms import RMSNorm
from cappa_tf.models.positions import rotate
from cappa_tf.utils.arguments import (
    check_bool,
    check_counts,
)


def by_head(projected):
    """Transposes keys or values [B, S, H, C] to [B, H, S, C]."""
    return ops.transpose(projected, (0, 2, 1, 3))


@keras.saving.register_keras_serializable("cappa_tf")
class MultiHeadAttention(keras.layers.Layer):
    """Multi-head dot-product attention with explicit keys and values.

    A separate method, `project`, computes keys and values. So those of an image
    are computed once however many captions attend to them, and a decoding loop
    can cache them (KV cache).

    Kernels are [D, H, C] and [H, C, D] as in the reference, so that the
    optimizer's factored statistics are per head.

    Args:
        hidden_dim: Width D of queries and output.
        num_heads: Number of heads H; divides D.
        use_bias: Whether the four projections have biases.
        kernel_initializer: Initializer of the four kernels, in any form that
            `keras.initializers.get` takes; the fans are those of a [D, D]
            matrix.
        query_key_norm: Whether queries and keys of each head have an RMSNorm,
            whose scale [C] the heads share.
    """

    def __init__(
        self,
        hidden_dim,
        num_heads,
        *,
        use_bias=True,
        kernel_initializer="glorot_uniform",
        query_key_norm=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_counts(hidden_dim=hidden_dim, num_heads=num_heads)
        check_bool(use_bias=use_bias, query_key_norm=query_key_norm)
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
        # One product for all three takes as long on a CPU, as measured at the
        # sizes of S/16 and B/16.
        self._query, self._key, self._value = (
            self._projection(name, "btd,dhc->bthc", (None, num_heads, head_dim))
            for name in ("query", "key", "value")
        )
        self._out = self._projection("out", "bthc,hcd->btd", (None, hidden_dim))
        self.query_key_norm = query_key_norm
        if query_key_norm:
            self._query_norm, self._key_norm = (
                RMSNorm(name=f"{name}_norm", dtype=self.dtype_policy)
                for name in ("query", "key")
            )

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
        """Creates the projections; `memory_shape` is `query_shape` if None."""
        memory_shape = memory_shape or query_shape
        self._query.build((None, None, query_shape[-1]))
        self._key.build((None, None, memory_shape[-1]))
        self._value.build((None, None, memory_shape[-1]))
        head_dim = self.hidden_dim // self.num_heads
        self._out.build((None, None, self.num_heads, head_dim))
        if self.query_key_norm:
            for norm in (self._query_norm, self._key_norm):
                norm.build((None, None, self.num_heads, head_dim))

    def project(self, memory, rotation=None):
        """Projects the attended sequence to keys and values.

        Args:
            memory: [B, S, E].
            rotation: `Rotation` of the keys' positions; None if positions do
                not rotate.

        Returns:
            Two tensors [B, S, H, C].
        """
        keys = _as_one_product(self._key, memory)
        if self.query_key_norm:
            keys = self._key_norm(keys)
        values = _as_one_product(self._value, memory)
        return rotate(keys, rotation), values

    def call(
        self,
        x,
        keys,
        values,
        attention_mask=None,
        by_head=False,
        rotation=None,
    ):
        """Attends from x to the given keys and values.

        Call arguments:
            x: [B, T, D].
            keys: [B, S, H, C], from `project`.
            values: [B, S, H, C], from `project`.
            attention_mask: Optional bool, broadcastable to [B, H, T, S]; True
                for the keys that a query may attend to.
            by_head: Whether keys and values are [B, H, S, C], as transposed by
                the function `by_head`. A loop that attends to them repeatedly
                then need not transpose them each time.
            rotation: Of the queries' positions, as in `project`.

        Returns:
            [B, T, D].
        """
        weights = self.attention_weights(
            x, keys, attention_mask, by_head, rotation
        )
        weights = ops.cast(weights, self.compute_dtype)
        if not by_head:
            values = ops.transpose(values, (0, 2, 1, 3))  # -> [B, H, S, C]
        out = ops.transpose(ops.matmul(weights, values), (0, 2, 1, 3))
        return _as_one_product(self._out, out)  # -> [B, T, D]

    def attention_weights(
        self, x, keys, attention_mask=None, by_head=False, rotation=None
    ):
        """How much each query attends to each key.

        Args:
            x: As in `call`, as are the others.
            keys: [B, S, H, C].
            attention_mask: Optional bool.
            by_head: Whether keys are [B, H, S, C].
            rotation: Of the queries' positions.

        Returns:
            float32 [B, H, T, S], which sum to 1 over S.
        """
        query = _as_one_product(self._query, x)
        if self.query_key_norm:
            query = self._query_norm(query)
        query = rotate(query, rotation)
        query = query * ops.cast(self._scale, self.compute_dtype)
        query = ops.transpose(query, (0, 2, 1, 3))  # -> [B, H, T, C]
        if by_head:
            scores = ops.einsum("bhtc,bhsc->bhts", query, keys)
        else:
            keys = ops.transpose(keys, (0, 2, 3, 1))  # -> [B, H, C, S]
            scores = ops.matmul(query, keys)
        scores = ops.cast(scores, "float32")
        if attention_mask is not None:
            scores = ops.where(attention_mask, scores, -1e30)
        return ops.softmax(scores, axis=-1)

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
            "kernel_initializer": _serialized(self.kernel_initializer),
            "query_key_norm": self.query_key_norm,
        }


def _as_one_product(layer, x):
    """Applies a projection to the rows of all positions of a batch.

    Args:
        layer: One of the projections.
        x: [B, T, D], or [B, T, H, C] for the output's.

    Returns:
        `layer(x)`, but for rounding.
    """
    batch, length, *rest = ops.shape(x)
    y = linear(layer, ops.reshape(x, (batch * length, *rest)))
    return ops.reshape(y, (batch, length, *ops.shape(y)[1:]))


@keras.saving.register_keras_serializable("cappa_tf")
class _FlatFans(keras.initializers.Initializer):
    """Initializes an attention kernel as the [D, H * C] matrix it represents.

    Keras would treat [D, H, C] as a convolution kernel and use wrong fans.
    """

    def __init__(self, name, projection):
        self.name = name
        self.projection = projection
        # If the four kernels shared an initializer, they would be equal.
        is_made = isinstance(name, keras.initializers.Initializer)
        self._initializer = (
            name.clone() if is_made else keras.initializers.get(name)
        )

    def __call__(self, shape, dtype=None):
        flat = (
            (shape[0] * shape[1], shape[2])
            if self.projection == "out"
            else (shape[0], shape[1] * shape[2])
        )
        return ops.reshape(self._initializer(flat, dtype=dtype), shape)

    def get_config(self):
        name = _serialized(self.name)
        return {"name": name, "projection": self.projection}


def _serialized(initializer):
    """The config of an initializer, or its name."""
    if isinstance(initializer, keras.initializers.Initializer):
        return keras.initializers.serialize(initializer)
    return initializer
