"""Expected time, memory and cost of a gin file's training, before renting.

    python tools/benchmark.py plan --gin_file=gin/cappa_l16.gin \
        --gin_param="DATA='data'" --count=64
    python tools/benchmark.py plan --gin_file=gin/flickr8k.gin --check

For --count devices of each of --devices (or of --device, with figures of your
own): the time of a step and its parts, the images per second, the share of the
peak, the memory of a device, the largest batch that would fit, and the time and
cost of the whole run. A run of several stages has these for each of them, with
the time and cost of all at the end. No data is read.
cappa_tf/training/plan.py describes the arithmetic,
cappa_tf/training/accelerators.py the devices; what of the peak and of the
bandwidth is reached, and prices, are assumptions printed first.

--check plans a step on this machine and compares it with the measured one. In
the same turns it measures the peak; what the step's own largest products reach
of it, in place of an assumption; the bandwidth; and how much longer than a copy
a tanh, a sum and a transposition take on a CPU. XLA fuses these.
"""

import dataclasses

from absl import flags

from cappa_tf import config
from tools import benchmarks

_DEFAULT = ("A100", "H100", "v4", "v5e", "v6e")


def define_flags():
    """Defines the flags of this benchmark."""
    config.define_flags(runs=False)
    flags.DEFINE_list("devices", list(_DEFAULT), "Known devices to plan for.")
    flags.DEFINE_multi_string(
        "device",
        [],
        "A device in place of these: "
        "name=mine,bfloat16=4e14,bandwidth=2e12,memory=48e9, and optionally "
        "float32, interconnect, group, network, price, product_efficiency and "
        "memory_efficiency; FLOP/s, bytes, bytes/s and dollars an hour.",
    )
    flags.DEFINE_integer("count", 8, "Number of devices.", lower_bound=1)
    flags.DEFINE_bool("check", False, "Compares with this machine's step.")
    flags.DEFINE_integer(
        "matmul", 1024, "--check: side of the matrices of the peak.", 1
    )
    flags.DEFINE_integer(
        "copy", 128, "--check: tensors of the bandwidth, in 8,192 numbers.", 1
    )
    flags.DEFINE_integer("rounds", 5, "--check: turns.", lower_bound=1)


def run():
    """Returns rows of all devices, or of the check."""
    devices = [] if flags.FLAGS.check else _devices()
    try:
        config.parse(
            flags.FLAGS.gin_file, flags.FLAGS.gin_param, workdir="plan"
        )
        given = config.arguments()
    except config.ConfigError as error:
        raise ValueError(f"Configuration error: {error}") from None
    if "optimizer" not in given:
        raise ValueError(
            "--gin_file must bind cappa_tf.training.train.train. "
            f"Received: --gin_file={','.join(flags.FLAGS.gin_file)}"
        )
    if flags.FLAGS.check:
        return check(given)
    return plan(config.stage_arguments(), devices, flags.FLAGS.count)


def _devices():
    from cappa_tf.training import accelerators

    if flags.FLAGS.device:
        try:
            return [accelerators.parse(text) for text in flags.FLAGS.device]
        except ValueError as error:
            raise ValueError(f"--device: {error}") from None
    unknown = [x for x in flags.FLAGS.devices if x not in accelerators.DEVICES]
    if unknown or not flags.FLAGS.devices:
        raise ValueError(
            f"--devices must be among {', '.join(accelerators.DEVICES)}. "
            f"Received: --devices={','.join(flags.FLAGS.devices)}"
        )
    return [accelerators.DEVICES[name] for name in flags.FLAGS.devices]


def _build(given):
    import tensorflow as tf

    from cappa_tf.training import construct

    return construct.build_model(
        given["model"],
        given["optimizer"],
        tf.distribute.get_strategy(),
        given["settings"].seed,
        given["compute"].precision,
        given["weights"].frozen_parts,
        given["weights"].trained_parts,
    )


def _products(given):
    """Type of the products."""
    return "float32" if given["compute"].precision == "float32" else "bfloat16"


def _captions(given):
    captions = getattr(given["train_data"], "captions_per_image", 1)
    return 1 if captions == "all" else captions


def plan(stages, devices, count):
    """Rows of a run on each of some devices.

    Args:
        stages: Iterator over (share of the steps, `config.arguments()`) of
            the run's stages.
        devices: List of `accelerators.Device`.
        count: Number of devices.

    Raises:
        ValueError: If the batch cannot be divided among them.
    """
    counted, done = [], 0
    for _, given in stages:
        counted.append(_count(given, done, count))
        done = given["settings"].total_steps
    rows = _assumptions(devices)
    first = [None] * len(counted)
    for device in devices:
        name, hours = f"{count} x {device.name}", 0.0
        for i, stage in enumerate(counted):
            step = stage.on(device, count)
            named = name
            if len(counted) > 1:
                named += f", stage {i + 1} of {stage.steps:,} steps"
            rows += _rows(named, step, device, stage.batch_size, first[i])
            first[i] = first[i] or (named, step)
            hours += step.seconds * stage.steps / 3600
        rows += [
            benchmarks.Row(f"{name}: run", hours / 24, "days"),
            benchmarks.Row(f"{name}: cost", hours * count * device.price, "$"),
        ]
    return rows


