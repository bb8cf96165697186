"""Exports a trained model to Keras, PyTorch or TensorFlow Serving.

    python tools/export.py --what=backbone --checkpoint=runs/mine \
        --output=encoder.keras --image_size=384
    python tools/export.py --what=siglip --checkpoint=runs/mine --output=hf
    python tools/export.py --what=timm --checkpoint=runs/mine --output=timm
    python tools/export.py --what=preset --checkpoint=runs/mine \
        --output=preset --license=apache-2.0 --dtype=float16
    python tools/export.py --what=saved_model --checkpoint=runs/mine \
        --output=models/captioner

Values of --what:
    backbone     the vision encoder as a Keras file, which opens with
                 TensorFlow, JAX or PyTorch
    siglip       a folder for transformers: a `SiglipModel` of a contrastive
                 model in SigLIP's form, otherwise a `SiglipVisionModel`
    timm         a folder for `timm.create_model("local-dir:...")`
    preset       the whole model as a folder to pass on, which
                 `cappa_tf.from_preset` opens, with a model card
    saved_model  the model for TensorFlow Serving, in a new VERSION below
                 the folder, with configuration files for a server beside it
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app, flags

from cappa_tf.utils import console, files
from cappa_tf.utils.arguments import parse_height_width


def define_flags(flag_values=flags.FLAGS):
    """Defines the flags of this tool."""
    where = {"flag_values": flag_values}
    flags.DEFINE_enum(
        "what", None, list(EXPORTS), "Format.", required=True, **where
    )
    flags.DEFINE_string(
        "checkpoint",
        None,
        "Folder of a run, a preset, a .keras file of a model or an encoder, an "
        "npz of big_vision, or a folder of transformers' SigLIP.",
        required=True,
        **where,
    )
    flags.DEFINE_enum(
        "weights",
        "auto",
        ["auto", "final", "best", "latest"],
        "Weights of the run: at its end, best by validation, those of the "
        "newest checkpoint, or the first of these that exists.",
        **where,
    )
    flags.DEFINE_string(
        "output", None, "File or folder to write.", required=True, **where
    )
    flags.DEFINE_enum(
        "precision",
        None,
        ["float32", "bfloat16", "int8"],
        "backbone: how the encoder keeps its weights and computes; float32 by "
        "default. bfloat16 halves the file, int8 quarters it; how far features "
        "are from those in float32 is printed.",
        **where,
    )
    flags.DEFINE_list(
        "image_size",
        None,
        "Side of the images in pixels, or HEIGHT,WIDTH, if it differs from "
        "that of training; resamples learned positions. Not for saved_model "
        "and preset.",
        **where,
    )
    flags.DEFINE_string(
        "license",
        None,
        "preset: identifier of the licence in the model card, such as "
        "apache-2.0; 'unknown' by default.",
        **where,
    )
    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "float16"],
        "preset: type of the stored weights; float16 halves the files and "
        "rounds each weight to 11 bits. float32 by default.",
        **where,
    )
    _define_serving_flags(where)


def _define_serving_flags(where):
    """Defines the flags of saved_model; None is the function's default."""
    flags.DEFINE_string(
        "name", None, "saved_model: name of the model on the server.", **where
    )
    numbers = {
        "version": "number of the version; one more than the highest",
        "max_length": "maximum tokens of a caption; the decoder's",
        "max_batch_size": "maximum images per request; 32",
        "max_texts": "maximum texts or labels per image; 1,000",
        "max_pixels": "maximum pixels of an image; the limit of the run",
    }
    for name, meaning in numbers.items():
        flags.DEFINE_integer(
            name, None, f"saved_model: {meaning} by default.", 1, **where
        )


def export(options):
    """Reads a checkpoint and writes it in the chosen format.

    Args:
        options: The parsed flags.

    Returns:
        Description of the output, for printing.

    Raises:
        ValueError: If flags contradict each other, the checkpoint cannot be
            opened, or the format cannot represent the model.
    """
    parse_height_width("image_size", options.image_size)
    if options.what != "saved_model":
        _refuse(options, SERVING_FLAGS)
    if options.what != "preset":
        _refuse(options, PRESET_FLAGS)
    if options.what != "backbone":
        _refuse(options, ["precision"])
    return EXPORTS[options.what](options)


def _backbone(options):
    if not options.output.endswith(".keras"):
        raise ValueError(
            f"--output must end in .keras. Received: --output={options.output}"
        )
    # TensorFlow takes seconds to load, and is needed only with valid flags.
    from cappa_tf.export import keras_backbone

    files.check_output("output", options.output)
    encoder = _encoder(options)
    precision = options.precision or "float32"
    keras_backbone.save_backbone(encoder, options.output, precision)
    said = _described(options, "vision encoder for Keras", encoder)
    if precision == "float32":
        return said
    mean, least = keras_backbone.agreement(
        encoder,
        keras_backbone.load_backbone(options.output),
        _rendered(_RENDERED, encoder.image_size),
    )
    return (
        f"{said}, in {precision}: cosine of features to those before, of "
        f"{_RENDERED} rendered scenes, {mean:.5f} on average, {least:.5f} at "
        "least"
    )


# Images on which a precision is compared.
_RENDERED = 32


def _rendered(count, size):
    """Images float32 [count, H, W, 3] in [-1, 1] of rendered scenes."""
    import tensorflow as tf

    from cappa_tf.data.scenes import world

    images = [
        tf.io.decode_image(example.image, channels=3)
        for example in world.examples("heldout", count, min(size))
    ]
    images = tf.cast(tf.stack(images), tf.float32) / 127.5 - 1.0
    return tf.image.resize(images, size)


