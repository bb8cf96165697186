"""Calls of the equal blocks of a tower, which are traced once for all.

The graph of a training step holds forward and backward pass of every block, and
building and optimizing it takes most of the time before the first step. Blocks
differ in their weights only, so the graph can hold one function of the weights.
"""

import functools

import keras

from cappa_tf.models.stateless_random import StatelessDropout


def callers(blocks, call, training, remat=False):
    """Functions that call one block each.

    Args:
        blocks: List of built layers.
        call: Function (block, *tensors) that returns a tensor. It may use other
            tensors, if these are the same for all blocks.
        training: Whether in training. Otherwise, and where XLA compiles the
            graph, each block is traced: gradients double the work.
        remat: Whether training recomputes the activations of a block for the
            gradient instead of storing them.

    Returns:
        List of functions of tensors, one for each block.
    """
    remat = keras.remat if remat and training else _unchanged
    if training and _can_share(blocks):
        return _shared(blocks, call, remat)
    return [remat(functools.partial(call, block)) for block in blocks]


def _shared(blocks, call, remat):
    """As `callers`, through one `tf.function` of the blocks' weights."""
    import tensorflow as tf  # Other backends need none of this module's.

    first = blocks[0].weights

    def with_weights(*tensors):
        weights, tensors = tensors[: len(first)], tensors[len(first) :]
        with keras.StatelessScope(list(zip(first, weights, strict=True))):
            return call(blocks[0], *tensors)

    # If TensorFlow inlined it, it would optimize each copy.
    traced = tf.function(
        with_weights,
        autograph=False,
        experimental_attributes={"_noinline": True},
    )
    run = remat(lambda *tensors: traced(*tensors))

    def of_block(block):
        # `value` would be cast here to the compute dtype of the model, but
        # inside the block a layer may want another one.
        weights = [tf.convert_to_tensor(w._value) for w in block.weights]
        return lambda *tensors: run(*weights, *tensors)

    return [of_block(block) for block in blocks]


def _can_share(blocks):
    """Whether all blocks compute the same function of weights and inputs."""
    if keras.backend.backend() != "tensorflow" or len(blocks) < 2:
        return False
    import tensorflow as tf

    # The random numbers of a block depend on its name.
    random = any(
        isinstance(layer, StatelessDropout) and layer.rate > 0.0
        for block in blocks
        for layer in block._flatten_layers()
    )
    kinds = [_kind(block) for block in blocks]
    return (
        tf.inside_function()
        and not _in_xla(tf.compat.v1.get_default_graph())
        and not random
        and all(kind == kinds[0] for kind in kinds)
    )


def _in_xla(graph):
    """Whether XLA compiles a graph; it takes minutes for shared blocks."""
    # There is no public way to ask.
    from tensorflow.python.ops import control_flow_util

    return control_flow_util.GraphOrParentsInXlaContext(graph)


def _kind(block):
    """What equal blocks have in common."""
    config = {**block.get_config(), "name": None}
    weights = [(tuple(w.shape), w.dtype) for w in block.weights]
    return type(block), config, weights


def _unchanged(function):
    return function
