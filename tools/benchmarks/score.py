"""Time of the likelihoods of many labels for each image.

    python tools/benchmark.py score
    python tools/benchmark.py score --reference=big_vision \
        --reference_python=venv/bin/python

Compares, in turns, one decoder pass over all --length positions for every label
(as in the reference), the same with labels cut to the longest of them, the
prefix trees of `captioner.score`, and parallel prediction, which is a different
score. Labels are a shared prompt and 1 to 8 random tokens; weights are random.
The methods without sharing run on --part of the labels, and their time is
scaled up. The authors' implementation in JAX does so, too, with the same
weights, with labels of --length positions and with labels that are cut. It is
the baseline if it is given, and computes in float32; else the first method is.
"""

import contextlib
import tempfile

from absl import flags

from tools import benchmarks
from tools.benchmarks import models, references

_PROMPT = 4  # number of tokens of "a photo of a"


def define_flags():
    """Defines the flags of this benchmark."""
    count = {"lower_bound": 1}
    models.define_flags(tokens=None)
    models.define_turns(rounds=1, steps=1)
    models.define_peers("reference")
    models.define_precision()
    flags.DEFINE_integer("labels", 1000, "Number of labels.", **count)
    flags.DEFINE_integer(
        "part", 8, "Labels scored by the methods without sharing.", **count
    )


def make_labels(count, length, vocabulary_size, seed=0):
    """Labels int32 [count, length]: a prompt, 1 to 8 random tokens, eos."""
    import numpy as np

    rng = np.random.RandomState(seed)
    labels = rng.randint(2, vocabulary_size, (count, length))
    labels[:, :_PROMPT] = labels[0, :_PROMPT]
    ends = _PROMPT + rng.randint(1, 9, count)
    ends = np.minimum(ends, length - 1)
    labels[np.arange(count), ends] = 1
    labels[np.arange(length) > ends[:, None]] = 0
    return labels.astype("int32")


def make_ways(captioner, labels, part):
    """Dict method -> (function of images to scores [B, labels], labels)."""
    import numpy as np
    import tensorflow as tf

    decoder = captioner.text_decoder
    few = labels[:part]
    short = cut(labels, decoder.special_tokens.pad)[:part]

    @tf.function(autograph=False)
    def one(encoded, label):
        """Scores of one label; projects keys and values for each label."""
        memory = decoder.project_memory(encoded)
        tiled = tf.repeat(label[None], tf.shape(encoded)[0], axis=0)
        inputs = tf.pad(tiled[:, :-1], [[0, 0], [1, 0]])
        nll = tf.nn.sparse_softmax_cross_entropy_with_logits(
            tiled, decoder.logits(decoder(inputs, memory))
        )
        return -tf.reduce_sum(tf.where(tiled != 0, nll, 0.0), axis=1)

    def one_by_one(images, labels):
        encoded = captioner.encode(images)
        rows = [one(encoded, tf.constant(label)) for label in labels]
        return np.stack(rows, axis=1)

    shared = tf.function(lambda x: captioner.score(x, labels), autograph=False)
    parallel = tf.function(
        lambda x: captioner.score(x, labels, parallel=True), autograph=False
    )
    return {
        "pass per label": (lambda x: one_by_one(x, few), part),
        "pass, cut": (lambda x: one_by_one(x, short), part),
        "prefix trees": (lambda x: shared(x).numpy(), len(labels)),
        "parallel": (lambda x: parallel(x).numpy(), len(labels)),
    }


def run():
    """Returns rows of all methods, and how far their scores are apart."""
    import tensorflow as tf

    values = flags.FLAGS
    options = models.given()
    reference = references.check()
    captioner = models.make_scorer(options, values.precision)
    pad = captioner.text_decoder.special_tokens.pad
    labels = make_labels(values.labels, values.length, values.vocabulary_size)
    part = min(values.part, values.labels)
    images = tf.constant(models.make_images(options))
    ways = make_ways(captioner, labels, part)
    # Labels that each contender scores.
    counts = {name: count for name, (_, count) in ways.items()}
    contenders = {
        name: benchmarks.Here(lambda way=way: way(images))
        for name, (way, _) in ways.items()
    }
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if reference:
            texts = {"": labels[:part], ", cut": cut(labels, pad)[:part]}
            for what, some in texts.items():
                worker = references.start(
                    "score", options, reference, folder, captioner, some
                )
                stack.callback(worker.close)
                contenders[references.NAME + what] = worker
                counts[references.NAME + what] = part
        found = benchmarks.compete(
            contenders, values.rounds, values.steps, folder
        )
        first = references.NAME if reference else next(iter(ways))
        # Parallel prediction gives other scores.
        same = [name for name in contenders if name != "parallel"]
        apart = benchmarks.differences(folder, same, first)
    # Seconds for all labels.
    for name, turns in found.items():
        for turn in turns:
            for key in ("wall", "cpu"):
                turn[key] *= len(labels) / counts[name]
    rows = benchmarks.speeds(found, contenders, first, options["batch_size"])
    return rows + apart


def cut(labels, pad):
    """Labels without the positions that are padding in all of them."""
    from cappa_tf.models import likelihood

    return likelihood.cut_padding(labels, pad).numpy()
