"""Models with random weights, inputs of the same sizes, and their flags."""

from absl import flags

from cappa_tf.utils import arguments

# Options that decide the shapes of model and inputs, as JSON can hold them.
SIZES = (
    "variant encoder_layers image_size decoder_layers length tokens "
    "vocabulary_size batch_size"
).split()


def define_flags(batch_size=8, decoder=True, tokens=12):
    """Defines the flags of `SIZES`.

    Args:
        batch_size: Default of that flag.
        decoder: Whether there is a decoder.
        tokens: Default of that flag; None for no such flag.
    """
    count = {"lower_bound": 1}
    flags.DEFINE_string("variant", "S/16", "Size of the encoder.")
    flags.DEFINE_integer(
        "encoder_layers", None, "Its blocks; the variant's by default.", **count
    )
    flags.DEFINE_integer("image_size", 224, "Side of the images.", **count)
    flags.DEFINE_integer("batch_size", batch_size, "Images a batch.", **count)
    if decoder:
        flags.DEFINE_integer(
            "decoder_layers", 6, "Blocks of the decoder.", **count
        )
        flags.DEFINE_integer("length", 64, "Its positions.", **count)
        flags.DEFINE_integer("vocabulary_size", 32_000, "Token ids.", **count)
    if decoder and tokens:
        flags.DEFINE_integer("tokens", tokens, "Tokens of a caption.", **count)


def define_turns(rounds=5, steps=3):
    """Defines the flags of measurements in turns."""
    count = {"lower_bound": 1}
    flags.DEFINE_integer("rounds", rounds, "Turns.", **count)
    flags.DEFINE_integer("steps", steps, "Runs of each in a turn.", **count)
    flags.DEFINE_integer(
        "matmul", 2048, "Side of the matrices whose product is the peak."
    )


def define_peers(*kinds):
    """Defines the flags of other implementations to compare with.

    Args:
        *kinds: "reference", "peers" or both.
    """
    if "reference" in kinds:
        flags.DEFINE_string(
            "reference",
            None,
            "Checkout of google-research/big_vision: also measures the "
            "authors' implementation.",
        )
        flags.DEFINE_string(
            "reference_python",
            None,
            "Interpreter of an environment with jax, flax, optax, einops and "
            "ml_collections, for --reference.",
        )
    if "peers" in kinds:
        flags.DEFINE_bool(
            "peers",
            False,
            "Also measures Hugging Face's transformers in PyTorch.",
        )
    flags.DEFINE_bool(
        "one_process",
        False,
        "Measures this project's ways in one process: starts faster, and "
        "leaves out peak memory.",
    )


def given():
    """Dict of those of `SIZES` that are flags of this benchmark.

    Raises:
        ValueError: If --tokens does not fit in --length.
    """
    values = {
        name: flags.FLAGS[name].value for name in SIZES if name in flags.FLAGS
    }
    if values.get("tokens", 0) > values.get("length", 0):
        raise ValueError(
            "--tokens must be at most --length. Received: "
            f"--tokens={values['tokens']}, --length={values['length']}"
        )
    return values


def check_ways(names, known):
    """Checks the values of --ways; returns them.

    Raises:
        ValueError: If one is unknown or given twice.
    """
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(
            f"--ways must be among {', '.join(known)}, each once. "
            f"Received: --ways={','.join(names)}"
        )
    return names


def check_peers():
    """Returns --peers.

    Raises:
        ImportError: If the packages that it needs are missing.
    """
    if flags.FLAGS.peers:
        arguments.check_extra("--peers", "interop", "torch", "transformers")
    return flags.FLAGS.peers


def encoder_sizes(options):
    """Arguments of `VisionEncoder` by the variant, as a dict of integers."""
    from cappa_tf.models import sizes

    chosen = sizes.variant(options["variant"])
    layers = options.get("encoder_layers") or chosen["num_layers"]
    return {**chosen, "num_layers": layers}


def make_captioner(options, remat=False):
    """A captioner with random weights.

    Args:
        options: Dict of `SIZES`; without `decoder_layers` the decoder has half
            as many blocks as the encoder.
        remat: Whether training recomputes activations.
    """
    from cappa_tf.models import captioner, text_decoder, vision_encoder

    chosen = encoder_sizes(options)
    encoder = vision_encoder.VisionEncoder(
        **chosen, image_size=options["image_size"], remat=remat
    )
    shared = ("hidden_dim", "num_heads", "mlp_dim")
    layers = options.get("decoder_layers") or max(1, encoder.num_layers // 2)
    decoder = text_decoder.TextDecoder(
        options["vocabulary_size"],
        options["length"],
        num_layers=layers,
        remat=remat,
        **{name: chosen[name] for name in shared},
    )
    return captioner.Captioner(encoder, decoder)


def define_precision(note=""):
    """Defines --precision of the model that `make_scorer` makes."""
    flags.DEFINE_enum(
        "precision",
        "float32",
        ["float32", "mixed_bfloat16", "bfloat16"],
        f"Dtype policy of the model{note}.",
    )


def make_scorer(options, precision="float32"):
    """A built captioner whose head is random, too, and not zero."""
    import keras

    from cappa_tf.training import construct

    keras.utils.set_random_seed(0)
    with construct.dtype_policy(precision):
        captioner = make_captioner(options)
        captioner.build()
    kernel = captioner.text_decoder.head_weights[0]
    kernel.assign(keras.random.normal(kernel.shape, stddev=0.05, seed=1))
    return captioner


def make_images(options):
    """Images float32 [B, H, W, 3] in [-1, 1], the same for all contenders."""
    import numpy as np

    side = options["image_size"]
    shape = (options["batch_size"], side, side, 3)
    images = np.random.default_rng(0).random(shape, np.float32)
    return images * 2.0 - 1.0


def make_labels(options):
    """Captions int32 [B, L]: random tokens, eos (1), padding (0)."""
    import numpy as np

    count, tokens = options["batch_size"], options.get("tokens", 1)
    labels = np.zeros((count, options["length"]), np.int32)
    random = np.random.default_rng(1)
    labels[:, :tokens] = random.integers(
        2, options["vocabulary_size"], (count, tokens)
    )
    labels[:, tokens - 1] = 1
    return labels
