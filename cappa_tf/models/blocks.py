"""Transformer blocks of encoder and decoder, and attention pooling.

Abbreviations for dimensions:
    B: batch (of images).      N: batch of captions, K captions per image.
    P: number of patches.      L: length of the text.
    D: width.                  H: heads.  C: width of one head, D / H.
"""

import keras
from keras import ops

from cappa_tf.models.attention import MultiHeadAttention
from cappa_tf.models.block_style import BlockStyle
from cappa_tf.models.mlp import MLP
from cappa_tf.models.norms import layer_norm
from cappa_tf.models.stateless_random import (
    StatelessDropout,
    StochasticDepth,
)


@keras.saving.register_keras_serializable("cappa_tf")
class EncoderBlock(keras.layers.Layer):
    """Pre-LayerNorm self-attention and MLP, each with a residual connection.

    Args:
        hidden_dim: Width D.
        num_heads: Attention heads; divides D.
        mlp_dim: Hidden width of the MLP.
        dropout: Dropout rate after attention, in the MLP and after it.
        stochastic_depth: Fraction of the examples that skip attention in
            training, and of those that skip the MLP.
        style: `BlockStyle`, or None for the default.

    Reference: big_vision models/vit.py `Encoder1DBlock`, which has no
    stochastic depth.
    """

    def __init__(
        self,
        hidden_dim,
        num_heads,
        *,
        mlp_dim,
        dropout=0.0,
        stochastic_depth=0.0,
        style=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        style = BlockStyle.of(style)
        self.hidden_dim = hidden_dim
        self.num_heads = num_heads
        self.mlp_dim = mlp_dim
        self.dropout = dropout
        dtype = self.dtype_policy
        self.style = style
        self._attention_norm = style.make_norm("attention_norm", dtype)
        self._attention = MultiHeadAttention(
            hidden_dim,
            num_heads,
            use_bias=style.bias(True),
            query_key_norm=style.query_key_norm,
            name="attention",
            dtype=dtype,
        )
        self._mlp_norm = style.make_norm("mlp_norm", dtype)
        self._mlp = MLP(
            mlp_dim,
            use_bias=style.bias(True),
            dropout=dropout,
            salt=f"{self.name}/mlp",
            style=style,
            name="mlp",
            dtype=dtype,
        )
        self._post_norms = _post_norms(style, dtype, True, ("attention",))
        places = ("attention", "mlp")
        self._drops = _dropouts(self, dropout, places)
        self.stochastic_depth = stochastic_depth
        self._skips = _dropouts(
            self, stochastic_depth, places, StochasticDepth, "skip"
        )

    def build(self, input_shape):
        """Creates the block for inputs [B, P, D]."""
        shape = (None, None, input_shape[-1])
        for part in (
            self._attention_norm,
            self._attention,
            self._mlp_norm,
            *self._post_norms.values(),
        ):
            part.build(shape)
        self._mlp.build(shape)

    def call(self, x, seeds=None, training=False):
        """Maps x [B, P, D] to [B, P, D].

        Call arguments:
            x: [B, P, D].
            seeds: uint32 [B], dropout seeds, as in `StatelessDropout`.
            training: Whether to apply dropout.
        """
        y = self._attention_norm(x)
        y = self._attention(y, *self._attention.project(y))
        x = self._add(x, y, "attention", seeds, training)
        y = self._mlp(self._mlp_norm(x), seeds, training=training)
        return self._add(x, y, "mlp", seeds, training)

    def _add(self, x, y, place, seeds, training):
        """Adds a branch to the residual stream."""
        if place in self._post_norms:
            y = self._post_norms[place](y)
        y = self._drops[place](y, seeds, training=training)
        return x + self._skips[place](y, seeds, training=training)

    def compute_output_shape(self, input_shape, *unused, **also_unused):
        """The shape of the input."""
        return input_shape

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "hidden_dim": self.hidden_dim,
            "num_heads": self.num_heads,
            "mlp_dim": self.mlp_dim,
            "dropout": self.dropout,
            "stochastic_depth": self.stochastic_depth,
            **self.style.in_config(),
        }


