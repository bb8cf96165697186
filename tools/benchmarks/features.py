"""Speed of training a text tower against a frozen image tower (LiT).

    python tools/benchmark.py features --data=data/flickr8k

Steps of the same model on the same captions, in turns:

    images    each batch is decoded and encoded by the frozen tower
    cached    features are read from a `FeatureCache`, which is computed first
"""

import tempfile
import time

from absl import flags

from tools import benchmarks

WAYS = ("images", "cached")


def define_flags():
    """Defines the flags of this benchmark."""
    count = {"lower_bound": 1}
    flags.DEFINE_string(
        "data", None, "Prepared data set with a vocabulary.", required=True
    )
    flags.DEFINE_string("split", "train", "Its split.")
    flags.DEFINE_string("variant", "Ti/16", "Width of both towers.")
    flags.DEFINE_integer("layers", 4, "Blocks of both towers.", **count)
    flags.DEFINE_integer("image_size", 112, "Side of the images.", **count)
    flags.DEFINE_integer("length", 24, "Tokens of a caption.", **count)
    flags.DEFINE_integer("batch_size", 32, "Pairs of a batch.", **count)
    flags.DEFINE_integer("steps", 20, "Steps of one timing.", **count)
    flags.DEFINE_integer("rounds", 3, "Timings of each way, in turns.", **count)


def make_streams(data, encoder, folder):
    """The data set with images and with features of a new cache.

    Args:
        data: `CaptionDataset`.
        encoder: Built `VisionEncoder`.
        folder: Folder of the cache.

    Returns:
        (dict way -> `CaptionDataset`, seconds that the cache took).
    """
    from cappa_tf.inference.feature_cache import FeatureCache

    start = time.perf_counter()
    cache = FeatureCache.open_or_compute(encoder, data, folder=folder)
    seconds = time.perf_counter() - start
    return {"images": data, "cached": data.with_features(cache)}, seconds


def make_steps(model, data, batch_size):
    """A function that makes some training steps on a data set.

    Args:
        model: Built `Contrastive` with a frozen image tower.
        data: `CaptionDataset`.
        batch_size: Pairs of a batch.

    Returns:
        Function of a number of steps that makes them.
    """
    import tensorflow as tf

    from cappa_tf.training.distribution.strategies import make_strategy
    from cappa_tf.training.optimizers.adafactor import Adafactor
    from cappa_tf.training.step import TrainLoop

    optimizer = Adafactor(1e-4)
    optimizer.build(model.trainable_variables)
    loop = TrainLoop(
        make_strategy("one"),
        model,
        optimizer,
        batch_size,
        jit_compile=bool(tf.config.list_physical_devices("GPU")),
    )
    iterator = iter(data.train(batch_size))

    return lambda count: loop(iterator, count)


def run():
    """Prints images a second of both ways, and their ratio."""
    from cappa_tf.data.caption_dataset import CaptionDataset
    from cappa_tf.data.tokenizer import Tokenizer
    from cappa_tf.models.contrastive import Contrastive
    from cappa_tf.models.sizes import variant
    from cappa_tf.models.text_encoder import TextEncoder
    from cappa_tf.models.vision_encoder import VisionEncoder

    given = flags.FLAGS
    tokenizer = Tokenizer(given.data, given.length)
    data = CaptionDataset(given.data, given.split, tokenizer, given.image_size)
    sizes = {**variant(given.variant), "num_layers": given.layers}
    patch_size = sizes.pop("patch_size")
    model = Contrastive(
        VisionEncoder(
            patch_size=patch_size, image_size=given.image_size, **sizes
        ),
        TextEncoder(tokenizer.vocabulary_size, given.length, **sizes),
        embedding_dim=(None, sizes["hidden_dim"]),
    )
    model.build()
    model.freeze(["vision_encoder"])
    with tempfile.TemporaryDirectory() as folder:
        streams, seconds = make_streams(data, model.vision_encoder, folder)
        print(
            f"cache: {data.num_examples:,} images in {seconds:.0f} s "
            f"({data.num_examples / seconds:,.0f} images/s), once"
        )
        steps = {
            way: make_steps(model, stream, given.batch_size)
            for way, stream in streams.items()
        }
        for way in WAYS:
            steps[way](given.steps)  # Traces, and fills buffers.

        def measure(way):
            start = time.perf_counter()
            steps[way](given.steps)
            seconds = time.perf_counter() - start
            return {"speed": given.steps * given.batch_size / seconds}

        found = benchmarks.in_turns(WAYS, given.rounds, measure)
    for way, result in found.items():
        print(f"{way:8} {result['speed']:8,.1f} images/s")
    ratio = found["cached"]["speed"] / found["images"]["speed"]
    print(f"cached / images: {ratio:.2f}")
