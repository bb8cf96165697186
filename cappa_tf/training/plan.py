"""Expected time, memory and cost of a training step on given devices.

A step's time is the sum of three parts, none of which hides another:

    products   FLOPs of matrix products / (peak * what of it is reached); those
               of the update are of float32
    memory     bytes that all other operations read and write, and the update
               of the weights / (bandwidth * what of it is reached)
    network    ring all-reduce of the gradients, 2 (n - 1) / n of their bytes,
               and of what a `WholeBatchTask` gathers / interconnect

FLOPs and bytes are counted from the operations of a real step of one and of two
examples: what their difference is grows with the batch, the rest does not. If
the step is compiled by XLA, a chain of elementwise operations reads and writes
only what enters and leaves it.
"""

import collections
import dataclasses

import tensorflow as tf
from tensorflow.python.framework import op_callbacks

from cappa_tf.training import flops, memory_estimate

# Operations that XLA fuses with each other.
_ELEMENTWISE = set(
    "Abs Add AddN AddV2 BiasAdd BroadcastTo Cast DivNoNan Equal Erf Exp Fill "
    "Floor GeluGrad Greater GreaterEqual LeakyRelu Less LessEqual Log Log1p "
    "LogicalAnd LogicalNot LogicalOr Maximum Minimum Mul Neg NotEqual OnesLike "
    "OneHot Pow RealDiv Reciprocal Relu ReluGrad Rsqrt RsqrtGrad Select "
    "SelectV2 Sigmoid Sign Sqrt SqrtGrad Square SquaredDifference Sub Tanh "
    "TanhGrad ZerosLike".split()
)
# Operations that read such a chain without its result being stored.
_REDUCTIONS = {"BiasAddGrad", "Max", "Mean", "Min", "Prod", "Softmax", "Sum"}
# Kinds of operations that take longer than to read and write their tensors, on
# a CPU; of each there is one that can be measured in `peak.elementwise`.
COSTLY = {
    "tanh": set("Erf Exp Log Log1p Pow Sigmoid Softmax Tanh".split()),
    "sum": _REDUCTIONS - {"Softmax"},
    "transpose": {"Transpose"},
}
# Operations that read no more of their inputs than they give back.
_PARTIAL = {"Gather", "GatherV2", "GatherNd", "Slice", "StridedSlice"}
# Operations without work on the device.
_FREE = memory_estimate.ALIASES | {
    "Const",
    "Shape",
    "ShapeN",
    "Size",
    "Rank",
    "VarHandleOp",
    "VarIsInitializedOp",
    # The variable takes over the memory of its new value.
    "AssignVariableOp",
}


