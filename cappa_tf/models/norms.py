"""LayerNorm and RMSNorm, with the reference's epsilon.

Written with `keras.ops` only, so that a saved encoder opens under every Keras
backend.

B: batch.  T: positions.  D: width.
"""

import keras
from keras import ops

EPSILON = 1e-6  # of every norm, flax's default


def layer_norm(name, dtype, use_bias=True, use_scale=True):
    """A LayerNorm; `use_bias` keeps `beta`, `use_scale` keeps `gamma`."""
    return keras.layers.LayerNormalization(
        epsilon=EPSILON,
        center=use_bias,
        scale=use_scale,
        name=name,
        dtype=dtype,
    )


@keras.saving.register_keras_serializable("cappa_tf")
class RMSNorm(keras.layers.Layer):
    """Divides by the root mean square of the last axis, in float32.

    Keras' own RMSNormalization always has a scale.

    Args:
        use_scale: Whether the result is multiplied by a weight [D].

    Reference: arXiv 1910.07467; flax `nn.RMSNorm`.
    """

    def __init__(self, use_scale=True, **kwargs):
        super().__init__(**kwargs)
        self.use_scale = use_scale

    def build(self, input_shape):
        """Creates `scale` [D], if there is one."""
        self.scale = None
        if self.use_scale:
            self.scale = self.add_weight(
                name="scale", shape=(input_shape[-1],), initializer="ones"
            )

    def call(self, x):
        """Maps x [..., D] to [..., D]."""
        x = ops.cast(x, "float32")
        mean = ops.mean(ops.square(x), axis=-1, keepdims=True)
        x = x * ops.rsqrt(mean + EPSILON)
        if self.use_scale:
            x = x * ops.cast(self.scale, "float32")
        return ops.cast(x, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        """The shape of the input."""
        return input_shape

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "use_scale": self.use_scale}
