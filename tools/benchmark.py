"""Measures what this project claims about cost; prints ratios.

    python tools/benchmark.py memory

Benchmarks:
    memory  peak memory and time of the captioning loss and its gradients, the
            chunked way of this project against the plain way that holds all
            logits; by default 512 captions of 64 positions, 12 of them real,
            and a vocabulary of 32,000

Each way runs in a process of its own, in turns, so that peaks do not mix.
"""

import json
import os
import pathlib
import resource
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app, flags

_WAYS = ("plain", "chunked")


def define_flags():
    """Defines the flags of this tool."""
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


def _peak_bytes():
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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

    before = _peak_bytes()
    loss = step()[0].numpy()
    start = time.perf_counter()
    step()[0].numpy()
    seconds = time.perf_counter() - start
    return {
        "bytes": _peak_bytes() - before,
        "seconds": seconds,
        "loss": float(loss),
    }


def _arguments():
    names = ("batch_size", "length", "tokens", "vocabulary_size", "width")
    return {name: flags.FLAGS[name].value for name in names}


def _in_a_process(way):
    """`measure_loss` in a fresh process."""
    values = [f"--{k}={v}" for k, v in _arguments().items()]
    output = subprocess.run(
        [sys.executable, __file__, "memory", f"--way={way}", *values],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return json.loads(output.splitlines()[-1])


def _memory():
    """Prints both ways' peak and time, and the ratios."""
    runs = {way: [] for way in _WAYS}
    for _ in range(flags.FLAGS.rounds):
        for way in _WAYS:
            runs[way].append(_in_a_process(way))
    best = {}
    print(f"{'way':10}{'peak MiB':>10}{'seconds':>10}{'loss':>14}")
    for way, results in runs.items():
        best[way] = [
            sorted(r[key] for r in results)[len(results) // 2]
            for key in ("bytes", "seconds", "loss")
        ]
        size, seconds, loss = best[way]
        print(f"{way:10}{size / 2**20:10.0f}{seconds:10.2f}{loss:14.2f}")
    memory, speed = (best["plain"][i] / best["chunked"][i] for i in (0, 1))
    print(f"plain / chunked: memory {memory:.1f}, time {speed:.1f}")


def main(argv):
    """Runs the benchmark named by the argument."""
    if argv[1:] != ["memory"]:
        raise app.UsageError(
            f"Name one benchmark: memory. Received: {argv[1:]}"
        )
    if flags.FLAGS.way:
        print(json.dumps(measure_loss(flags.FLAGS.way, **_arguments())))
    else:
        _memory()


if __name__ == "__main__":
    define_flags()
    app.run(main)
