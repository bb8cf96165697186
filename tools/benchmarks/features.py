"""Speed of training on the cached features of a frozen vision encoder.

    python tools/benchmark.py features --data=data/flickr8k
    python tools/benchmark.py features --data=data/flickr8k --model=decoder \
        --variant=B/16 --layers=12 --image_size=224 --decoder_width=192

A text tower against a frozen image tower (LiT, the default), or a decoder on
frozen patches (gin/transfer/decoder.gin). Steps of the same model on the same
captions, in turns:

    images    each batch is decoded and encoded by the frozen tower
    cached    features are read from a `FeatureCache`, which is computed first
"""

import tempfile
import time

from absl import flags

from tools import benchmarks

WAYS = ("images", "cached")
# Features that each model trains on.
KINDS = {"lit": "pre_logits", "decoder": "encoded"}


def define_flags():
    """Defines the flags of this benchmark."""
    count = {"lower_bound": 1}
    flags.DEFINE_string(
        "data", None, "Prepared data set with a vocabulary.", required=True
    )
    flags.DEFINE_string("split", "train", "Its split.")
    flags.DEFINE_enum("model", "lit", [*KINDS], "What is trained.")
    flags.DEFINE_string("variant", "Ti/16", "Width of both parts.")
    flags.DEFINE_integer(
        "layers", 4, "Blocks of the encoder, and of the text tower.", **count
    )
    flags.DEFINE_integer("decoder_layers", 2, "Blocks of the decoder.", **count)
    flags.DEFINE_integer(
        "decoder_width", None, "Its width; by default the encoder's.", **count
    )
    flags.DEFINE_integer("image_size", 112, "Side of the images.", **count)
    flags.DEFINE_integer("length", 24, "Tokens of a caption.", **count)
    flags.DEFINE_integer("batch_size", 32, "Pairs of a batch.", **count)
    flags.DEFINE_integer("steps", 20, "Steps of one timing.", **count)
    flags.DEFINE_integer("rounds", 3, "Timings of each way, in turns.", **count)


def make_streams(data, encoder, folder, kind="pre_logits"):
    """The data set with images and with features of a new cache.

    Args:
        data: `CaptionDataset`.
        encoder: Built `VisionEncoder`.
        folder: Folder of the cache.
        kind: Output of the encoder.

    Returns:
        (dict way -> `CaptionDataset`, seconds that the cache took).
    """
    from cappa_tf.inference.feature_cache import FeatureCache

    start = time.perf_counter()
    cache = FeatureCache.open_or_compute(encoder, data, kind, folder=folder)
    seconds = time.perf_counter() - start
    return {"images": data, "cached": data.with_features(cache)}, seconds


def make_steps(model, data, batch_size):
    """A function that makes some training steps on a data set.

    Args:
        model: Built task with a frozen vision encoder.
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


def make_model(given, tokenizer):
    """The model that the flags describe, its encoder frozen.

    Args:
        given: The flags.
        tokenizer: `Tokenizer` of its texts.

    Returns:
        A built task.
    """
    from cappa_tf.models.captioner import Captioner
    from cappa_tf.models.contrastive import Contrastive
    from cappa_tf.models.sizes import variant
    from cappa_tf.models.text_decoder import TextDecoder
    from cappa_tf.models.text_encoder import TextEncoder
    from cappa_tf.models.vision_encoder import VisionEncoder

    sizes = {**variant(given.variant), "num_layers": given.layers}
    patch_size = sizes.pop("patch_size")
    encoder = VisionEncoder(
        patch_size=patch_size, image_size=given.image_size, **sizes
    )
    words = (tokenizer.vocabulary_size, given.length)
    if given.model == "decoder":
        width = given.decoder_width or sizes["hidden_dim"]
        decoder = TextDecoder(
            *words,
            hidden_dim=width,
            num_layers=given.decoder_layers,
            num_heads=max(1, width // 64),
            mlp_dim=4 * width,
        )
        model = Captioner(encoder, decoder, masked_pred_prob=0.0)
    else:
        model = Contrastive(
            encoder,
            TextEncoder(*words, **sizes),
            embedding_dim=(None, sizes["hidden_dim"]),
        )
    model.build()
    model.freeze(["vision_encoder"])
    return model


def run():
    """Returns rows of both ways, and of computing the cache."""
    from cappa_tf.data.caption_dataset import CaptionDataset
    from cappa_tf.data.tokenizer import Tokenizer

    given = flags.FLAGS
    tokenizer = Tokenizer(given.data, given.length)
    data = CaptionDataset(given.data, given.split, tokenizer, given.image_size)
    model = make_model(given, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        streams, seconds = make_streams(
            data, model.vision_encoder, folder, KINDS[given.model]
        )
        once = benchmarks.Row(
            "computing the cache, once", data.num_examples / seconds, "images/s"
        )
        steps = {
            way: make_steps(model, stream, given.batch_size)
            for way, stream in streams.items()
        }
        contenders = {
            way: benchmarks.Here(lambda way=way: _run(steps[way], given.steps))
            for way in WAYS
        }
        found = benchmarks.compete(contenders, given.rounds)
    items = given.steps * given.batch_size
    return [once, *benchmarks.speeds(found, contenders, WAYS[0], items)]


def _run(step, count):
    step(count)
