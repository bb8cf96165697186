"""Memory and time of the losses, and of a whole training step.

    python tools/benchmark.py memory

1. The loss and its gradients: this project's chunked method against the plain
   one, which holds all logits; by default for 512 captions of 64 positions, 12
   of them real, and a vocabulary of 32,000.
2. The contrastive losses and their gradients, softmax and sigmoid, with the
   logits of all pairs at once ("whole") and of `LOGITS_CHUNK` rows ("chunked"),
   by default for 8,192 pairs and half as many: memory that is linear in the
   batch doubles.
3. The step: all four combinations of PRECISION and REMAT; by default for S/16
   at 224 px and 16 images, beside the estimate of `--dry_run`.
4. Growth: the step of --growth_way with the numbers of images of --batches.
   The memory of a further image is the slope of the line from the first to the
   last of them, and the others are compared with that line; the time of an
   image is compared with that in the first batch. The estimate of a further
   image is to be compared, rather than that of a step, which leaves out what
   tracing and compiling take (some 450 MiB, whatever the sizes).

Each method runs in processes of its own, in turn.
"""

import dataclasses
import json
import pathlib
import statistics
import time

from absl import flags

from tools import benchmarks
from tools.benchmarks import models

_WAYS = ("plain", "chunked")
# Loss and rows of the logits that are held at once (None: all), by name.
_CONTRASTIVE = {
    "softmax, whole": ("softmax", None),
    "softmax, chunked": ("softmax", 1024),
    "sigmoid, whole": ("sigmoid", None),
    "sigmoid, chunked": ("sigmoid", 1024),
}
# Precision and rematerialization of a step, by name.
_STEPS = {
    "float32": ("float32", False),
    "float32, remat": ("float32", True),
    "mixed_bfloat16": ("mixed_bfloat16", False),
    "mixed_bfloat16, remat": ("mixed_bfloat16", True),
}


def define_flags():
    """Defines the flags of this benchmark."""
    count = {"lower_bound": 1}
    flags.DEFINE_integer("batch_size", 512, "Number of captions.", **count)
    flags.DEFINE_integer("length", 64, "Positions per caption.", **count)
    flags.DEFINE_integer("tokens", 12, "Real tokens per caption.", **count)
    flags.DEFINE_integer("vocabulary_size", 32_000, "Token ids.", **count)
    flags.DEFINE_integer("width", 384, "Width of the decoder.", **count)
    flags.DEFINE_integer("rounds", 3, "Runs of each method.", **count)
    flags.DEFINE_integer(
        "pairs", 8192, "Pairs of a contrastive batch.", **count
    )
    flags.DEFINE_integer("embedding", 768, "Width of embeddings.", **count)
    flags.DEFINE_string("variant", "S/16", "Model of the training step.")
    flags.DEFINE_integer(
        "encoder_layers", None, "Its blocks; the variant's by default.", **count
    )
    flags.DEFINE_integer("image_size", 224, "Side of its images.", **count)
    flags.DEFINE_integer("images", 16, "Images of its batch.", **count)
    flags.DEFINE_list("batches", ["8", "16", "32", "64"], "Sizes of batches.")
    flags.DEFINE_enum(
        "growth_way", "mixed_bfloat16", [*_STEPS], "How they are trained."
    )
    ways = (*_WAYS, *_CONTRASTIVE, *_STEPS)
    flags.DEFINE_enum("way", None, ways, "Measure one method in this process.")


def _loss(way, hidden, targets, valid, kernel, bias):
    """Sum of the losses of all real tokens, by one of the methods."""
    import tensorflow as tf

    from cappa_tf.models.losses import cross_entropy

    if way == "chunked":
        parts = (hidden, targets, valid, kernel, bias)
        return tf.reduce_sum(cross_entropy.token_cross_entropy(*parts)[0])
    nll = tf.nn.sparse_softmax_cross_entropy_with_logits(
        targets, hidden @ kernel + bias
    )
    return tf.reduce_sum(tf.where(valid, nll, 0.0))


def measure_loss(way, batch_size, length, tokens, vocabulary_size, width):
    """Measures one loss with gradients, compiled as a graph.

    Returns:
        Dict of `bytes`, the peak of this process above its previous memory;
        `seconds` of the second call; and `loss`.
    """
    import tensorflow as tf

    tf.random.set_seed(0)
    rows = batch_size * length
    hidden = tf.random.normal([rows, width])
    kernel = tf.Variable(tf.random.normal([width, vocabulary_size]) * 0.02)
    bias = tf.Variable(tf.zeros([vocabulary_size]))
    targets = tf.random.uniform([rows], 1, vocabulary_size, tf.int32)
    valid = tf.tile(tf.range(length) < tokens, [batch_size])

    return _measured(
        lambda *parts: _loss(way, parts[0], targets, valid, *parts[1:]),
        [hidden, kernel, bias],
    )


