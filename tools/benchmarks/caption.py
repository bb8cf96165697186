"""Time of different ways to caption images.

    python tools/benchmark.py caption
    python tools/benchmark.py caption --batch_size=1 --peers
    python tools/benchmark.py caption --checkpoint=runs/quickstart

Captions of a batch of images, in turns:

    encode      the encoder alone, which all others need, too: the baseline
    greedy      greedily, with cached keys and values
    uncached    greedily, with the decoder run over all positions at every step
    draft       greedily, with a parallel draft that one pass checks
    beams       four beams

Without --checkpoint the weights are random, and captions have --tokens tokens
each; a trained model ends them itself. A draft from random weights is wrong, so
its time is the longest possible. Images are synthetic scenes. --peers adds an
encoder and decoder of the same sizes of Hugging Face's transformers in PyTorch,
greedily with cached keys and values, in float32 and bfloat16.
"""

import contextlib

from absl import flags

from tools import benchmarks
from tools.benchmarks import models

WAYS = ("encode", "greedy", "uncached", "draft", "beams")


def define_flags():
    """Defines the flags of this benchmark."""
    models.define_flags(batch_size=32, tokens=20)
    models.define_turns()
    models.define_peers("peers")
    flags.DEFINE_string("checkpoint", None, "Folder of a run.")
    models.define_precision(" without --checkpoint")
    flags.DEFINE_list("ways", list(WAYS), "Ways to measure.")


def make_images(count, image_size):
    """Images float32 [count, H, W, 3] in [-1, 1] of unseen compositions."""
    import tensorflow as tf

    from cappa_tf.data.scenes import world

    images = [
        tf.io.decode_image(example.image, channels=3)
        for example in world.examples("heldout", count, image_size)
    ]
    return tf.cast(tf.stack(images), tf.float32) / 127.5 - 1.0


def make_ways(captioner, length=None, exact=False):
    """Functions of images, by the name of the way.

    Args:
        captioner: A built `Captioner`.
        length: Tokens of a caption; the decoder's length by default.
        exact: Whether a caption has as many tokens, and ends no earlier.

    Returns:
        Dict way -> compiled function to tokens [B, L] (of "encode": to the
        patches).
    """
    import tensorflow as tf

    from cappa_tf.models import sampling

    decoder = captioner.text_decoder
    length = decoder.max_length if length is None else length
    rules = {"max_length": length, "min_length": length - 1 if exact else 0}
    eos = decoder.special_tokens.eos

    def encode(images):
        return captioner.encode(images)

    def greedy(images):
        return captioner.generate(images, **rules)["tokens"]

    def uncached(images):
        known = decoder.project_memory(captioner.encode(images))
        tokens = tf.zeros([tf.shape(images)[0], length], tf.int32)
        for i in range(length):
            inputs = tf.pad(tokens[:, :-1], [[0, 0], [1, 0]])
            logits = decoder.logits(decoder(inputs, known))[:, i, 1:]
            if i < rules["min_length"]:
                logits -= 1e9 * tf.one_hot(eos - 1, logits.shape[-1])
            best = 1 + tf.argmax(logits, axis=-1, output_type=tf.int32)
            tokens += best[:, None] * tf.one_hot(i, length, dtype=tf.int32)
        ends = tf.cast(tokens == eos, tf.int32)
        return tf.where(tf.cumsum(ends, 1, exclusive=True) > 0, 0, tokens)

    def draft(images):
        search = sampling.GreedySearch(draft=True)
        return captioner.generate(images, sampler=search, **rules)["tokens"]

    def beams(images):
        search = sampling.BeamSearch(4)
        return captioner.generate(images, sampler=search, **rules)["tokens"]

    ways = (encode, greedy, uncached, draft, beams)
    return {way.__name__: tf.function(way, autograph=False) for way in ways}


def equal(ways, images):
    """Fraction of captions that are those of "greedy", by way."""
    import numpy as np

    tokens = {
        name: way(images).numpy()
        for name, way in ways.items()
        if name != "encode"
    }
    return {
        name: float(np.mean(np.all(found == tokens["greedy"], axis=1)))
        for name, found in tokens.items()
    }


def _make_model(options):
    from cappa_tf.saving import run_folder

    if flags.FLAGS.checkpoint:
        return run_folder.load_model(flags.FLAGS.checkpoint)
    return models.make_scorer(options, flags.FLAGS.precision)


def run():
    """Returns rows of all ways, relative to the encoder alone."""
    values = flags.FLAGS
    models.check_ways(values.ways, WAYS)
    if not {"encode", "greedy"} <= {*values.ways}:
        raise ValueError(
            "--ways must have encode and greedy, which the others are compared "
            f"with. Received: --ways={','.join(values.ways)}"
        )
    options, with_peers = models.given(), models.check_peers()
    captioner = _make_model(options)
    trained = values.checkpoint is not None
    ways = make_ways(
        captioner, None if trained else options["tokens"], exact=not trained
    )
    ways = {name: ways[name] for name in values.ways}
    size = captioner.vision_encoder.image_size[0]
    images = make_images(options["batch_size"], size)
    same = equal(ways, images)
    contenders = {
        name: benchmarks.Here(lambda way=way: way(images).numpy())
        for name, way in ways.items()
    }
    with contextlib.ExitStack() as stack:
        if with_peers:
            contenders |= _peers(captioner, options, stack)
        found = benchmarks.compete(contenders, values.rounds, values.steps)
    rows = benchmarks.speeds(found, contenders, "encode", options["batch_size"])
    if with_peers:
        for name in ("greedy", "peers bfloat16"):
            share = benchmarks.ratio(found, "peers float32", name, "wall")
            rate = options["batch_size"] / benchmarks.median(
                found, name, "wall"
            )
            rows.append(
                benchmarks.Row(name, rate, "images/s", "peers float32", share)
            )
    return rows + [
        benchmarks.Row(name, value, "of the captions are those of greedy")
        for name, value in same.items()
        if name != "greedy"
    ]


def _peers(captioner, options, stack):
    """Contenders of PyTorch, with the sizes of the captioner."""
    encoder, decoder = captioner.vision_encoder, captioner.text_decoder
    asked = {
        "benchmark": "caption",
        "batch_size": options["batch_size"],
        "tokens": min(options["tokens"], decoder.max_length),
        "length": decoder.max_length + 1,  # It counts the start, too.
        "vocabulary_size": decoder.vocabulary_size,
        "decoder_layers": decoder.num_layers,
        "image_size": encoder.image_size[0],
        "patch_size": encoder.patch_size[0],
        **{
            name: getattr(encoder, name)
            for name in ("hidden_dim", "num_layers", "num_heads", "mlp_dim")
        },
    }
    contenders = {}
    for dtype in ("float32", "bfloat16"):
        benchmarks.note(f"peers {dtype}: builds")
        peer = benchmarks.Process("peers", {**asked, "dtype": dtype})
        stack.callback(peer.close)
        contenders[f"peers {dtype}"] = peer
    return contenders
