"""Converts weights from and to big_vision, the paper's JAX implementation.

Also from clip-jax, which trained the only public captioner of this kind.

    python tools/convert.py --from=big_vision --input=cappa.npz \
        --output=captioner.keras
    python tools/convert.py --to=big_vision --input=captioner.keras \
        --output=cappa.npz
    python tools/convert.py --from=big_vision --input=siglip.npz \
        --output=encoder.keras --image_size=384
    python tools/convert.py --from=clip_jax --output=captioner.keras \
        --input=cappa-large-patch16-256-jax

An npz of a captioner becomes a captioner, one of two towers (`img/...` and
`txt/...`: CLIP, LiT, SigLIP) a contrastive model, one of a ViT a vision
encoder. --to=big_vision also takes the folder of a run, and a preset.
--from=clip_jax takes a folder with config.json and a checkpoint; if that has a
tokenizer.json, it and a preprocessing.json are written beside --output, so that
the other tools read and write texts with it.
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app, flags

from cappa_tf.utils import console, files
from cappa_tf.utils.arguments import parse_height_width

# Files beside a captioner that tell how its inputs are made.
_TOKENIZER, _PREPROCESSING = "tokenizer.json", "preprocessing.json"
# What only the arrays of two towers are read with.
TEXT_TOWER_FLAGS = ("text_pooling", "pad_with_eos")


def define_flags(flag_values=flags.FLAGS):
    """Defines the flags of this tool."""
    where = {"flag_values": flag_values}
    kinds = ["keras", "big_vision"]
    flags.DEFINE_enum(
        "from",
        "keras",
        [*kinds, "clip_jax"],
        "Format of --input.",
        **where,
    )
    flags.DEFINE_enum("to", "keras", kinds, "Format of --output.", **where)
    flags.DEFINE_string(
        "input", None, "File or folder to read.", required=True, **where
    )
    flags.DEFINE_string(
        "output", None, "File to write.", required=True, **where
    )
    flags.DEFINE_list(
        "image_size",
        None,
        "Side of the images in pixels, or HEIGHT,WIDTH. Needed if the arrays "
        "do not tell it (sincos2d positions, grids that are not square); "
        "resamples learned positions. Only with --from=big_vision or clip_jax.",
        **where,
    )
    flags.DEFINE_integer(
        "max_length",
        None,
        "Maximum length of a text if positions are sincos2d; 64 by default. "
        "Only with --from=big_vision.",
        lower_bound=1,
        **where,
    )
    flags.DEFINE_bool(
        "encoder_only",
        False,
        "Write only the vision encoder of a captioner or contrastive model.",
        **where,
    )
    flags.DEFINE_enum(
        "text_pooling",
        None,
        ["last", "first", "gap", "max"],
        "Pooling of a text tower, which arrays without a MAP head do not tell; "
        "last by default. Only with --from=big_vision.",
        **where,
    )
    flags.DEFINE_bool(
        "pad_with_eos",
        None,
        "Whether texts of a contrastive model are padded with eos; by default "
        "yes, except for SigLIP 2. Only with --from=big_vision.",
        **where,
    )
    flags.DEFINE_bool(
        "scan",
        False,
        "Stack the blocks, as in models with scan=True. Only with "
        "--to=big_vision.",
        **where,
    )


def convert(options):
    """Reads, converts and writes a model.

    Args:
        options: The parsed flags.

    Returns:
        Description of the output, for printing.

    Raises:
        ValueError: If flags contradict each other or the input is not a model.
    """
    _check(options)
    model = _read(options)
    encoder, kept = getattr(model, "vision_encoder", model), ""
    if options.encoder_only:
        model = encoder
    if options.to == "keras":
        with files.replacing(options.output) as unfinished:
            model.save(unfinished)
        kept = _keep_tokenizer(model, options)
    else:
        _write_big_vision(model, options)
    kind = "vision encoder" if model is encoder else "captioner"
    if hasattr(model, "text_encoder"):
        kind = "contrastive model"
    return (
        f"{options.output}: {kind}, {model.count_params():,} parameters, "
        f"images of {encoder.image_size[0]} x {encoder.image_size[1]} pixels"
        + kept
    )


def _keep_tokenizer(model, options):
    """Writes the tokenizer of clip-jax beside the model; says so."""
    if not _has_tokenizer(options):
        return ""
    from cappa_tf.data.huggingface_tokenizer import HuggingFaceTokenizer
    from cappa_tf.data.preprocessing import ImagePreprocessing
    from cappa_tf.saving import run_folder

    decoder = model.text_decoder
    tokenizer = HuggingFaceTokenizer(
        options.input,
        decoder.max_length,
        pad_id=decoder.special_tokens.pad,
        eos_id=decoder.special_tokens.eos,
    )
    preprocessing = ImagePreprocessing(model.vision_encoder.image_size)
    folder = os.path.dirname(options.output) or "."
    with console.naming("input", options.input):
        tokenizer.load()
        run_folder.save_preprocessing(folder, tokenizer, preprocessing)
    return f"; beside it {_TOKENIZER} and {_PREPROCESSING}"


def _has_tokenizer(options):
    path = os.path.join(options.input, _TOKENIZER)
    is_captioner = options["from"].value == "clip_jax" and (
        not options.encoder_only
    )
    return is_captioner and files.isfile(path)


def _check(options):
    source = options["from"].value
    if (source == "keras") == (options.to == "keras"):
        raise ValueError(
            "One of --from and --to must be keras, the other another format. "
            f"Received: --from={source} --to={options.to}"
        )
    to_keras = options.to == "keras"
    if source == "clip_jax":
        _refuse(
            options, ["max_length", *TEXT_TOWER_FLAGS], "files of big_vision"
        )
    if to_keras and options.scan:
        raise ValueError("--scan is for --to=big_vision. Received: --scan")
    for name in ("image_size", "max_length", *TEXT_TOWER_FLAGS):
        if not to_keras and options[name].value is not None:
            raise ValueError(
                f"--{name} is for --to=keras. "
                f"Received: --{name}={options[name].value}"
            )
    parse_height_width("image_size", options.image_size)
    files.check_output("output", options.output)
    described = os.path.join(os.path.dirname(options.output), _PREPROCESSING)
    if _has_tokenizer(options) and files.exists(described):
        raise ValueError(
            f"--output needs a folder without a {_PREPROCESSING}, as it would "
            f"be replaced. Received: --output={options.output}"
        )
    suffix = ".keras" if to_keras else ".npz"
    if not options.output.endswith(suffix):
        raise ValueError(
            f"--output must end in {suffix}. "
            f"Received: --output={options.output}"
        )


def _read(options):
    # TensorFlow takes seconds to load, and is needed only with valid flags.
    from cappa_tf.saving import preset_folder, run_folder

    with console.naming("input", options.input):
        if options.to == "big_vision":
            path = preset_folder.locate(options.input)
            return run_folder.load_model(path)
        if options["from"].value == "clip_jax":
            from cappa_tf.saving import clip_jax

            size = parse_height_width("image_size", options.image_size)
            return clip_jax.load_captioner(options.input, image_size=size)
        return _read_big_vision(options)


def _read_big_vision(options):
    from cappa_tf.saving import big_vision

    arrays = big_vision.read_arrays(options.input)
    size = parse_height_width("image_size", options.image_size)
    whole = not options.encoder_only
    if big_vision.is_two_towers(arrays) and whole:
        _refuse(options, ["max_length"], "captioners")
        given = {name: options[name].value for name in TEXT_TOWER_FLAGS}
        return big_vision.load_two_towers(arrays, size, **given)
    _refuse(options, TEXT_TOWER_FLAGS, "contrastive models")
    if big_vision.is_captioner(arrays) and whole:
        return big_vision.load_captioner(
            arrays, size, max_length=options.max_length
        )
    _refuse(options, ["max_length"], "captioners")
    return big_vision.load_vision_encoder(arrays, size)


def _refuse(options, names, owners):
    """Raises ValueError if one of these flags was given."""
    for name in names:
        if options[name].value is not None:
            raise ValueError(
                f"--{name} is for {owners}. "
                f"Received: --{name}={options[name].value}"
            )


def _write_big_vision(model, options):
    from cappa_tf.saving import big_vision

    captions = hasattr(model, "text_decoder")
    save = big_vision.save_vision_encoder
    if hasattr(model, "text_encoder"):
        if captions:
            raise ValueError(
                "A file of big_vision holds a captioner or two towers. Use "
                "--encoder_only, or save_captioner and save_two_towers of "
                "cappa_tf.export.big_vision. "
                f"Received: --input={options.input}, which holds both"
            )
        save = big_vision.save_two_towers
    elif captions:
        save = big_vision.save_captioner
    save(model, options.output, scan=options.scan)


def main(argv):
    """Converts a model; input errors are printed as one line."""
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are understood. Received: {argv[1:]}")
    with console.errors_as_lines("convert"):
        print(convert(flags.FLAGS))


if __name__ == "__main__":
    console.run(main, define_flags)