def measure_contrastive(way, pairs, embedding):
    """Measures one contrastive loss with gradients, compiled as a graph.

    Returns:
        As `measure_loss`.
    """
    import tensorflow as tf

    from cappa_tf.models.losses import contrastive

    kind, rows = _CONTRASTIVE[way]
    images, texts = (
        tf.math.l2_normalize(
            tf.random.stateless_normal([pairs, embedding], (0, i)), axis=1
        )
        for i in range(2)
    )

    def loss(images, texts, scale, bias):
        options = {"chunk_size": rows or pairs}
        parts = (images, texts, (0, pairs), scale)
        if kind == "softmax":
            losses, _ = contrastive.softmax_losses(*parts, **options)
        else:
            losses, _ = contrastive.sigmoid_losses(*parts, bias, **options)
        return tf.reduce_mean(losses)

    start = [images, texts, tf.constant(10.0), tf.constant(-10.0)]
    return _measured(loss, start)


def _measured(function, values):
    """Memory and time of a scalar function and its gradients."""
    import tensorflow as tf

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            tape.watch(values)
            loss = function(*values)
        return loss, tape.gradient(loss, values, unconnected_gradients="zero")

    before = benchmarks.peak_bytes()
    loss = step()[0].numpy()
    start = time.perf_counter()
    step()[0].numpy()
    seconds = time.perf_counter() - start
    return {
        # At least one, as others are divided by it.
        "bytes": max(1, benchmarks.peak_bytes() - before),
        "seconds": seconds,
        "loss": float(loss),
    }


def measure_step(
    way,
    variant,
    encoder_layers,
    image_size,
    images,
    length,
    tokens,
    vocabulary_size,
):
    """Measures training steps on one device, without XLA.

    Returns:
        Dict of `bytes`, the peak of two steps in addition to weights and
        optimizer state, including tracing; `estimate`, its estimate by
        `--dry_run`; `seconds` of the second step; and `loss` of the first.
    """
    import tensorflow as tf

    from cappa_tf.training import construct, step
    from cappa_tf.training import memory_estimate as estimates
    from cappa_tf.training.optimizers import adafactor

    precision, remat = _STEPS[way]
    sizes = {
        "variant": variant,
        "encoder_layers": encoder_layers,
        "image_size": image_size,
        "length": length,
        "vocabulary_size": vocabulary_size,
    }
    strategy = tf.distribute.get_strategy()
    model, optimizer = construct.build_model(
        lambda: models.make_captioner(sizes, remat),
        adafactor.Adafactor,
        strategy,
        precision=precision,
    )
    labels = tf.random.stateless_uniform(
        [images, 1, length], (0, 1), 1, vocabulary_size, tf.int32
    )
    shape = [images, image_size, image_size, 3]
    batch = {
        "image": tf.random.stateless_uniform(shape, (0, 2), -1.0, 1.0),
        "labels": tf.where(tf.range(length) < tokens, labels, 0),
        "index": tf.range(images, dtype=tf.int64),
    }
    stream = iter(tf.data.Dataset.from_tensors(batch).repeat())
    loop = step.TrainLoop(strategy, model, optimizer, images)
    # Measured before the first step, as TensorFlow keeps that step's memory.
    before = _resident_bytes("VmRSS")
    loss, examples = loop(stream, 1)[0].figures["loss"]
    start = time.perf_counter()
    loop(stream, 1)
    seconds = time.perf_counter() - start
    peak = _resident_bytes("VmHWM") - before
    parts = estimates.estimate(model, optimizer, strategy, images)
    return {
        "bytes": peak,
        "estimate": parts["gradients"] + parts["activations"],
        "seconds": seconds,
        "loss": loss / examples,
    }


