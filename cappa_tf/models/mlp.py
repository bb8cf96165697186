"""MLP of a Transformer block, plain or gated.

Written with `keras.ops` only, so that a saved encoder opens under every Keras
backend. Numerics follow big_vision (models/vit.py, models/proj/cappa/cappa.py).

Abbreviations for dimensions:
    N: batch.  T: positions.  D: width.
"""

import keras
from keras import ops

from cappa_tf.models.block_style import BlockStyle
from cappa_tf.models.linear import linear
from cappa_tf.models.stateless_random import StatelessDropout
from cappa_tf.utils.arguments import (
    check_bool,
    check_counts,
    check_fraction,
)


@keras.saving.register_keras_serializable("cappa_tf")
class MLP(keras.layers.Layer):
    """Two dense layers with a tanh-approximated gelu between them.

    A `style` may have another activation, a gate (a third layer, whose
    activated output is multiplied with that of the first) and a norm of the
    hidden layer.

    Args:
        mlp_dim: Width of the hidden layer.
        use_bias: Whether both layers have biases.
        dropout: Dropout rate after the gelu.
        salt: Name that separates this dropout's random numbers from others,
            unique within a part of the model.
        style: `BlockStyle` or None for the default; its `use_bias` has no
            effect here.
    """

    def __init__(
        self,
        mlp_dim,
        *,
        use_bias=True,
        dropout=0.0,
        salt="mlp",
        style=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_counts(mlp_dim=mlp_dim)
        check_bool(use_bias=use_bias)
        check_fraction(dropout=dropout)
        self.mlp_dim = mlp_dim
        self.use_bias = use_bias
        self.dropout = dropout
        self.salt = salt
        self.style = BlockStyle.of(style)
        self._dropout = StatelessDropout(
            dropout, salt, name="dropout", dtype=self.dtype_policy
        )

    def build(self, input_shape):
        """Creates the dense layers for inputs [B, T, D]."""
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
        hidden = (None, None, self.mlp_dim)
        self._project.build(hidden)
        self._dropout.build(hidden)  # `quantize` wants that of every layer.
        if self.style.gated_mlp:
            self._gate = keras.layers.Dense(self.mlp_dim, name="gate", **args)
            self._gate.build((None, None, width))
        if self.style.post_norm:
            self._norm = self.style.make_norm(
                "hidden_norm", self.dtype_policy, self.use_bias
            )
            self._norm.build(hidden)

    def call(self, x, seeds=None, training=False):
        """Maps x [B, T, D] to [B, T, D].

        Call arguments:
            x: [B, T, D].
            seeds: uint32 [B], dropout seeds, as in `StatelessDropout`.
            training: Whether to apply dropout.
        """
        shape = ops.shape(x)
        rows = ops.reshape(x, (-1, shape[-1]))
        hidden = linear(self._expand, rows)
        fused = self.use_bias and not training
        if self.style.gated_mlp:
            gate = linear(self._gate, rows)
            hidden = self.style.activate(gate, fused) * hidden
        else:
            hidden = self.style.activate(hidden, fused)
        if self.style.post_norm:
            hidden = self._norm(hidden)
        if training:
            hidden = ops.reshape(hidden, (*shape[:-1], self.mlp_dim))
            hidden = self._dropout(hidden, seeds, training=True)
            hidden = ops.reshape(hidden, (-1, self.mlp_dim))
        return ops.reshape(linear(self._project, hidden), shape)

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
            **self.style.in_config(),
        }
