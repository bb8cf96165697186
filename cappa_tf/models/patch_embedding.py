"""Patch embedding: image patches, projected to the width of the encoder.

B: batch (of images).  H, W: height and width in pixels.  P: patches.  D: width.
"""

import keras
from keras import ops


@keras.saving.register_keras_serializable("cappa_tf")
class PatchEmbedding(keras.layers.Layer):
    """Cuts images into patches and projects each one.

    This is a convolution whose stride equals its kernel size (the kernel has
    that shape), computed as one matrix product, which is faster on CPU in both
    directions.

    Args:
        hidden_dim: Width D of the embeddings.
        patch_size: (height, width) of a patch in pixels.
        use_bias: Whether a bias is added.
    """

    def __init__(self, hidden_dim, patch_size, use_bias=True, **kwargs):
        super().__init__(**kwargs)
        self.hidden_dim = hidden_dim
        self.patch_size = tuple(patch_size)
        self.use_bias = use_bias

    def build(self, input_shape):
        """Creates kernel [h, w, channels, D] and bias [D]."""
        self.kernel = self.add_weight(
            name="kernel",
            shape=(*self.patch_size, input_shape[-1], self.hidden_dim),
            initializer="lecun_normal",
        )
        if self.use_bias:
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
        x = ops.matmul(x, kernel)
        return x + self.bias if self.use_bias else x

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
            "use_bias": self.use_bias,
        }
