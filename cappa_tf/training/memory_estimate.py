"""Estimate of the memory a training step needs, without running it.

Weights, gradients and optimizer state are counted. Activations are taken from
the traced gradient graph of one microbatch: its operations are visited in
order, each output stays alive until its last use, and the peak is reported.
Kernel scratch space, fragmentation and input pipeline buffers come on top; XLA
may fuse operations and need less.

B: examples of one replica's microbatch.  K: captions per image.
L: text length in tokens.  P: patches.  D: width.
"""

import tensorflow as tf

from cappa_tf.training.gradients import TaskGradients, function

# Operations whose output shares the memory of their input.
ALIASES = {
    "EnsureShape",
    "ExpandDims",
    "Identity",
    "IdentityN",
    "PreventGradient",
    "ReadVariableOp",
    "Reshape",
    "Squeeze",
    "StopGradient",
}
_FREE = {"Const", "Placeholder", "Shape"}


def estimate(
    model, optimizer, strategy, batch_size, accumulation_steps=1, captions=1
):
    """Estimates the memory that one device needs.

    Args:
        model: Built `Task`.
        optimizer: Built optimizer.
        strategy: The run's strategy.
        batch_size: Global batch size, over all devices and microbatches.
        accumulation_steps: Microbatches per step.
        captions: K.

    Returns:
        Dict of bytes by use, with their sum as `total`, and `shapes`, a dict
        of the shapes of one microbatch and of the model's activations.
    """
    weights = [variable.value for variable in model.weights]
    trained = [variable.value for variable in model.trainable_variables]
    copies = 1 if accumulation_steps == 1 else 2
    per_replica = batch_size // strategy.num_replicas_in_sync
    size = per_replica // accumulation_steps
    batch = model.batch_spec(size, captions)
    parts = {
        "weights": _bytes(weights),
        "gradients": copies * _bytes(trained),
        "optimizer state": _bytes([v.value for v in optimizer.variables]),
        "batch": accumulation_steps * _bytes(batch.values()),
        "activations": _activations(model, batch, batch_size),
    }
    shapes = {name: tuple(spec.shape) for name, spec in batch.items()}
    shapes |= model.shapes(size, captions)
    return {**parts, "total": sum(parts.values()), "shapes": shapes}


def table(parts):
    """The estimate as lines of text, for printing."""
    lines = [f"{name:15} {shape}" for name, shape in parts["shapes"].items()]
    lines += [
        f"{name:15} {size / 2**20:>13,.1f} MiB"
        for name, size in parts.items()
        if name != "shapes"
    ]
    return "\n".join(lines)


def _activations(model, batch, batch_size):
    # Traced for one device: all have the same shapes.
    step = function(TaskGradients(model, batch_size).of_microbatch)
    graph = step.get_concrete_function(batch).graph
    gradients = _bytes([v.value for v in model.trainable_variables])
    # The gradients alive at the peak are already counted in `estimate`.
    return max(0, peak_bytes(graph, unknown=_most_integers(batch)) - gradients)


def _most_integers(batch):
    """Tokens of a batch, the upper bound of an unknown dimension."""
    return max(
        spec.shape.num_elements()
        for spec in batch.values()
        if spec.dtype.is_integer
    )


def peak_bytes(graph, unknown=1):
    """Peak memory of a graph whose operations run in order, in bytes.

    Args:
        graph: A `tf.Graph` (of a traced function).
        unknown: Size to assume for a dimension that is unknown in the trace.
    """
    operations = graph.get_operations()
    base, last_use = {}, {}
    for position, op in enumerate(operations):
        for tensor in op.inputs:
            last_use[_root(base, tensor)] = position
        if op.type in ALIASES:
            for source, output in zip(op.inputs, op.outputs):
                base[output.ref()] = _root(base, source)
    ends = {}
    for ref, position in last_use.items():
        ends.setdefault(position, []).append(ref)
    results = {_root(base, t) for t in getattr(graph, "outputs", [])}
    alive, total, peak = {}, 0, 0
    for position, op in enumerate(operations):
        if op.type not in _FREE and op.type not in ALIASES:
            for tensor in op.outputs:
                ref = tensor.ref()
                if ref in last_use or ref in results:
                    alive[ref] = _tensor_bytes(tensor, unknown)
                    total += alive[ref]
        peak = max(peak, total + _inner_peak(graph, op, unknown))
        for ref in ends.get(position, []):
            if ref not in results:
                total -= alive.pop(ref, 0)
    return peak


def _inner_peak(graph, op, unknown):
    """Peak inside the body of a loop or branch, excluding its outputs."""
    names = [
        value.name
        for value in op.node_def.attr.values()
        for value in [value.func]
        if value.name
    ]
    bodies = [graph._get_function(name) for name in names]  # no public API
    inner = [peak_bytes(b.graph, unknown) for b in bodies if b is not None]
    outputs = sum(_tensor_bytes(t, unknown) for t in op.outputs)
    return max(0, max(inner, default=0) - outputs)


def _root(base, tensor):
    return base.get(tensor.ref(), tensor.ref())


def _tensor_bytes(tensor, unknown):
    if tensor.dtype in (tf.resource, tf.variant, tf.string):
        return 0
    if tensor.shape.rank is None:
        return unknown * tensor.dtype.size
    size = tensor.dtype.size
    for dim in tensor.shape.as_list():
        size *= unknown if dim is None else dim
    return size


def _bytes(tensors):
    return sum(t.shape.num_elements() * t.dtype.size for t in tensors)
