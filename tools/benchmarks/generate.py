"""Time of different ways to caption with a trained model.

    python tools/benchmark.py generate --checkpoint=runs/quickstart

Compares greedy decoding with cached keys and values to greedy decoding that
runs the decoder over all positions at every step, to captions by parallel
prediction, and to four beams. Images are synthetic scenes.
"""

import time

from absl import flags

from tools import benchmarks


def define_flags():
    """Defines the flags of this benchmark."""
    flags.DEFINE_string("checkpoint", None, "Folder of a run.", required=True)
    flags.DEFINE_multi_integer("batch_size", [1, 32], "Images per batch.")
    flags.DEFINE_integer("rounds", 5, "Runs of each method.", lower_bound=1)


def make_images(count, image_size):
    """Images float32 [count, H, W, 3] in [-1, 1] of unseen compositions."""
    import tensorflow as tf

    from cappa_tf.data.scenes import world

    images = [
        tf.io.decode_image(example.image, channels=3)
        for example in world.examples("heldout", count, image_size)
    ]
    return tf.cast(tf.stack(images), tf.float32) / 127.5 - 1.0


def make_ways(captioner):
    """Dict method -> function of images to tokens and number of passes."""
    import tensorflow as tf

    from cappa_tf.models import generation, sampling

    decoder = captioner.text_decoder
    length = decoder.max_length

    def memory(images):
        return decoder.project_memory(captioner.encode(images))

    def cached(images):
        tokens = captioner.generate(images)["tokens"]
        return tokens, tf.reduce_max(tf.math.count_nonzero(tokens, axis=1))

    def uncached(images):
        known = memory(images)
        tokens = tf.zeros([tf.shape(images)[0], length], tf.int32)
        for i in range(length):
            inputs = tf.pad(tokens[:, :-1], [[0, 0], [1, 0]])
            logits = decoder.logits(decoder(inputs, known))[:, i, 1:]
            best = 1 + tf.argmax(logits, axis=-1, output_type=tf.int32)
            tokens += best[:, None] * tf.one_hot(i, length, dtype=tf.int32)
        ended = tf.cumsum(tf.cast(tokens == 1, tf.int32), 1, exclusive=True)
        return tf.where(ended > 0, 0, tokens), length

    def drafted(images):
        tokens = generation.draft(decoder, memory(images), length)
        ended = tf.cumsum(tf.cast(tokens == 1, tf.int32), 1, exclusive=True)
        return tf.where(ended > 0, 0, tokens), 1

    def beams(images):
        search = sampling.BeamSearch(4)
        tokens = captioner.generate(images, sampler=search)["tokens"]
        return tokens, tf.reduce_max(tf.math.count_nonzero(tokens, axis=1))

    ways = {
        "greedy, cached": cached,
        "greedy, uncached": uncached,
        "parallel draft": drafted,
        "4 beams": beams,
    }
    return {
        name: tf.function(way, autograph=False) for name, way in ways.items()
    }


def measure(ways, images, rounds):
    """Times the methods in turn, on the same images.

    Returns:
        Dict method -> dict of `seconds` per call (median), `passes` of the
        decoder and `equal`, the fraction of captions that equal those of the
        first method.
    """
    import numpy as np

    tokens = {name: way(images)[0].numpy() for name, way in ways.items()}
    wanted = next(iter(tokens.values()))

    def once(name):
        start = time.perf_counter()
        found, passes = ways[name](images)
        found.numpy()
        return {
            "seconds": time.perf_counter() - start,
            "passes": int(passes),
            "equal": float(np.mean(np.all(found == wanted, axis=1))),
        }

    return benchmarks.in_turns(ways, rounds, once)


def run():
    """Prints the time of each method, and its ratio to cached greedy."""
    from cappa_tf.saving import run_folder

    captioner = run_folder.load_model(flags.FLAGS.checkpoint)
    size = captioner.vision_encoder.image_size[0]
    ways = make_ways(captioner)
    for batch_size in flags.FLAGS.batch_size:
        images = make_images(batch_size, size)
        found = measure(ways, images, flags.FLAGS.rounds)
        first = next(iter(found.values()))["seconds"]
        print(f"batch of {batch_size}, {captioner.text_decoder.max_length=}")
        print(
            f"{'method':18}{'ms':>9}{'x greedy':>10}{'passes':>8}{'equal':>7}"
        )
        for name, result in found.items():
            print(
                f"{name:18}{1e3 * result['seconds']:9.1f}"
                f"{result['seconds'] / first:10.2f}"
                f"{result['passes']:8.0f}{result['equal']:7.2f}"
            )
