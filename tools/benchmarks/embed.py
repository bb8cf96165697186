"""Speed of the vision encoder in inference, against other implementations.

    python tools/benchmark.py embed
    python tools/benchmark.py embed --peers --reference=big_vision \
        --reference_python=venv/bin/python

Pooled features of a batch of images by the same encoder, in turns, each way in
a process of its own. A way is a precision, with "-xla" if it is compiled:

    float32
    bfloat16    dtype policy mixed_bfloat16: weights are kept in float32
    half        dtype policy bfloat16: weights, too
    int8        float32 after `quantize("int8")`

The reference is the authors' encoder in JAX, in float32, with the same weights.
--peers adds a ViT of the same size of Hugging Face's transformers in PyTorch,
in float32 and in bfloat16 (with a class token and random weights). The baseline
is the first of these that is measured: reference, peers' float32, first way.
"""

import contextlib
import tempfile

from absl import flags

from tools import benchmarks
from tools.benchmarks import models, references

WAYS = ("float32", "bfloat16", "half", "int8")
_POLICIES = {"bfloat16": "mixed_bfloat16", "half": "bfloat16"}
# What the reference's captioner has beside the encoder.
_DECODER = {
    "decoder_layers": 1,
    "length": 8,
    "tokens": 4,
    "vocabulary_size": 100,
}


def define_flags():
    """Defines the flags of this benchmark."""
    models.define_flags(batch_size=32, decoder=False)
    models.define_turns()
    models.define_peers("reference", "peers")
    flags.DEFINE_list("ways", list(WAYS), "Ways to measure.")


def make(options):
    """The encoder of one way.

    Args:
        options: Dict of `models.SIZES` and `way`.

    Returns:
        (function that embeds a batch, dict of the type of its `products`).
    """
    import tensorflow as tf

    precision, *xla = options["way"].split("-")
    policy = _POLICIES.get(precision, "float32")
    encoder = models.make_scorer(options, policy).vision_encoder
    if precision == "half":
        # By itself it would start from other random numbers.
        exact = models.make_scorer(options).vision_encoder
        encoder.set_weights(exact.get_weights())
        del exact
    images = tf.constant(models.make_images(options))
    if precision == "int8":
        encoder.quantize("int8")
    # Weights are read in each call, as by `Predictor.features`.
    embed = tf.function(
        lambda images: tf.cast(
            encoder(images, training=False)["pre_logits"], tf.float32
        ),
        autograph=False,
        jit_compile=bool(xla),
    )
    products = "bfloat16" if precision in _POLICIES else "float32"
    return lambda: embed(images).numpy(), {"products": products}


def run():
    """Returns rows of all ways, and how far their features are apart."""
    values = flags.FLAGS
    options = {**models.given(), **_DECODER}
    known = [f"{way}{xla}" for way in WAYS for xla in ("", "-xla")]
    models.check_ways(values.ways, known)
    reference, peers = references.check(), models.check_peers()
    contenders, baseline = {}, values.ways[0]
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())

        def enter(name, contender):
            stack.callback(contender.close)
            contenders[name] = contender

        for way in values.ways:
            enter(way, benchmarks.own("embed", {**options, "way": way}))
        captioner = models.make_scorer(options)
        if peers:
            sizes = {**options, **models.encoder_sizes(options)}
            for dtype in ("float32", "bfloat16"):
                asked = {**sizes, "benchmark": "embed", "dtype": dtype}
                enter(f"peers {dtype}", benchmarks.Process("peers", asked))
            baseline = "peers float32"
        if reference:
            enter(
                references.NAME,
                references.start(
                    "embed", options, reference, folder, captioner
                ),
            )
            baseline = references.NAME
        flops = _flops(captioner.vision_encoder, options)
        for contender in contenders.values():
            contender.facts["flops"] = flops
        own = [*values.ways, references.NAME]
        contenders |= benchmarks.matmuls(values.matmul)
        found = benchmarks.compete(
            contenders, values.rounds, values.steps, folder
        )
        exact = references.NAME if reference else values.ways[0]
        rows = benchmarks.speeds(
            found, contenders, baseline, options["batch_size"]
        )
        return rows + benchmarks.differences(folder, own, exact)


def _flops(encoder, options):
    """FLOPs of the encoder for a batch, counted on one image."""
    from cappa_tf.training import flops

    image = models.make_images({**options, "batch_size": 1})
    one = flops.count(lambda: encoder(image, training=False))
    return options["batch_size"] * one
