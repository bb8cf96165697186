"""Time of the likelihoods of many labels for each image.

    python tools/benchmark.py score

Compares one decoder pass over all 64 positions for every label (as in the
reference), the same with labels cut to the longest of them, the prefix trees
of `captioner.score`, and parallel prediction, which is a different score. The
model is S/16 with random weights; labels are a shared prompt and 1 to 8 random
tokens. The first two methods run on a part of the labels, and their time is
scaled up.
"""

import time

from absl import flags

from tools import benchmarks

_PROMPT = 4  # number of tokens of "a photo of a"


def define_flags():
    """Defines the flags of this benchmark."""
    count = {"lower_bound": 1}
    flags.DEFINE_integer("batch_size", 8, "Number of images.", **count)
    flags.DEFINE_integer("labels", 1000, "Number of labels.", **count)
    flags.DEFINE_integer(
        "part", 8, "Labels scored by the methods without sharing.", **count
    )
    flags.DEFINE_integer("image_size", 224, "Side of the images.", **count)
    flags.DEFINE_integer("length", 64, "Positions of the decoder.", **count)
    flags.DEFINE_integer("vocabulary_size", 32_000, "Token ids.", **count)
    flags.DEFINE_string("variant", "S/16", "Size of the encoder.")
    flags.DEFINE_integer("decoder_layers", 6, "Blocks of the decoder.", **count)
    flags.DEFINE_integer("rounds", 1, "Runs of each method.", **count)


def make_captioner(variant, image_size, length, vocabulary_size, layers):
    """A captioner with random weights, including those of the head."""
    import keras

    from cappa_tf.models.captioner import Captioner
    from cappa_tf.models.sizes import variant as sizes_of
    from cappa_tf.models.text_decoder import TextDecoder
    from cappa_tf.models.vision_encoder import VisionEncoder

    keras.utils.set_random_seed(0)
    sizes = sizes_of(variant)
    encoder = VisionEncoder(**sizes, image_size=image_size)
    sizes = {**sizes, "num_layers": layers}
    del sizes["patch_size"]
    captioner = Captioner(
        encoder, TextDecoder(vocabulary_size, length, **sizes)
    )
    captioner.build()
    kernel = captioner.text_decoder.head_weights[0]
    kernel.assign(keras.random.normal(kernel.shape, stddev=0.05, seed=1))
    return captioner


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

    from cappa_tf.models import likelihood

    decoder = captioner.text_decoder
    few = labels[:part]
    pad = decoder.special_tokens.pad
    short = likelihood.cut_padding(labels, pad).numpy()[:part]

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


def measure(ways, images, rounds):
    """Times the methods in turn.

    Returns:
        Dict method -> dict of `seconds` for one image and all labels; and the
        largest difference between the scores of the first three methods.
    """
    import numpy as np

    scores = {name: way(images) for name, (way, _) in ways.items()}
    plain, cut, trees, _ = scores.values()
    part = plain.shape[1]
    difference = max(
        float(np.abs(found[:, :part] - plain).max()) for found in (cut, trees)
    )
    most = max(count for _, count in ways.values())

    def once(name):
        way, count = ways[name]
        start = time.perf_counter()
        way(images)
        seconds = time.perf_counter() - start
        return {"seconds": seconds * most / count / len(images)}

    return benchmarks.in_turns(ways, rounds, once), difference


def run():
    """Prints seconds per image of each method, and ratios to the first."""
    import tensorflow as tf

    values = flags.FLAGS
    captioner = make_captioner(
        values.variant,
        values.image_size,
        values.length,
        values.vocabulary_size,
        values.decoder_layers,
    )
    labels = make_labels(values.labels, values.length, values.vocabulary_size)
    images = tf.random.stateless_uniform(
        [values.batch_size, *captioner.vision_encoder.image_size, 3],
        [0, 1],
        -1,
        1,
    )
    ways = make_ways(captioner, labels, min(values.part, values.labels))
    found, difference = measure(ways, images, values.rounds)
    first = next(iter(found.values()))["seconds"]
    print(
        f"{'method':15}{'labels run':>11}{'s / image':>11}{'times faster':>14}"
        f"   (seconds are for {values.labels} labels)"
    )
    for name, result in found.items():
        seconds = result["seconds"]
        count = ways[name][1]
        print(f"{name:15}{count:11}{seconds:11.3f}{first / seconds:14.1f}")
    print(f"largest difference of left-to-right scores: {difference:.1e}")