@keras.saving.register_keras_serializable("cappa_tf")
class DecoderBlock(keras.layers.Layer):
    """Pre-LayerNorm self-attention, cross-attention to an image, and MLP.

    Attention has no biases, unless the `style` says so. The captions of an
    image are adjacent ([N, ...] with N = B * K): their queries attend to that
    image's patches as one long sequence, so the image's keys and values are
    never repeated.

    Args:
        hidden_dim: Width D.
        num_heads: Attention heads; divides D.
        mlp_dim: Hidden width of the MLP.
        use_bias: Whether MLP and LayerNorms have biases.
        dropout: Dropout rate after both attentions, in the MLP and after it
            (deviation: the reference also drops attention weights).
        style: `BlockStyle`, or None for the default.

    Reference: big_vision models/proj/cappa/cappa.py `EncoderDecoderBlock`.
    """

    def __init__(
        self,
        hidden_dim,
        num_heads,
        *,
        mlp_dim,
        use_bias=False,
        dropout=0.0,
        style=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        style = BlockStyle.of(style)
        self.hidden_dim = hidden_dim
        self.num_heads = num_heads
        self.mlp_dim = mlp_dim
        self.use_bias = use_bias
        self.dropout = dropout
        dtype = self.dtype_policy
        self.style = style
        self._norms = {
            place: style.make_norm(f"{place}_norm", dtype, use_bias)
            for place in ("self_attention", "cross_attention", "mlp")
        }
        # LeCun is flax's default for attention, which the reference keeps.
        self.self_attention, self.cross_attention = (
            MultiHeadAttention(
                hidden_dim,
                num_heads,
                use_bias=style.bias(False),
                kernel_initializer="lecun_normal",
                query_key_norm=style.query_key_norm,
                name=name,
                dtype=dtype,
            )
            for name in ("self_attention", "cross_attention")
        )
        self._mlp = MLP(
            mlp_dim,
            use_bias=style.bias(use_bias),
            dropout=dropout,
            salt=f"{self.name}/mlp",
            style=style,
            name="mlp",
            dtype=dtype,
        )
        self._post_norms = _post_norms(
            style, dtype, use_bias, ("self_attention", "cross_attention")
        )
        self._drops = _dropouts(self, dropout, ("self", "cross", "mlp"))

    def build(self, input_shape, memory_shape):
        """Creates the block for text [N, L, D] and patches [B, P, E]."""
        shape = (None, None, input_shape[-1])
        for norm in (*self._norms.values(), *self._post_norms.values()):
            norm.build(shape)
        self.self_attention.build(shape)
        self.cross_attention.build(shape, (None, None, memory_shape[-1]))
        self._mlp.build(shape)

    def call(
        self,
        x,
        memory,
        attention_mask=None,
        cache=None,
        seeds=None,
        training=False,
        with_weights=False,
        rotation=None,
    ):
        """Runs the block over whole captions, or over one cached position.

        Call arguments:
            x: [N, L, D]; L = 1 with a cache.
            memory: Keys and values of the image, two [B, P, H, C] from
                `cross_attention.project`, or with a cache two [B, H, P, C];
                None omits the image.
            attention_mask: Bool, broadcastable to [N, H, L, keys].
            cache: None, or (keys, values, index): two [N, H, M, C] for all M
                positions, and the scalar position of x.
            seeds: uint32 [N], dropout seeds, as in `StatelessDropout`.
            training: Whether to apply dropout.
            with_weights: Whether to return those of the attention to the
                image, too; not with a cache.
            rotation: `Rotation` of the positions of x, or None. The keys in a
                cache are rotated already.

        Returns:
            x [N, L, D], and the (keys, values) that were attended to: two
            [N, L, H, C], or the cache with this position filled in; with
            weights also these, float32 [N, H, L, P].
        """
        y = self._norms["self_attention"](x)
        keys, values = self.self_attention.project(y, rotation)
        if cache is not None:
            keys = _write(cache[0], keys, cache[2])
            values = _write(cache[1], values, cache[2])
        in_loop = cache is not None
        y = self.self_attention(
            y,
            keys,
            values,
            attention_mask,
            by_head=in_loop,
            rotation=rotation,
        )
        y = self._post_norm("self_attention", y)
        x = x + self._drops["self"](y, seeds, training=training)
        if memory is not None:
            y = self._norms["cross_attention"](x)
            if with_weights:
                weights = self._image_weights(y, memory[0])
            y = self._attend_to_image(y, memory, in_loop)
            y = self._post_norm("cross_attention", y)
            x = x + self._drops["cross"](y, seeds, training=training)
        y = self._mlp(self._norms["mlp"](x), seeds, training=training)
        x = x + self._drops["mlp"](y, seeds, training=training)
        if with_weights:
            return x, (keys, values), weights
        return x, (keys, values)

    def _post_norm(self, place, y):
        """The norm of an attention's output, if the style has one."""
        return self._post_norms[place](y) if self._post_norms else y

    def _image_weights(self, x, keys):
        """Weights [B * K, H, L, P] of the attention of x [B * K, L, D]."""
        images, (count, length, _) = ops.shape(keys)[0], ops.shape(x)
        together = ops.reshape(x, (images, -1, self.hidden_dim))
        weights = self.cross_attention.attention_weights(together, keys)
        shape = (images, self.num_heads, -1, length, ops.shape(keys)[1])
        weights = ops.transpose(ops.reshape(weights, shape), (0, 2, 1, 3, 4))
        return ops.reshape(weights, (count, *ops.shape(weights)[2:]))

    def _attend_to_image(self, x, memory, by_head):
        """Cross-attention of [B * K, L, D] as [B, K * L, D]."""
        shape = ops.shape(x)
        images = ops.shape(memory[0])[0]
        x = ops.reshape(x, (images, -1, self.hidden_dim))
        x = self.cross_attention(x, *memory, by_head=by_head)
        return ops.reshape(x, shape)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "hidden_dim": self.hidden_dim,
            "num_heads": self.num_heads,
            "mlp_dim": self.mlp_dim,
            "use_bias": self.use_bias,
            "dropout": self.dropout,
            **self.style.in_config(),
        }


