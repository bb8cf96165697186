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

Each method runs in processes of its own, in turn.
"""

import json
import pathlib
import time

from absl import flags

from tools import benchmarks

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
    flags.DEFINE_integer("image_size", 224, "Side of its images.", **count)
    flags.DEFINE_integer("images", 16, "Images of its batch.", **count)
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
        "bytes": benchmarks.peak_bytes() - before,
        "seconds": seconds,
        "loss": float(loss),
    }


def make_captioner(variant, image_size, length, vocabulary_size, remat):
    """A captioner with the sizes of a variant."""
    from cappa_tf.models import captioner, sizes, text_decoder, vision_encoder

    chosen = sizes.variant(variant)
    encoder = vision_encoder.VisionEncoder(
        **chosen, image_size=image_size, remat=remat
    )
    shared = ("hidden_dim", "num_heads", "mlp_dim")
    decoder = text_decoder.TextDecoder(
        vocabulary_size,
        length,
        num_layers=max(1, encoder.num_layers // 2),
        remat=remat,
        **{name: chosen[name] for name in shared},
    )
    return captioner.Captioner(encoder, decoder)


def measure_step(
    way, variant, image_size, images, length, tokens, vocabulary_size
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
    strategy = tf.distribute.get_strategy()
    model, optimizer = construct.build_model(
        lambda: make_captioner(
            variant, image_size, length, vocabulary_size, remat
        ),
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
        "variant", "image_size", "images", "length", "tokens", "vocabulary_size"
    )


def run():
    """Prints peak and time of all methods, and the ratios."""
    way = flags.FLAGS.way
    if way in _WAYS:
        print(json.dumps(measure_loss(way, **_loss_arguments())))
    elif way in _CONTRASTIVE:
        print(json.dumps(measure_contrastive(way, **_pair_arguments())))
    elif way:
        print(json.dumps(measure_step(way, **_step_arguments())))
    else:
        _print_losses(_measure(_WAYS, _loss_arguments()))
        print()
        _print_contrastive()
        print()
        _print_steps(_measure(_STEPS, _step_arguments()))


def _measure(ways, arguments):
    return benchmarks.in_turns(
        ways,
        flags.FLAGS.rounds,
        lambda way: benchmarks.in_a_process("memory", way=way, **arguments),
    )


def _print_losses(found):
    print(f"{'loss':10}{'peak MiB':>10}{'seconds':>10}{'loss':>14}")
    for way, result in found.items():
        size = result["bytes"] / 2**20
        seconds, loss = result["seconds"], result["loss"]
        print(f"{way:10}{size:10.0f}{seconds:10.2f}{loss:14.2f}")
    memory, speed = (
        found["plain"][key] / found["chunked"][key]
        for key in ("bytes", "seconds")
    )
    print(f"plain / chunked: memory {memory:.1f}, time {speed:.1f}")


def _print_contrastive():
    arguments = _pair_arguments()
    pairs = arguments.pop("pairs")
    halved = _measure(_CONTRASTIVE, {"pairs": pairs // 2, **arguments})
    found = _measure(_CONTRASTIVE, {"pairs": pairs, **arguments})
    print(
        f"{'contrastive loss':18}{f'MiB, {pairs // 2} pairs':>18}"
        f"{f'MiB, {pairs} pairs':>18}{'ratio':>7}{'seconds':>9}{'loss':>10}"
    )
    for way, result in found.items():
        half, whole = (x[way]["bytes"] / 2**20 for x in (halved, found))
        print(
            f"{way:18}{half:18.0f}{whole:18.0f}{whole / half:7.1f}"
            f"{result['seconds']:9.2f}{result['loss']:10.4f}"
        )


def _print_steps(found):
    sizes = f"{flags.FLAGS.variant}, {flags.FLAGS.images} images"
    print(
        f"{'step of ' + sizes:30}{'peak MiB':>10}{'estimate':>10}"
        f"{'seconds':>10}{'loss':>10}{'saved':>8}"
    )
    most = found["float32"]["bytes"]
    for way, result in found.items():
        peak, estimate = (result[k] / 2**20 for k in ("bytes", "estimate"))
        print(
            f"{way:30}{peak:10.0f}{estimate:10.0f}{result['seconds']:10.2f}"
            f"{result['loss']:10.3f}{1 - result['bytes'] / most:8.0%}"
        )
