"""Memory and time of the captioning loss and its gradients.

    python tools/benchmark.py memory

The chunked way of this project against the plain way that holds all logits;
by default 512 captions of 64 positions, 12 of them real, and a vocabulary of
32,000. Each way runs in processes of its own, in turns.
"""

import json
import time

from absl import flags

from tools import benchmarks

_WAYS = ("plain", "chunked")


def define_flags():
    """Defines the flags of this benchmark."""
    count = {"lower_bound": 1}
    flags.DEFINE_integer("batch_size", 512, "Captions.", **count)
    flags.DEFINE_integer("length", 64, "Positions of a caption.", **count)
    flags.DEFINE_integer("tokens", 12, "Real tokens of a caption.", **count)
    flags.DEFINE_integer("vocabulary_size", 32_000, "Tokens.", **count)
    flags.DEFINE_integer("width", 384, "Width of the decoder.", **count)
    flags.DEFINE_integer("rounds", 3, "Runs of each way, in turns.", **count)
    flags.DEFINE_enum("way", None, _WAYS, "Measure one way in this process.")


def _loss(way, hidden, targets, valid, kernel, bias):
    """Sum of the losses of all real tokens, one way or the other."""
    import tensorflow as tf

    from cappa_tf.models import losses

    if way == "chunked":
        parts = (hidden, targets, valid, kernel, bias)
        return tf.reduce_sum(losses.token_cross_entropy(*parts)[0])
    nll = tf.nn.sparse_softmax_cross_entropy_with_logits(
        targets, hidden @ kernel + bias
    )
    return tf.reduce_sum(tf.where(valid, nll, 0.0))


def measure_loss(way, batch_size, length, tokens, vocabulary_size, width):
    """One loss with gradients, compiled as a graph.

    Returns:
        Dict: `bytes`, the peak of this process above what it held before;
        `seconds` of the second call; `loss`.
    """
    import tensorflow as tf

    tf.random.set_seed(0)
    rows = batch_size * length
    hidden = tf.random.normal([rows, width])
    kernel = tf.Variable(tf.random.normal([width, vocabulary_size]) * 0.02)
    bias = tf.Variable(tf.zeros([vocabulary_size]))
    targets = tf.random.uniform([rows], 1, vocabulary_size, tf.int32)
    valid = tf.tile(tf.range(length) < tokens, [batch_size])

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            tape.watch(hidden)
            loss = _loss(way, hidden, targets, valid, kernel, bias)
        return loss, tape.gradient(loss, [hidden, kernel, bias])

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


def _arguments():
    names = ("batch_size", "length", "tokens", "vocabulary_size", "width")
    return {name: flags.FLAGS[name].value for name in names}


def run():
    """Prints both ways' peak and time, and the ratios."""
    if flags.FLAGS.way:
        print(json.dumps(measure_loss(flags.FLAGS.way, **_arguments())))
        return
    found = benchmarks.in_turns(
        _WAYS,
        flags.FLAGS.rounds,
        lambda way: benchmarks.in_a_process("memory", way=way, **_arguments()),
    )
    print(f"{'way':10}{'peak MiB':>10}{'seconds':>10}{'loss':>14}")
    for way, result in found.items():
        size = result["bytes"] / 2**20
        seconds, loss = result["seconds"], result["loss"]
        print(f"{way:10}{size:10.0f}{seconds:10.2f}{loss:14.2f}")
    memory, speed = (
        found["plain"][key] / found["chunked"][key]
        for key in ("bytes", "seconds")
    )
    print(f"plain / chunked: memory {memory:.1f}, time {speed:.1f}")