@dataclasses.dataclass
class _Stage:
    """The operations of a step of a stage, and the number of its steps."""

    work: object
    steps: int
    batch_size: int
    products: str
    accumulation_steps: int

    def on(self, device, count):
        """The planned `Step` on some devices."""
        from cappa_tf.training import plan as plans

        return plans.step(
            self.work,
            device,
            count,
            self.batch_size,
            self.products,
            self.accumulation_steps,
        )


def _count(given, first, count):
    """Counts the operations of a stage, after the run's first steps."""
    from cappa_tf.training import plan as plans

    settings = given["settings"]
    parts = count * settings.accumulation_steps
    if settings.batch_size % parts:
        raise ValueError(
            "BATCH_SIZE must be divisible by --count times ACCUMULATION_STEPS. "
            f"Received: {settings.batch_size}, --count={count}, "
            f"{settings.accumulation_steps}"
        )
    benchmarks.note("counting the operations of a step")
    model, optimizer = _build(given)
    work = plans.count_work(
        model,
        optimizer,
        captions=_captions(given),
        accumulation_steps=settings.accumulation_steps,
        fused=given["compute"].jit_compile is not False,
    )
    return _Stage(
        work,
        settings.total_steps - first,
        settings.batch_size,
        _products(given),
        settings.accumulation_steps,
    )


def _assumptions(devices):
    rows = []
    for device in devices:
        rows += [
            benchmarks.Row(
                f"assumed of {device.name}: products",
                device.product_efficiency,
                "of the peak",
            ),
            benchmarks.Row(
                f"assumed of {device.name}: memory",
                device.memory_efficiency,
                "of the bandwidth",
            ),
            benchmarks.Row(
                f"assumed of {device.name}: price",
                device.price,
                f"$/h ({device.price_of})",
            ),
        ]
    return rows


def _rows(name, step, device, size, first):
    seconds = step.seconds
    whole = f"{name}: step, bound by {step.bound}"

    def compared(what, value, unit, base):
        if first is None:
            return benchmarks.Row(f"{name}: {what}", value, unit)
        other, ratio = first[0], value / base(first[1])
        return benchmarks.Row(f"{name}: {what}", value, unit, other, ratio)

    fits = "fits" if step.bytes <= device.memory else "does not fit"
    return [
        compared(
            f"step, bound by {step.bound}", seconds, "s", lambda x: x.seconds
        ),
        *(
            benchmarks.Row(
                f"{name}: {part}", value, "s", whole, value / seconds
            )
            for part, value in (
                ("products", step.products),
                ("memory traffic", step.memory),
                ("network", step.network),
            )
        ),
        compared(
            "speed", size / seconds, "images/s", lambda x: size / x.seconds
        ),
        benchmarks.Row(f"{name}: share of the peak", step.share, "of FLOP/s"),
        benchmarks.Row(
            f"{name}: memory of a device, {fits}",
            step.bytes / 2**30,
            "GiB",
            "its memory",
            step.bytes / device.memory,
        ),
        benchmarks.Row(f"{name}: largest batch", step.largest, "images"),
    ]


# -- Check ---------------------------------------------------------------------