def _resident_bytes(name):
    """Memory of this process, "VmRSS" (current) or "VmHWM" (peak), on Linux."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(name))
    return int(line.split()[1]) * 1024


def _arguments(*names):
    return {name: flags.FLAGS[name].value for name in names}


def _loss_arguments():
    return _arguments(
        "batch_size", "length", "tokens", "vocabulary_size", "width"
    )


def _pair_arguments():
    return _arguments("pairs", "embedding")


def _step_arguments():
    return _arguments(
        "variant",
        "encoder_layers",
        "image_size",
        "images",
        "length",
        "tokens",
        "vocabulary_size",
    )


def run():
    """Returns rows of all methods, or prints what was measured of --way."""
    way = flags.FLAGS.way
    if way in _WAYS:
        print(json.dumps(measure_loss(way, **_loss_arguments())))
    elif way in _CONTRASTIVE:
        print(json.dumps(measure_contrastive(way, **_pair_arguments())))
    elif way:
        print(json.dumps(measure_step(way, **_step_arguments())))
    else:
        sizes = _batches()
        losses = _measure(_WAYS, _loss_arguments())
        return [
            *_rows("loss, ", losses, "plain"),
            *_contrastive_rows(),
            *_step_rows(),
            *_growth_rows(sizes),
        ]
    return None


def _batches():
    """The sizes of --batches, in increasing order."""
    given = flags.FLAGS.batches
    sizes = [int(size) for size in given if size.isdigit()]
    if len(sizes) != len(given) or sorted(set(sizes) - {0}) != sizes:
        raise ValueError(
            "--batches must be increasing numbers. "
            f"Received: --batches={','.join(given)}"
        )
    return sizes


def _measure(ways, arguments, **more):
    return benchmarks.turns_of(
        ways,
        flags.FLAGS.rounds,
        lambda way: benchmarks.in_a_process(
            "memory", way=way, **{**arguments, **more}
        ),
    )


def _rows(prefix, found, baseline):
    """Rows of memory and time of each way, compared with one of them."""
    rows = []
    for way in found:
        for key, unit, scale in (
            ("bytes", "MiB at most", 2.0**-20),
            ("seconds", "s", 1.0),
        ):
            value = benchmarks.median(found, way, key) * scale
            row = benchmarks.Row(prefix + way, value, unit)
            if way != baseline:
                row = dataclasses.replace(
                    row,
                    baseline=prefix + baseline,
                    ratio=benchmarks.ratio(found, way, baseline, key),
                )
            rows.append(row)
    return rows


def _contrastive_rows():
    """Memory of each loss beside that of half as many pairs."""
    arguments = _pair_arguments()
    pairs = arguments["pairs"]
    halved = _measure(_CONTRASTIVE, arguments, pairs=pairs // 2)
    found = _measure(_CONTRASTIVE, arguments)
    rows = []
    for way in found:
        both = {"half": halved[way], "whole": found[way]}
        half = benchmarks.median(both, "half", "bytes") / 2**20
        whole = benchmarks.median(both, "whole", "bytes") / 2**20
        few = f"{way}, {pairs // 2} pairs"
        rows += [
            benchmarks.Row(few, half, "MiB at most"),
            benchmarks.Row(
                f"{way}, {pairs} pairs",
                whole,
                "MiB at most",
                few,
                benchmarks.ratio(both, "whole", "half", "bytes"),
            ),
        ]
    return rows


def _step_rows():
    """Memory of a step with each setting, and how good its estimate is."""
    prefix = f"step of {flags.FLAGS.images} images, "
    found = _measure(_STEPS, _step_arguments())
    estimates = [
        benchmarks.Row(
            f"{prefix}{way}, estimated",
            benchmarks.median(found, way, "estimate") / 2**20,
            "MiB",
            prefix + way,
            statistics.median(x["estimate"] / x["bytes"] for x in turns),
        )
        for way, turns in found.items()
    ]
    return [*_rows(prefix, found, "float32"), *estimates]


def _growth_rows(sizes):
    """Memory and time of a step by the size of the batch."""
    way, arguments = flags.FLAGS.growth_way, _step_arguments()
    found = benchmarks.turns_of(
        sizes,
        flags.FLAGS.rounds,
        lambda images: benchmarks.in_a_process(
            "memory", way=way, **{**arguments, "images": images}
        ),
    )
    first, last = sizes[0], sizes[-1]
    memory = {n: benchmarks.median(found, n, "bytes") / 2**20 for n in sizes}
    slope = (memory[last] - memory[first]) / max(1, last - first)
    further = f"a further image, {way}"
    estimate = (
        benchmarks.median(found, last, "estimate")
        - benchmarks.median(found, first, "estimate")
    ) / (2**20 * max(1, last - first))
    rows = [
        benchmarks.Row(further, slope, "MiB"),
        benchmarks.Row(
            f"{further}, estimated",
            estimate,
            "MiB",
            further,
            estimate / slope if slope else None,
        ),
    ]
    for size in sizes:
        name = f"step of {size}, {way}"
        line = memory[first] + slope * (size - first)
        rows.append(
            benchmarks.Row(
                name, memory[size], "MiB at most", "line", memory[size] / line
            )
        )
        seconds = benchmarks.median(found, size, "seconds")
        rows.append(
            benchmarks.Row(
                name,
                1e3 * seconds / size,
                "ms/image",
                f"step of {first}",
                benchmarks.ratio(found, size, first, "seconds") * first / size,
            )
        )
    return rows
