"""Dense layers, applied so that TensorFlow fuses them with what follows."""

import math

import keras
from keras import ops


def linear(layer, rows):
    """Applies a Dense or EinsumDense layer to rows, as one matrix product.

    On a CPU, oneDNN adds the bias and computes `ops.gelu` in the same
    operation: an MLP of S/16 then takes half the time in bfloat16. TensorFlow
    recognizes only a bias that `tf.nn.bias_add` adds to a product of matrices,
    and a gelu that alone uses their sum. Keras adds biases in another way, and
    makes an input [B, ...] B products and as many gradients of the kernel,
    which is slower, the more so the narrower the model.

    Args:
        layer: A built layer without activation. The first axes of its kernel
            are those of a row, and the others those of the output.
        rows: [M, ...].

    Returns:
        [M, ...], equal to `layer(rows)` but for rounding.
    """
    if keras.backend.backend() != "tensorflow" or layer.quantization_mode:
        is_einsum = isinstance(layer, keras.layers.EinsumDense)
        return layer(rows[None])[0] if is_einsum else layer(rows)
    import tensorflow as tf  # Other backends need none of this module's.

    # As by `layer.__call__`, which this does not go through.
    rows, kernel = (
        ops.cast(x, layer.compute_dtype) for x in (rows, layer.kernel)
    )
    axes = len(rows.shape) - 1
    width, shape = math.prod(kernel.shape[:axes]), kernel.shape[axes:]
    product = ops.matmul(
        ops.reshape(rows, (-1, width)) if axes > 1 else rows,
        ops.reshape(kernel, (width, -1)) if len(kernel.shape) > 2 else kernel,
    )
    if layer.bias is not None:
        bias = ops.cast(layer.bias, product.dtype)
        product = tf.nn.bias_add(product, ops.reshape(bias, (-1,)))
    return ops.reshape(product, (-1, *shape)) if len(shape) > 1 else product