def check(given):
    """Rows of a step on this machine: planned and measured, in turns.

    By wall time and by CPU time, in which the rates of products and copies are
    taken, too.

    Args:
        given: `config.arguments()`.
    """
    from cappa_tf.training import accelerators
    from cappa_tf.training import plan as plans

    settings, products = given["settings"], _products(given)
    benchmarks.note("counting the operations of a step")
    model, optimizer = _build(given)
    steps = plans.record(model, _captions(given))
    update = plans.record_update(model, optimizer)
    heaviest = plans.heaviest_products(steps, settings.microbatch)
    of_update = plans.heaviest_products([update, update], 1)
    products_of = {products: _own_products(heaviest, products)}
    if of_update:
        products_of.setdefault("float32", {})
        products_of["float32"] |= _own_products(
            of_update, "float32", "update: "
        )
    own = {
        name: x for found in products_of.values() for name, x in found.items()
    }
    peak_name = f"matmul {products}"
    rated = {peak_name: _highest(products), **own, **_copy_contenders()}
    amounts = {
        name: one.facts.get("flops") or one.facts["moved"]
        for name, one in rated.items()
    }
    whole = benchmarks.Here(_one_step(given, model, optimizer))
    found = benchmarks.compete({"step": whole, **rated}, flags.FLAGS.rounds)
    rows = []
    for key, second in (("wall", "s"), ("cpu", "CPU s")):
        rates = {
            name: amount / benchmarks.median(found, name, key)
            for name, amount in amounts.items()
        }
        reached = {
            dtype: _reached(one, rates) for dtype, one in products_of.items()
        }
        work = plans.count_work(
            model,
            optimizer,
            captions=_captions(given),
            accumulation_steps=settings.accumulation_steps,
            fused=_is_compiled(given),
            memory=False,
            steps=steps,
            update=update,
            costs={kind: rates["copy"] / rates[kind] for kind in plans.COSTLY},
        )
        device = accelerators.Device(
            "this machine",
            float32=reached.get("float32", rates[peak_name]),
            bfloat16=reached.get("bfloat16", rates[peak_name]),
            bandwidth=rates["copy"],
            memory=0.0,
            product_efficiency=1.0,
            memory_efficiency=1.0,
        )
        planned = plans.step(
            work,
            device,
            1,
            settings.batch_size,
            products,
            settings.accumulation_steps,
        )
        rows += _rate_rows(rates, peak_name, own, second)
        measured = benchmarks.median(found, "step", key)
        rows += _planned_rows(planned, measured, second)
    return rows


def _is_compiled(given):
    from cappa_tf.training.distribution import strategies

    return strategies.use_xla(given["compute"].jit_compile)


def _one_step(given, model, optimizer):
    """A function that runs one training step, on a batch of zeros."""
    import tensorflow as tf

    from cappa_tf.training import step

    settings = given["settings"]
    specs = model.batch_spec(settings.batch_size, _captions(given))
    batch = {name: tf.zeros(x.shape, x.dtype) for name, x in specs.items()}
    if "labels" in batch:
        batch["labels"] += 1
    loop = step.TrainLoop(
        tf.distribute.get_strategy(),
        model,
        optimizer,
        settings.batch_size,
        settings.accumulation_steps,
        jit_compile=_is_compiled(given),
    )
    iterator = iter(tf.data.Dataset.from_tensors(batch).repeat())
    return lambda: loop(iterator, 1)


def _highest(dtype):
    """Contender: the product whose rate is called the peak."""
    from cappa_tf.training import peak

    size = flags.FLAGS.matmul
    return benchmarks.Here(peak.product(dtype, size), flops=2 * size**3)


def _own_products(heaviest, dtype, prefix=""):
    """Contenders by name: the heaviest products of a step or an update."""
    from cappa_tf.training import peak

    own = {}
    for total, one, shapes, options in heaviest:
        a, b = (
            "x".join(map(str, shape)) + " transposed" * transposed
            for shape, transposed in zip(shapes, options.values())
        )
        times = min(16, 1 + int(2e9 / one))
        own[f"{prefix}{a} by {b}"] = benchmarks.Here(
            peak.product_of(dtype, shapes, times, **options),
            flops=one * times,
            total=total,
        )
    return own


def _reached(own, rates):
    """FLOP/s of some products together, each as often as the step has it."""
    totals = {name: one.facts["total"] for name, one in own.items()}
    seconds = sum(total / rates[name] for name, total in totals.items())
    return sum(totals.values()) / seconds


def _copy_contenders():
    """Contenders by name: a copy, and operations that take longer than it."""
    from cappa_tf.training import peak
    from cappa_tf.training import plan as plans

    contenders = {}
    for kind in ("copy", *plans.COSTLY):
        moved, run_kind = peak.elementwise(kind, flags.FLAGS.copy * 8192)
        contenders[kind] = benchmarks.Here(run_kind, moved=moved)
    return contenders


def _rate_rows(rates, peak_name, own, second):
    """Rows of the measured rates."""
    from cappa_tf.training import plan as plans

    highest = rates[peak_name]
    flops = f"GFLOP/{second}"
    return [
        benchmarks.Row(peak_name, highest / 1e9, flops),
        *(
            benchmarks.Row(
                name,
                rates[name] / 1e9,
                flops,
                peak_name,
                rates[name] / highest,
            )
            for name in own
        ),
        *(
            benchmarks.Row(kind, rates[kind] / 1e9, f"GB/{second}")
            for kind in ("copy", *plans.COSTLY)
        ),
    ]


def _planned_rows(planned, measured, second):
    """Rows that compare the planned step with the measured one."""
    return [
        benchmarks.Row("planned: products", planned.products, second),
        benchmarks.Row("planned: memory traffic", planned.memory, second),
        benchmarks.Row("measured step", measured, second),
        benchmarks.Row(
            f"planned step, bound by {planned.bound}",
            planned.seconds,
            second,
            "measured step",
            planned.seconds / measured,
        ),
    ]
