"""FLOPs of a training step, counted from the operations that it runs.

Only matrix products and convolutions count, a multiplication and an addition
as two: they are all but a few percent of a Transformer's work. One example
goes through the model's loss and its gradient, so any `Task` can be counted,
and a frozen part, dropped patches or recomputed activations (REMAT) count as
what they are.
"""

import math

import tensorflow as tf
from tensorflow.python.framework import op_callbacks


def training_flops(model, captions=1, tokens=None):
    """FLOPs of forward and backward pass of one example.

    A loss that compares the examples of a batch is computed for a batch of
    one: its [B, B] logits, 6 * B * C operations per example, are left out.

    Args:
        model: Built `Task`.
        captions: Captions per image.
        tokens: Real tokens of a caption, for whose positions alone a
            captioner's loss computes logits; all positions by default.

    Returns:
        Number of floating-point operations.
    """
    state = [(v, tf.identity(v.value)) for v in model.non_trainable_variables]
    chunk_size = getattr(model, "chunk_size", None)
    batch = {
        name: tf.zeros(spec.shape, spec.dtype)
        for name, spec in model.batch_spec(1, captions).items()
    }
    if "labels" in batch:
        # Padding costs nothing in the loss, everything in the decoder.
        length = batch["labels"].shape[-1]
        real = tf.range(length) < (length if tokens is None else tokens)
        batch["labels"] += tf.cast(real, tf.int32)
    try:
        if tokens is not None and chunk_size is not None:
            # The loss pads its last chunk.
            model.chunk_size = tokens * captions
        return count(lambda: gradients(model, batch))
    finally:
        if chunk_size is not None:
            model.chunk_size = chunk_size
        for variable, value in state:
            variable.assign(value)  # Such as the statistics of a batch.


def gradients(model, batch):
    """Runs forward and backward pass of a batch; returns the gradients."""
    values = [v.value for v in model.trainable_variables]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(values)
        loss = tf.reduce_sum(model.example_losses(batch, True).loss)
    return tape.gradient(loss, values)


def count(function):
    """FLOPs of a function without arguments, which is run eagerly."""
    counted = []

    def add(op_type, inputs, attrs, outputs, op_name=None, graph=None):
        del op_name, graph
        counted.append(of_operation(op_type, inputs, attrs, outputs))

    op_callbacks.add_op_callback(add)
    try:
        function()
    finally:
        op_callbacks.remove_op_callback(add)
    return sum(counted)


def of_operation(op_type, inputs, attrs, outputs):
    """FLOPs of an operation, as an op callback gets it; 0 if not counted."""
    # Bytes if TensorFlow ran the operation by its fast path.
    op_type = tf.compat.as_str(op_type)
    if op_type not in _COUNTS:
        return 0
    shapes = [tuple(x.shape) for x in (*inputs, *outputs)]
    return _COUNTS[op_type](shapes, options_of(attrs))


def options_of(attrs):
    """Attributes of an operation, as an op callback gets them, as a dict."""
    names = [tf.compat.as_str(name) for name in attrs[::2]]
    return dict(zip(names, attrs[1::2], strict=True))


def _product(shapes, options):
    """MatMul or BatchMatMul: the size of the result times the inner axis."""
    transposed = options.get("transpose_a", options.get("adj_x", False))
    inner = shapes[0][-2 if transposed else -1]
    return 2 * math.prod(shapes[-1]) * inner


def _einsum(shapes, options):
    """Einsum of two tensors: the product of all axes that it names."""
    equation = tf.compat.as_str(options["equation"])
    operands = equation.partition("->")[0].split(",")
    if len(operands) == 1:
        return 0  # A sum or a transposition.
    sizes = {}
    for operand, shape in zip(operands, shapes):
        before, ellipsis, after = operand.partition("...")
        named = len(before) + len(after)
        middle = [f"_{i}" for i in range(len(shape) - named)]
        letters = [*before, *(middle if ellipsis else []), *after]
        sizes.update(zip(letters, shape, strict=True))
    return 2 * math.prod(sizes.values())


def _convolution(shapes, options):
    """Conv2D: the size of the result times the size of a filter."""
    del options
    return 2 * math.prod(shapes[-1]) * math.prod(shapes[1][:-1])


def _filter_gradient(shapes, options):
    """Gradient of the filters: as many products as the convolution itself."""
    del options
    images, _, gradients, filters = shapes[:4]
    del images
    return 2 * math.prod(gradients) * math.prod(filters[:-1])


def _image_gradient(shapes, options):
    """Gradient of the images: as many products as the convolution itself."""
    del options
    return 2 * math.prod(shapes[2]) * math.prod(shapes[1][:-1])


_COUNTS = {
    "MatMul": _product,
    "BatchMatMul": _product,
    "BatchMatMulV2": _product,
    "BatchMatMulV3": _product,
    "Einsum": _einsum,
    "Conv2D": _convolution,
    "Conv2DBackpropFilter": _filter_gradient,
    "Conv2DBackpropInput": _image_gradient,
}


def readable(flops):
    """Formats a number of operations: "35.2 GFLOP"."""
    power = min(int(math.log10(max(flops, 1.0)) / 3), len(_UNITS) - 1)
    return f"{flops / 1000**power:.3g} {_UNITS[power]}FLOP"


_UNITS = ("", "k", "M", "G", "T", "P", "E", "Z")