def _post_norms(style, dtype, use_bias, places):
    """Norms of the outputs of attentions, by name; none in most styles.

    They have a scale in any style, as NormFormer needs them to.
    """
    return {
        place: style.make_norm(
            f"{place}_post_norm", dtype, use_bias, use_scale=True
        )
        for place in places
        if style.post_norm
    }


def _dropouts(block, rate, places, layer=StatelessDropout, suffix="dropout"):
    """Dropout after each part of a block, by the part's name."""
    return {
        place: layer(
            rate,
            f"{block.name}/{place}_{suffix}",
            name=f"{place}_{suffix}",
            dtype=block.dtype_policy,
        )
        for place in places
    }


def _write(cache, entry, index):
    """The cache [N, H, M, C] with the entry [N, 1, H, C] at position `index`.

    A scatter of rows updates the cache in place if nothing else reads it.
    `ops.slice_update` would be an XLA-only op, which a server without XLA (the
    default of TensorFlow Serving) refuses to run.
    """
    count, heads, positions, width = ops.shape(cache)
    rows = ops.reshape(cache, (-1, width))  # -> [N * H * M, C]
    entry = ops.reshape(entry, (-1, width))  # -> [N * H, C]
    places = ops.arange(ops.shape(entry)[0]) * positions + index
    rows = ops.scatter_update(rows, places[:, None], entry)
    return ops.reshape(rows, (count, heads, positions, width))


@keras.saving.register_keras_serializable("cappa_tf")
class AttentionPooling(keras.layers.Layer):
    """Pooling by a learned query that attends to all patches ("MAP head").

    Args:
        num_heads: Attention heads; divides the width.
        mlp_dim: Hidden width of the MLP; by default 4 times the width.

    Reference: big_vision models/vit.py `MAPHead`.
    """

    def __init__(self, num_heads, *, mlp_dim=None, **kwargs):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.mlp_dim = mlp_dim

    def build(self, input_shape):
        """Creates probe [1, 1, D], attention, LayerNorm and MLP."""
        dim = input_shape[-1]
        shape = (None, None, dim)
        dtype = self.dtype_policy
        self.probe = self.add_weight(
            name="probe", shape=(1, 1, dim), initializer="glorot_uniform"
        )
        self._attention = MultiHeadAttention(
            dim, self.num_heads, name="attention", dtype=dtype
        )
        self._norm = layer_norm("norm", dtype)
        self._mlp = MLP(self.mlp_dim or 4 * dim, name="mlp", dtype=dtype)
        for part in (self._attention, self._norm, self._mlp):
            part.build(shape)

    def call(self, x):
        """Maps x [B, P, D] to [B, D]."""
        probe = ops.cast(self.probe, self.compute_dtype)
        probe = ops.broadcast_to(probe, (ops.shape(x)[0], 1, x.shape[-1]))
        x = self._attention(probe, *self._attention.project(x))
        return (x + self._mlp(self._norm(x)))[:, 0]

    def compute_output_shape(self, input_shape):
        """[B, D]."""
        return (input_shape[0], input_shape[-1])

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "mlp_dim": self.mlp_dim,
        }
