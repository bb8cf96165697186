"""Time of the likelihoods of many labels for each image.

    python tools/benchmark.py score

One decoder pass over all 64 positions for every label (the reference's way),
the same with labels cut to the longest of them, the prefix trees of
`captioner.score`, and its parallel mode, which is another score. The model is
S/16 with random weights; labels are a prompt that all share and 1 to 8 random
tokens. The first two ways run on a part of the labels, and their time is
multiplied.
"""

import time

from absl import flags

from tools import benchmarks

_PROMPT = 4  # Tokens of "a photo of a".


def define_flags():
    """Defines the flags of this benchmark."""
    count = {"lower_bound": 1}
    flags.DEFINE_integer("batch_size", 8, "Images.", **count)
    flags.DEFINE_integer("labels", 1000, "Labels.", **count)
    flags.DEFINE_integer(
        "part", 8, "Labels that the ways without sharing score.", **count
    )
    flags.DEFINE_integer("image_size", 224, "Of the images.", **count)
    flags.DEFINE_integer("length", 64, "Positions of the decoder.", **count)
    flags.DEFINE_integer("vocabulary_size", 32_000, "Tokens.", **count)
    flags.DEFINE_string("variant", "S/16", "Of the encoder.")
    flags.DEFINE_integer("decoder_layers", 6, "Of the decoder.", **count)
    flags.DEFINE_integer("rounds", 1, "Runs of each way, in turns.", **count)


def make_captioner(variant, image_size, length, vocabulary_size, layers):
    """A captioner with random weights, those of the head included."""
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
    """int32 [count, length]: a prompt, 1 to 8 random tokens and eos."""
    import numpy as np

    draw = np.random.RandomState(seed)
    labels = draw.randint(2, vocabulary_size, (count, length))
    labels[:, :_PROMPT] = labels[0, :_PROMPT]
    ends = _PROMPT + draw.randint(1, 9, count)
    ends = np.minimum(ends, length - 1)
    labels[np.arange(count), ends] = 1
    labels[np.arange(length) > ends[:, None]] = 0
    return labels.astype("int32")


def make_ways(captioner, labels, part):
    """A dict: way -> (function of images to scores [B, labels], labels)."""
    import numpy as np
    import tensorflow as tf

    from cappa_tf.models import likelihood

    decoder = captioner.text_decoder
    few = labels[:part]
    pad = decoder.special_tokens.pad
    short = likelihood.cut_padding(labels, pad).numpy()[:part]

    @tf.function(autograph=False)
    def one(encoded, label):
        """Keys and values of the images, too, once for each label."""
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
        "pass a label": (lambda x: one_by_one(x, few), part),
        "pass, cut": (lambda x: one_by_one(x, short), part),
        "prefix trees": (lambda x: shared(x).numpy(), len(labels)),
        "parallel": (lambda x: parallel(x).numpy(), len(labels)),
    }


def measure(ways, images, rounds):
    """Times the ways, in turns.

    Returns:
        A dict: way -> dict of `seconds` for one image and all labels; and
        the largest difference of the first three ways' scores.
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
    """Prints seconds an image of each way, and ratios to the first."""
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
        f"{'way':15}{'labels run':>11}{'s / image':>11}{'times faster':>14}"
        f"   (seconds are for {values.labels} labels)"
    )
    for name, result in found.items():
        seconds = result["seconds"]
        count = ways[name][1]
        print(f"{name:15}{count:11}{seconds:11.3f}{first / seconds:14.1f}")
    print(f"largest difference of left-to-right scores: {difference:.1e}")
