"""Exports a trained model to other people's programs.

    python tools/export.py --what=backbone --checkpoint=runs/mine \
        --output=encoder.keras --image_size=384
    python tools/export.py --what=siglip --checkpoint=runs/mine --output=hf
    python tools/export.py --what=timm --checkpoint=runs/mine --output=timm

backbone: the vision encoder as a Keras file, which opens with TensorFlow, JAX
or PyTorch. siglip: a folder for `transformers.SiglipVisionModel`. timm: a
folder for `timm.create_model("local-dir:...")`.
"""

import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app, flags

from cappa_tf.checks import parse_height_width


def define_flags(flag_values=flags.FLAGS):
    """Defines the flags of this tool."""
    where = {"flag_values": flag_values}
    flags.DEFINE_enum(
        "what", None, list(EXPORTS), "What to write.", required=True, **where
    )
    flags.DEFINE_string(
        "checkpoint",
        None,
        "Folder of a run, or a .keras file of a captioner or an encoder.",
        required=True,
        **where,
    )
    flags.DEFINE_enum(
        "weights",
        "auto",
        ["auto", "final", "best", "latest"],
        "Which weights of the run: at its end, best by validation, of the "
        "newest checkpoint, or the first of these that is there.",
        **where,
    )
    flags.DEFINE_string(
        "output", None, "File or folder to write.", required=True, **where
    )
    flags.DEFINE_list(
        "image_size",
        None,
        "Side of the images in pixels, or HEIGHT,WIDTH, if it is not that of "
        "training: learned positions are resampled.",
        **where,
    )


def export(options):
    """Reads a checkpoint and writes what was asked for.

    Args:
        options: The parsed flags.

    Returns:
        What was written, in words.

    Raises:
        ValueError: If flags contradict each other, the checkpoint is none,
            or the wanted form cannot hold the model.
    """
    parse_height_width("image_size", options.image_size)
    return EXPORTS[options.what](options)


def _backbone(options):
    if not options.output.endswith(".keras"):
        raise ValueError(
            f"--output must end in .keras. Received: --output={options.output}"
        )
    # TensorFlow takes seconds to load: --help and wrong flags need not wait.
    from cappa_tf.export import keras_backbone

    encoder = _encoder(options)
    keras_backbone.save_backbone(encoder, options.output)
    return _described(options, "vision encoder for Keras", encoder)


def _siglip(options):
    from cappa_tf.export import torch_vit

    encoder = _encoder(options)
    torch_vit.save_siglip(encoder, options.output)
    return _described(options, "SiglipVisionModel", encoder)


def _timm(options):
    from cappa_tf.export import torch_vit

    encoder = _encoder(options)
    torch_vit.save_timm(encoder, options.output)
    return _described(options, "timm VisionTransformer", encoder)


# What --what names; each writes --output and says what it wrote.
EXPORTS = {"backbone": _backbone, "siglip": _siglip, "timm": _timm}


def _encoder(options):
    """The vision encoder of --checkpoint, at --image_size."""
    from cappa_tf.export import keras_backbone
    from cappa_tf.training import workdir

    model = workdir.load_captioner(options.checkpoint, options.weights)
    encoder = getattr(model, "vision_encoder", model)
    size = parse_height_width("image_size", options.image_size)
    if size is None:
        return encoder
    return keras_backbone.rebuilt(encoder, image_size=size)


def _described(options, kind, encoder):
    height, width = encoder.image_size
    return (
        f"{options.output}: {kind}, {encoder.count_params():,} parameters, "
        f"images of {height} x {width} pixels"
    )


def main(argv):
    """Exports; errors of the input are one line."""
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are understood. Received: {argv[1:]}")
    try:
        print(export(flags.FLAGS))
    except (ValueError, OSError) as error:
        raise SystemExit(f"export: {error}") from None


if __name__ == "__main__":
    define_flags()
    app.run(main)