@dataclasses.dataclass(frozen=True)
class _Operation:
    """An operation that was run: tensors by number, sizes in bytes."""

    kind: str
    inputs: tuple
    outputs: tuple
    flops: int
    shapes: tuple = ()
    options: tuple = ()


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step of a model takes, on one device.

    Attributes:
        flops: FLOPs of matrix products per example.
        fixed_flops: Further ones per step.
        traffic: Bytes that the other operations move per example.
        fixed_traffic: Further ones per microbatch.
        update_traffic: Bytes that the optimizer's update moves per step.
        update_flops: FLOPs of its matrix products, which are of float32.
        gradients: Bytes of gradients that devices exchange per step.
        gathered: Bytes that they gather per example.
        memory: Bytes of memory per example of a microbatch.
        fixed_memory: Further ones, whatever the size of the microbatch.
    """

    flops: float
    fixed_flops: float
    traffic: float
    fixed_traffic: float
    update_traffic: float
    update_flops: float
    gradients: float
    gathered: float
    memory: float
    fixed_memory: float


@dataclasses.dataclass(frozen=True)
class Step:
    """A step as planned.

    Attributes:
        products: Seconds.
        memory: Seconds.
        network: Seconds.
        bytes: Bytes of memory that a device needs.
        largest: Largest global batch that fits in the memory of the devices,
            in as many microbatches; 0 if not even one example does.
        share: FLOPs a second, without those of the update, as a fraction of
            the devices' peak.
    """

    products: float
    memory: float
    network: float
    bytes: float
    largest: int
    share: float

    @property
    def seconds(self):
        """Time of the step."""
        return self.products + self.memory + self.network

    @property
    def bound(self):
        """The longest of its parts."""
        parts = {
            "compute": self.products,
            "memory": self.memory,
            "network": self.network,
        }
        return max(parts, key=parts.get)


def step(
    work,
    device,
    count,
    batch_size,
    precision="bfloat16",
    accumulation_steps=1,
):
    """Plans a step.

    Args:
        work: `Work` of the model.
        device: `accelerators.Device`.
        count: Number of devices.
        batch_size: Global batch size.
        precision: Type of the products, "float32" or "bfloat16".
        accumulation_steps: Microbatches of a step.

    Returns:
        A `Step`.
    """
    own = batch_size / count
    done = own * work.flops + work.fixed_flops
    peak = getattr(device, precision)
    traffic = (
        own * work.traffic
        + accumulation_steps * work.fixed_traffic
        + work.update_traffic
    )
    exchanged = (count - 1) / count * 2 * work.gradients
    exchanged += (count - 1) * own * work.gathered
    speed = device.interconnect if count <= device.group else device.network
    if count > 1 and not speed:
        raise ValueError(
            "Several devices need `interconnect`, and more than `group` of "
            f"them `network`. Received: {count} x {device}"
        )
    fits = 0
    if work.memory:
        room = device.memory - work.fixed_memory
        fits = int(room / work.memory) * accumulation_steps * count
    products = done / peak + work.update_flops / device.float32
    products /= device.product_efficiency
    memory = traffic / (device.bandwidth * device.memory_efficiency)
    network = exchanged / speed if count > 1 else 0.0
    return Step(
        products,
        memory,
        network,
        bytes=work.fixed_memory + own / accumulation_steps * work.memory,
        largest=max(0, fits),
        share=done / (products + memory + network) / peak,
    )


def count_work(
    model,
    optimizer,
    *,
    captions=1,
    accumulation_steps=1,
    fused=True,
    memory=True,
    steps=None,
    update=None,
    costs=None,
):
    """Counts what a step of a model takes. Changes its weights.

    Args:
        model: Built `Task`.
        optimizer: Built optimizer.
        captions: Captions per image.
        accumulation_steps: Microbatches of a step.
        fused: Whether the step is compiled by XLA.
        memory: Whether to estimate memory, too, which takes longest: it traces
            two steps.
        steps: What `record` returns of the model, if it is known already.
        update: What `record_update` returns, if it is known already.
        costs: Dict of the keys of `COSTLY`: how many times as long as a copy
            an operation takes. By default all take as long, as on a GPU.

    Returns:
        A `Work`; without `memory` its memory is 0.
    """
    steps = steps or record(model, captions)
    total = [sum(op.flops for op in ops) for ops in steps]
    moved = [traffic(ops, fused, costs) for ops in steps]
    variables = model.trainable_variables
    update = update or record_update(model, optimizer)
    an_example, fixed = 0.0, 0.0
    if memory:
        an_example, fixed = _memory(
            model, optimizer, captions, accumulation_steps
        )
    width = getattr(model, "embedding_width", 0)
    return Work(
        flops=total[1] - total[0],
        fixed_flops=2 * total[0] - total[1],
        traffic=moved[1] - moved[0],
        fixed_traffic=max(0, 2 * moved[0] - moved[1]),
        update_traffic=traffic(update, fused, costs),
        update_flops=sum(op.flops for op in update),
        gradients=sum(_size(v.value) for v in variables),
        # Two embeddings in float32, and their derivatives.
        gathered=16 * width,
        memory=an_example,
        fixed_memory=fixed,
    )


def record(model, captions=1):
    """The operations of a step of one and of two examples, two lists."""
    return [_step(model, size, captions) for size in (1, 2)]


def record_update(model, optimizer):
    """The operations of an update of the weights. Changes them."""
    variables = model.trainable_variables
    zeros = [tf.zeros(v.shape, v.dtype) for v in variables]
    return _recorded(lambda: optimizer.apply(zeros, variables))


def heaviest_products(steps, batch_size, most=12):
    """The products that take most of a step's FLOPs.

    Args:
        steps: What `record` returns; or what `record_update` does, twice.
        batch_size: Examples of a microbatch, for the shapes.
        most: How many.

    Returns:
        List of (FLOPs of all of that kind, FLOPs of one, shapes of its two
        inputs, dict of its transpositions).
    """
    found = collections.Counter()
    for one, two in zip(*steps):
        names = ("transpose_a", "transpose_b", "adj_x", "adj_y")
        if not one.flops or not all(k in names for k, _ in one.options):
            continue
        # What differs between one and two examples grows with the batch.
        shapes = tuple(
            tuple(a + (b - a) * (batch_size - 1) for a, b in zip(x, y))
            for x, y in zip(one.shapes, two.shapes)
        )
        flops_of_one = one.flops + (two.flops - one.flops) * (batch_size - 1)
        options = tuple(bool(value) for _, value in sorted(one.options))
        found[flops_of_one, shapes, options] += flops_of_one
    return [
        (total, one, shapes, dict(zip(("transpose_a", "transpose_b"), options)))
        for (one, shapes, options), total in found.most_common(most)
    ]


def _step(model, size, captions):
    """The operations of forward and backward pass of some examples."""
    batch = {
        name: tf.zeros(spec.shape, spec.dtype)
        for name, spec in model.batch_spec(size, captions).items()
    }
    if "labels" in batch:
        batch["labels"] += 1
    return _recorded(lambda: flops.gradients(model, batch))


def _memory(model, optimizer, captions, accumulation_steps):
    """(bytes an example, bytes in any case), from two traced microbatches."""
    strategy = tf.distribute.get_strategy()
    # Large enough for whole chunks of the loss.
    sizes = (32, 64)
    found = [
        memory_estimate.estimate(
            model,
            optimizer,
            strategy,
            size * accumulation_steps,
            accumulation_steps,
            captions,
        )["total"]
        for size in sizes
    ]
    slope = (found[1] - found[0]) / (sizes[1] - sizes[0])
    return slope, max(0.0, found[0] - sizes[0] * slope)


def _recorded(function):
    """The list of `_Operation` that a function runs, eagerly."""
    found, tensors = [], []

    def add(op_type, inputs, attrs, outputs, op_name=None, graph=None):
        del op_name, graph
        op_type = tf.compat.as_str(op_type)
        # A tensor's number is used again once it is deleted.
        tensors.extend((*inputs, *outputs))
        count = flops.of_operation(op_type, inputs, attrs, outputs)
        more = {}
        if count and "MatMul" in op_type:
            options = flops.options_of(attrs)
            more["shapes"] = tuple(tuple(x.shape) for x in inputs)
            more["options"] = tuple(
                (name, value)
                for name, value in options.items()
                if name.startswith(("transpose_", "adj_"))
            )
        elif count:
            more["options"] = ((op_type, None),)
        found.append(
            _Operation(
                op_type,
                tuple((id(x), _size(x)) for x in inputs),
                tuple((id(x), _size(x)) for x in outputs),
                count,
                **more,
            )
        )

    eager = tf.config.functions_run_eagerly()
    # A function inside would otherwise count only when it is traced.
    tf.config.run_functions_eagerly(True)
    op_callbacks.add_op_callback(add)
    try:
        kept = function()
    finally:
        op_callbacks.remove_op_callback(add)
        tf.config.run_functions_eagerly(eager)
    del kept
    tensors.clear()
    return found


def traffic(operations, fused, costs=None):
    """Bytes that all operations but products read and write.

    Args:
        operations: List of `_Operation`, in the order in which they ran.
        fused: Whether chains of elementwise operations are one.
        costs: As in `count_work`; not used if they are.
    """
    work = [op for op in operations if op.kind not in _FREE]
    if not fused:
        factors = {
            kind: factor
            for name, factor in (costs or {}).items()
            for kind in COSTLY[name]
        }
        return sum(
            factors.get(op.kind, 1)
            * (_read(op, op.inputs) + sum(size for _, size in op.outputs))
            for op in work
            if not op.flops
        )
    # An elementwise result is stored if anything but a further elementwise
    # operation or a reduction reads it; `aliases` of a tensor are its memory.
    aliases, users = {}, {}
    for op in operations:
        inputs = [aliases.get(key, key) for key, _ in op.inputs]
        if op.kind in memory_estimate.ALIASES and inputs:
            for key, _ in op.outputs:
                aliases[key] = inputs[0]
            continue
        for key in inputs:
            users.setdefault(key, set()).add(
                op.kind in _ELEMENTWISE | _REDUCTIONS
            )
    total, sources = 0, {}
    for op in work:
        before = {}
        for key, size in op.inputs:
            key = aliases.get(key, key)
            before |= sources.get(key, {key: size})
        written = 0
        for key, size in op.outputs:
            if op.kind in _ELEMENTWISE and users.get(key) == {True}:
                sources[key] = before
            else:
                written += size
        if written and not op.flops:
            total += _read(op, before.items()) + written
    return total


def _read(op, inputs):
    """Bytes that an operation reads of its inputs."""
    size = sum(size for _, size in inputs)
    if op.kind not in _PARTIAL:
        return size
    return min(size, sum(size for _, size in op.outputs))


def _size(tensor):
    if tensor.dtype in (tf.resource, tf.variant, tf.string):
        return 0
    return (tensor.shape.num_elements() or 0) * tensor.dtype.size
