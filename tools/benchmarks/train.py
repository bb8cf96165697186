"""Speed of a training step, against the reference and the machine's limit.

    python tools/benchmark.py train
    python tools/benchmark.py train --reference=big_vision \
        --reference_python=venv/bin/python

Trains the same captioner in several ways, in turns, each in a process of its
own. A way is a precision and what else differs, joined by "-":

    float32, bfloat16   PRECISION (bfloat16: mixed_bfloat16)
    xla                 JIT_COMPILE = True
    remat               REMAT = True
    cut                 texts cut to --cut positions, as by `length_buckets`
    records             images decoded from TFRecords, with the same labels;
                        all others train on one batch that is in memory

The baseline is the reference if --reference is given, else the first way; that
of "records" is also the same way without it. The reference is the authors'
model, loss and optimizer in JAX, compiled by XLA, in float32 (its captioner
has no other precision). The FLOPs of all are those of this project's products
at full length, of which the loss takes the real tokens only.
"""

import contextlib
import tempfile

from absl import flags

from tools import benchmarks
from tools.benchmarks import models, references

WAYS = ("float32", "float32-xla", "float32-cut", "bfloat16", "bfloat16-cut")
_PRECISIONS = {"float32": "float32", "bfloat16": "mixed_bfloat16"}
_EXTRAS = ("xla", "remat", "cut", "records")


def define_flags():
    """Defines the flags of this benchmark."""
    models.define_flags()
    models.define_turns()
    models.define_peers("reference")
    flags.DEFINE_integer(
        "cut", 24, "Positions of the ways with cut texts.", lower_bound=1
    )
    flags.DEFINE_list("ways", list(WAYS), "Ways to measure.")


def _check_way(way):
    """(precision, extras) of a way.

    Raises:
        ValueError: If it is not of the form above.
    """
    precision, *extras = way.split("-")
    if precision not in _PRECISIONS or not set(extras) <= set(_EXTRAS):
        raise ValueError(
            "--ways must be of the form PRECISION[-EXTRA...] with a precision "
            f"of {', '.join(_PRECISIONS)} and extras of {', '.join(_EXTRAS)}. "
            f"Received: {way!r}"
        )
    return _PRECISIONS[precision], extras


def make(options):
    """A training step of one way.

    Args:
        options: Dict of `models.SIZES`, `way` and `cut`.

    Returns:
        (function that makes a step, dict of the type of its `products` and
        the number of `parameters`).
    """
    import tensorflow as tf

    from cappa_tf.training import construct, step
    from cappa_tf.training.optimizers import adafactor

    precision, extras = _check_way(options["way"])
    strategy = tf.distribute.get_strategy()
    model, optimizer = construct.build_model(
        lambda: models.make_captioner(options, "remat" in extras),
        # As in gin/optimizers/adafactor.gin.
        lambda: adafactor.Adafactor(weight_decay=1e-4, global_clip_norm=1.0),
        strategy,
        precision=precision,
    )
    size = options["batch_size"]
    batch = {
        "image": tf.constant(models.make_images(options)),
        "labels": tf.constant(models.make_labels(options)[:, None]),
        "index": tf.range(size, dtype=tf.int64),
    }
    if "cut" in extras:
        batch["labels"] = batch["labels"][..., : options["cut"]]
    if "records" in extras:
        stream = _records(options, batch)
    else:
        stream = tf.data.Dataset.from_tensors(batch).repeat()
    loop = step.TrainLoop(
        strategy, model, optimizer, size, jit_compile="xla" in extras
    )
    iterator = iter(stream)
    return lambda: _loss(loop(iterator, 1)[0]), {
        "products": options["way"].split("-")[0],
        "parameters": construct.parameter_counts(model)["total"],
    }


def _loss(sums):
    total, weight = sums.figures["loss"]
    return total / weight


def step_flops(options):
    """FLOPs of a step of the captioner that the options describe."""
    from cappa_tf.training import flops

    model = models.make_captioner(options)
    model.build()
    return options["batch_size"] * flops.training_flops(
        model, tokens=options["tokens"]
    )


def _records(options, batch):
    """The batch with its images read from TFRecords.

    Which are deleted with the process.
    """
    from tools.benchmarks import data

    folder = tempfile.TemporaryDirectory()
    side = round(options["image_size"] * 256 / 224)
    data.write(folder.name, data.shrink(data.load_photos(None), side) * 8)
    stream = data.dataset(
        folder.name, options["image_size"], batch_size=options["batch_size"]
    )
    _KEPT.append(folder)
    return stream.train().map(lambda one: {**batch, "image": one["image"]})


_KEPT = []


def run():
    """Returns rows of all ways."""
    values = flags.FLAGS
    options = {**models.given(), "cut": values.cut}
    if values.cut < options["tokens"]:
        raise ValueError(
            "--cut must be at least --tokens. Received: "
            f"--cut={values.cut}, --tokens={options['tokens']}"
        )
    for way in values.ways:
        _check_way(way)
    models.check_ways(values.ways, values.ways)
    reference = references.check()
    contenders = {}
    with contextlib.ExitStack() as stack:

        def enter(name, contender):
            stack.callback(contender.close)
            contenders[name] = contender

        for way in values.ways:
            enter(way, benchmarks.own("train", {**options, "way": way}))
        if reference:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            enter(
                references.NAME,
                references.start("train", options, reference, folder),
            )
            _check_same_size(contenders, values.ways[0], references.NAME)
        flops = step_flops(options)
        for contender in contenders.values():
            contender.facts["flops"] = flops
        contenders |= benchmarks.matmuls(values.matmul)
        found = benchmarks.compete(contenders, values.rounds, values.steps)
    baseline = references.NAME if reference else values.ways[0]
    rows = benchmarks.speeds(found, contenders, baseline, options["batch_size"])
    return rows + _rows_of_records(found, options)


def _check_same_size(contenders, *names):
    counts = [contenders[name].facts["parameters"] for name in names]
    if len(set(counts)) > 1:
        raise ValueError(
            "The reference must have as many parameters. "
            f"Received: {dict(zip(names, counts))}"
        )


def _rows_of_records(found, options):
    """Training from records, as a share of that from constant tensors."""
    rows = []
    for way in found:
        plain = way.replace("-records", "")
        if plain != way and plain in found:
            share = benchmarks.ratio(found, plain, way, "wall")
            rate = options["batch_size"] / benchmarks.median(found, way, "wall")
            rows.append(benchmarks.Row(way, rate, "images/s", plain, share))
    return rows