def _siglip(options):
    """A `Contrastive` as a SiglipModel, else the vision encoder alone."""
    from cappa_tf.export import siglip
    from cappa_tf.saving import torch_layout

    torch_layout.check_installed()
    files.check_output("output", options.output, is_folder=True)
    from cappa_tf.inference.predictor import FEATURES
    from cappa_tf.models.contrastive import Contrastive

    predictor = _opened(options, FEATURES)
    if not isinstance(predictor.model, Contrastive):
        encoder = _resized(options, predictor.encoder)
        siglip.save_siglip_vision(encoder, options.output, _facts(options))
        return _described(options, "SiglipVisionModel", encoder)
    if options.image_size is not None:
        raise ValueError(
            "--image_size is for a vision encoder alone: a model of two towers "
            "is written at its own size. "
            f"Received: --image_size={','.join(options.image_size)}"
        )
    siglip.save_siglip(
        predictor.model, options.output, predictor.tokenizer, _facts(options)
    )
    vocabulary = "with" if predictor.tokenizer is not None else "without"
    said = _described(options, "SiglipModel", predictor.model)
    return f"{said}, {vocabulary} vocabulary"


def _timm(options):
    from cappa_tf.export import timm
    from cappa_tf.saving import torch_layout

    torch_layout.check_installed()
    files.check_output("output", options.output, is_folder=True)
    encoder = _encoder(options)
    timm.save_timm(encoder, options.output, _facts(options))
    return _described(options, "timm VisionTransformer", encoder)


def _preset(options):
    _refuse(options, ["image_size"])
    from cappa_tf import presets
    from cappa_tf.inference.predictor import FEATURES

    files.check_output("output", options.output, is_folder=True)
    predictor = _opened(options, FEATURES)
    given = {name: options[name].value for name in PRESET_FLAGS}
    presets.save_preset(
        predictor,
        options.output,
        facts=_facts(options),
        **{name: x for name, x in given.items() if x is not None},
    )
    kind = f"preset of a {type(predictor.model).__name__}"
    return _described(options, kind, predictor.model)


def _facts(options):
    """Facts of the training of --checkpoint, for the model card."""
    from cappa_tf.saving import preset_folder, run_folder

    return run_folder.training_facts(preset_folder.locate(options.checkpoint))


def _saved_model(options):
    _refuse(options, ["image_size"])
    from cappa_tf.export import saved_model, serving_files
    from cappa_tf.inference.predictor import SCORE

    serving_files.check_protos()
    files.check_output("output", options.output, is_folder=True)

    def given(*names):
        values = {name: options[name].value for name in names}
        return {k: v for k, v in values.items() if v is not None}

    predictor = _opened(options, SCORE)
    make = saved_model.service_class(predictor.model)
    is_captioner = make is not saved_model.ContrastiveService
    if options.max_length is not None and not is_captioner:
        raise ValueError(
            "--max_length is for captioners. "
            f"Received: --max_length={options.max_length}"
        )
    service = make(
        predictor.model,
        predictor.tokenizer,
        predictor.preprocessing,
        **given("max_length", "max_batch_size", "max_texts", "max_pixels"),
    )
    path = saved_model.export_saved_model(
        options.output, service, **given("name", "version")
    )
    height, width = service.image_size
    return (
        f"{path}: {service.kind} for TensorFlow Serving, "
        f"{service.num_bytes / 2**20:.0f} MiB of weights, images of "
        f"{height} x {width} pixels"
    )


# Values of --what; each function writes --output and returns its description.
EXPORTS = {
    "backbone": _backbone,
    "siglip": _siglip,
    "timm": _timm,
    "preset": _preset,
    "saved_model": _saved_model,
}
PRESET_FLAGS = ("license", "dtype")
SERVING_FLAGS = (
    "name version max_length max_batch_size max_texts max_pixels"
).split()


def _refuse(options, names):
    """Raises ValueError if one of these flags was given."""
    for name in names:
        if options[name].value is not None:
            raise ValueError(
                f"--{name} does not go with --what={options.what}. "
                f"Received: --{name}={options[name].value}"
            )


def _opened(options, capability):
    """The `Predictor` of --checkpoint, which must have a capability."""
    from cappa_tf.inference.predictor import Predictor

    with console.naming("checkpoint", options.checkpoint):
        predictor = Predictor.open(options.checkpoint, options.weights)
        predictor.require(f"--what={options.what}", capability)
    return predictor


def _encoder(options):
    """The vision encoder of --checkpoint, at --image_size."""
    from cappa_tf.inference.predictor import FEATURES

    return _resized(options, _opened(options, FEATURES).encoder)


def _resized(options, encoder):
    from cappa_tf.export import keras_backbone

    size = parse_height_width("image_size", options.image_size)
    if size is None:
        return encoder
    return keras_backbone.rebuilt(encoder, image_size=size)


def _described(options, kind, model):
    height, width = getattr(model, "vision_encoder", model).image_size
    return (
        f"{options.output}: {kind}, {model.count_params():,} parameters, "
        f"images of {height} x {width} pixels"
    )


def main(argv):
    """Exports a model; input errors are printed as one line."""
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are understood. Received: {argv[1:]}")
    with console.errors_as_lines("export"):
        print(export(flags.FLAGS))


if __name__ == "__main__":
    console.run(main, define_flags)
