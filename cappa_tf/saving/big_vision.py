"""Conversion of weights from and to big_vision, the paper's JAX code.

    captioner = load_captioner("cappa.npz")
    encoder = load_vision_encoder("siglip.npz", image_size=384)
    towers = load_two_towers("siglip.npz")
    save_captioner(captioner, "copy.npz")

The table in `big_vision_names.py` holds names and shapes. `paired` below is the
one place where arrays are matched with variables, in both directions.

Abbreviations: P patches, D width (the other letters: `big_vision_names.py`).
"""

import os

import numpy as np

from cappa_tf.models.block_style import check_default_style
from cappa_tf.models.captioner import Captioner
from cappa_tf.models.classifier import Classifier
from cappa_tf.models.contrastive import Contrastive
from cappa_tf.models.positions import resample_positions, square_grid
from cappa_tf.models.special_tokens import SpecialTokens
from cappa_tf.models.text_decoder import TextDecoder
from cappa_tf.models.text_encoder import TextEncoder
from cappa_tf.models.vision_encoder import VisionEncoder
from cappa_tf.saving import big_vision_arrays as files
from cappa_tf.saving import big_vision_names as names
from cappa_tf.saving.big_vision_arrays import read_arrays
from cappa_tf.saving.weights import to_numpy, variables_by_path
from cappa_tf.utils.arguments import height_width

# Number of text positions with sincos2d, which leaves no array to tell it: the
# paper's. Fewer positions are a prefix of more.
_DEFAULT_LENGTH = 64

__all__ = [
    "is_captioner",
    "is_two_towers",
    "load_captioner",
    "load_two_towers",
    "load_vision_encoder",
    "read_arrays",
    "save_captioner",
    "save_two_towers",
    "save_vision_encoder",
]

_CAPTIONER_ENCODER = "encoder/"
_IMAGE_TOWER = "img/"
_TEXT_TOWER = "txt/"


def load_captioner(
    path_or_arrays, image_size=None, *, max_length=None, **options
):
    """Builds a captioner from weights of big_vision's CapPa.

    All sizes are read from the arrays, with scanned (stacked) or separate
    blocks.

    Args:
        path_or_arrays: Path of an npz file, or a mapping from name to array,
            names with or without `params/`.
        image_size: Side of the images in pixels, or (height, width). Needed
            if positions are sincos2d or not a square grid. Learned positions
            are resampled if the size differs from that of training.
        max_length: Maximum length of a text; needed only if positions are
            sincos2d and texts are longer than 64.
        **options: Further arguments of `Captioner`, such as
            `masked_pred_prob` (by default 0 without a MASK token).

    Returns:
        A built `Captioner`.

    Raises:
        ValueError: If arrays are missing, extra or misshapen (all of them
            are listed) or do not tell the size of the images.
    """
    source = _described(path_or_arrays)
    arrays = read_arrays(path_or_arrays)
    vision = files.below(arrays, _CAPTIONER_ENCODER)
    text = {
        name: array
        for name, array in arrays.items()
        if not name.startswith(_CAPTIONER_ENCODER)
    }
    # The reference's captioner has no class token, MAP head or classifier.
    structure = names.vision_structure(vision.keys())
    structure.update(pooling="gap", rep=False, head=False)
    vision_rows = names.vision_rows(**structure)
    vision_sizes = names.read_sizes(vision_rows, vision)
    text_rows = names.text_rows(**names.text_structure(text.keys()))
    text_sizes = names.read_sizes(text_rows, text)
    text_sizes["E"] = vision_sizes.get("D")
    expected = names.expected_shapes(
        vision_rows, vision_sizes, _CAPTIONER_ENCODER
    )
    expected.update(names.expected_shapes(text_rows, text_sizes))
    names.check_arrays(expected, arrays, source)
    encoder = _vision_encoder(structure, vision_sizes, vision, image_size)
    decoder = _text_decoder(text, text_sizes, max_length)
    if decoder.special_tokens.mask is None:
        options.setdefault("masked_pred_prob", 0.0)
    captioner = Captioner(encoder, decoder, **options)
    captioner.build()
    load_rows(vision_rows, encoder, vision)
    load_rows(text_rows, decoder, text)
    return captioner


def load_vision_encoder(path_or_arrays, image_size=None):
    """Builds an encoder from weights of a big_vision ViT.

    Reads encoder-only files, the image tower (`img/...`) of a two-tower
    model such as SigLIP, and the encoder of a captioner. If the arrays have a
    class token or a MAP head, it is part of the encoder, and pooling is "tok"
    or "map"; otherwise pooling is "gap".

    Args:
        path_or_arrays: Path of an npz file, or a mapping from name to array,
            names with or without `params/`.
        image_size: Side of the images in pixels, or (height, width). Needed
            if positions are sincos2d or not a square grid. Learned positions
            are resampled if the size differs from that of training.

    Returns:
        A built `VisionEncoder`, or a built `Classifier` of it if the arrays
        have a layer `pre_logits` or a head.

    Raises:
        ValueError: If arrays are missing, extra or misshapen (all of them
            are listed) or do not tell the size of the images.
    """
    source = _described(path_or_arrays)
    arrays = read_arrays(path_or_arrays)
    for prefix in (_IMAGE_TOWER, _CAPTIONER_ENCODER):
        if any(name.startswith(prefix) for name in arrays):
            arrays = files.below(arrays, prefix)
            break
    arrays = files.modernise(arrays, _patches(arrays, image_size))
    structure = names.vision_structure(arrays.keys())
    rows = names.vision_rows(**structure)
    sizes = names.read_sizes(rows, arrays)
    names.check_arrays(names.expected_shapes(rows, sizes), arrays, source)
    model = _vision_encoder(structure, sizes, arrays, image_size)
    if structure["rep"] or structure["head"]:
        model = Classifier(model, sizes.get("K"), sizes.get("R"))
    model.build()
    load_rows(rows, model, arrays)
    return model


def load_two_towers(
    path_or_arrays,
    image_size=None,
    *,
    text_pooling=None,
    pad_with_eos=None,
    **options,
):
    """Builds a contrastive model from weights of big_vision's two towers.

    Reads CLIP, LiT, SigLIP and SigLIP 2 (of fixed resolution): with or
    without output heads and bias, with scanned (stacked) or separate blocks,
    text positions stored once or, as in old files, twice. Image pooling is
    "map" or "tok" if the arrays have a MAP head or a class token, otherwise
    "gap".

    Args:
        path_or_arrays: Path of an npz file, or a mapping from name to array,
            names with or without `params/`.
        image_size: Side of the images in pixels, or (height, width), as in
            `load_vision_encoder`.
        text_pooling: Pooling of the `TextEncoder`, which arrays without a MAP
            head do not tell: "last" by default, "first", "gap" or "max".
        pad_with_eos: Whether padding is read as eos, as in `TextEncoder`. True
            by default, except for Gemma's vocabulary of 256,000 pieces, which
            SigLIP 2 pads with 0.
        **options: Further arguments of `Contrastive`. `loss` is by default
            "sigmoid" if the arrays have a bias `b`, otherwise "softmax".

    Returns:
        A built `Contrastive`.

    Raises:
        ValueError: If arrays are missing, extra or misshapen (all of them
            are listed), do not tell the size of the images, or contradict
            `text_pooling`.
    """
    source = _described(path_or_arrays)
    arrays = read_arrays(path_or_arrays)
    vision, text, arrays = _towers(arrays, image_size)
    structure = names.vision_structure(vision.keys())
    # The layers after the pooled features are part of the contrastive head.
    structure.update(rep=False, head=False)
    vision_rows = names.vision_rows(**structure)
    vision_sizes = names.read_sizes(vision_rows, vision)
    text_structure = names.text_tower_structure(text.keys())
    text_structure["pooling"] = _text_pooling(text_structure, text_pooling)
    text_rows = names.text_tower_rows(**text_structure)
    text_sizes = names.read_sizes(text_rows, text)
    head_structure = names.contrastive_structure(arrays.keys())
    head_rows = names.contrastive_rows(**head_structure)
    head_sizes = names.read_sizes(head_rows, arrays)
    head_sizes.update(I=vision_sizes.get("D"), J=text_sizes.get("D"))
    # A tower without a projection determines the width of the embeddings.
    if not head_structure["image_head"]:
        head_sizes["Z"] = head_sizes["I"]
    elif not head_structure["text_head"]:
        head_sizes["Z"] = head_sizes["J"]
    expected = {
        **names.expected_shapes(vision_rows, vision_sizes, _IMAGE_TOWER),
        **names.expected_shapes(text_rows, text_sizes, _TEXT_TOWER),
        **names.expected_shapes(head_rows, head_sizes),
    }
    names.check_arrays(expected, arrays, source)
    width, bias = head_sizes["Z"], None
    if head_structure["bias"]:
        bias = float(arrays["b"][0])
        options.setdefault("loss", "sigmoid")
    if pad_with_eos is None:
        pad_with_eos = names.pads_with_eos(text_sizes["V"])
    model = Contrastive(
        _vision_encoder(structure, vision_sizes, vision, image_size),
        TextEncoder(
            vocabulary_size=text_sizes["V"],
            max_length=text_sizes["L"],
            hidden_dim=text_sizes["D"],
            num_layers=text_sizes.get("N", text_structure["num_layers"]),
            num_heads=text_sizes["H"],
            mlp_dim=text_sizes["M"],
            pooling=text_structure["pooling"],
            pad_with_eos=pad_with_eos,
            name="text_encoder",
        ),
        embedding_dim=(
            width if head_structure["image_head"] else None,
            width if head_structure["text_head"] else None,
        ),
        temperature=float(np.exp(arrays["t"][0])),
        bias=bias,
        **options,
    )
    model.build()
    load_rows(vision_rows, model.vision_encoder, vision)
    load_rows(text_rows, model.text_encoder, text)
    load_rows(head_rows, model.contrastive_head, arrays)
    return model


def _towers(arrays, image_size):
    """The arrays of two towers, also of old files, by their current names.

    Returns:
        Three dicts: the image tower's and the text tower's by their names
        below `img/` and `txt/`, and all of them by their whole names.
    """
    vision = files.below(arrays, _IMAGE_TOWER)
    vision = files.modernise(vision, _patches(vision, image_size))
    text = files.modernise_text(files.below(arrays, _TEXT_TOWER))
    prefixes = (_IMAGE_TOWER, _TEXT_TOWER)
    others = {n: a for n, a in arrays.items() if not n.startswith(prefixes)}
    for prefix, tower in zip(prefixes, (vision, text)):
        others.update({prefix + name: a for name, a in tower.items()})
    return vision, text, others


def _text_pooling(structure, pooling):
    """The pooling of a text tower, from its arrays or as requested."""
    found = structure["pooling"]
    if pooling is None or pooling == found:
        return found or "last"
    if found == "map" or pooling == "map":
        have = "have" if found else "do not have"
        raise ValueError(
            '`text_pooling` must be "map" if and only if the text tower has a '
            f"MAP head. Received: text_pooling={pooling!r}, but the arrays "
            f"{have} txt/MAPHead_0"
        )
    return pooling


def is_two_towers(arrays):
    """Returns whether arrays from `read_arrays` are those of two towers."""
    return all(
        any(name.startswith(prefix) for name in arrays)
        for prefix in (_IMAGE_TOWER, _TEXT_TOWER)
    )


def is_captioner(arrays):
    """Returns whether arrays from `read_arrays` are those of a captioner."""
    return any(name.startswith("decoder/") for name in arrays)


def save_captioner(captioner, path, *, scan=False):
    """Writes the weights of a captioner for big_vision.

    Args:
        captioner: A built `Captioner`.
        path: npz file to write; names start with `params/`.
        scan: Whether to stack the blocks, as in a big_vision model with
            `scan=True`.

    Raises:
        ValueError: If big_vision does not support such a model.
    """
    encoder = captioner.vision_encoder
    if encoder.pooling not in ("gap", "none"):
        raise ValueError(
            "A captioner of big_vision has a vision encoder with pooling "
            f"'gap'. Received: pooling={encoder.pooling!r}"
        )
    decoder = captioner.text_decoder
    rows = names.text_rows(
        num_layers=decoder.num_layers,
        scanned=scan,
        learned=decoder.position_embedding == "learned",
        use_bias=decoder.use_bias,
    )
    arrays = _arrays(_vision_rows(encoder, scan), encoder)
    arrays = {_CAPTIONER_ENCODER + name: a for name, a in arrays.items()}
    _write(path, {**arrays, **_arrays(rows, decoder)})


def save_two_towers(model, path, *, scan=False):
    """Writes the weights of a contrastive model for big_vision.

    The file does not tell the pooling of the text tower (unless it is "map")
    or whether texts are padded with eos; `load_two_towers` has arguments for
    them.

    Args:
        model: A built `Contrastive`.
        path: npz file to write; names start with `params/`.
        scan: Whether to stack the blocks, as in a big_vision model with
            `scan=True`.
    """
    arrays = {}
    for prefix, rows, part in two_towers_rows(model, scan):
        arrays |= {prefix + n: a for n, a in _arrays(rows, part).items()}
    _write(path, arrays)


def two_towers_rows(model, scan=False):
    """The parts of a contrastive model as big_vision names them.

    Args:
        model: A built `Contrastive`.
        scan: Whether blocks are stacked.

    Returns:
        List of (prefix of the names, list of `names.Row`, part of the model).
    """
    text, head = model.text_encoder, model.contrastive_head
    text_rows = names.text_tower_rows(
        num_layers=text.num_layers, scanned=scan, pooling=text.pooling
    )
    head_rows = names.contrastive_rows(
        image_head=head.embedding_dim[0] is not None,
        text_head=head.embedding_dim[1] is not None,
        bias=head.bias is not None,
    )
    encoder = model.vision_encoder
    return [
        (_IMAGE_TOWER, _vision_rows(encoder, scan), encoder),
        (_TEXT_TOWER, text_rows, text),
        ("", head_rows, head),
    ]


def save_vision_encoder(encoder, path, *, scan=False):
    """Writes the weights of an encoder for big_vision (models/vit.py).

    Args:
        encoder: A built `VisionEncoder`, or a `Classifier` of one.
        path: npz file to write; names start with `params/`.
        scan: Whether to stack the blocks.
    """
    _write(path, _arrays(_vision_rows(encoder, scan), encoder))


def _vision_rows(model, scan):
    encoder = getattr(model, "vision_encoder", model)
    return names.vision_rows(
        num_layers=encoder.num_layers,
        scanned=scan,
        learned=encoder.position_embedding == "learned",
        pooling=encoder.pooling,
        rep=getattr(model, "rep_size", None) is not None,
        head=getattr(model, "num_classes", None) is not None,
    )


def _described(path_or_arrays):
    """Description of the source of arrays, for messages."""
    if isinstance(path_or_arrays, (str, os.PathLike)):
        return os.fspath(path_or_arrays)
    return f"a mapping of {len(path_or_arrays)} entries"


def _patches(arrays, image_size):
    """Number of patches of an image of that size, None if unknown."""
    kernel = arrays.get("embedding/kernel")
    if image_size is None or getattr(kernel, "ndim", 0) != 4:
        return None
    height, width = height_width("image_size", image_size)
    return (height // kernel.shape[0]) * (width // kernel.shape[1])


def _vision_encoder(structure, sizes, arrays, image_size):
    """Creates an encoder of these sizes; resamples its array of positions."""
    patch_size = (sizes["h"], sizes["w"])
    if image_size is None and not structure["learned"]:
        raise ValueError(
            "Positions are sincos2d (there is no `pos_embedding`), so the "
            "arrays do not tell the size of the images: pass "
            "`image_size=(height, width)`. Received: image_size=None"
        )
    if image_size is None:
        grid = square_grid(sizes["P"])
        image_size = tuple(g * p for g, p in zip(grid, patch_size))
    encoder = VisionEncoder(
        hidden_dim=sizes["D"],
        num_layers=sizes.get("N", structure["num_layers"]),
        num_heads=sizes["H"],
        mlp_dim=sizes["M"],
        patch_size=patch_size,
        image_size=image_size,
        position_embedding="learned" if structure["learned"] else "sincos2d",
        pooling=structure["pooling"],
        name="vision_encoder",
    )
    if structure["learned"]:
        arrays["pos_embedding"] = resample_positions(
            arrays["pos_embedding"], encoder.grid
        )
    return encoder


def _text_decoder(arrays, sizes, max_length):
    structure = names.text_structure(arrays.keys())
    if structure["learned"] and max_length not in (None, sizes["L"]):
        raise ValueError(
            f"Learned positions are for texts of length {sizes['L']}. "
            f"Received: max_length={max_length}"
        )
    return TextDecoder(
        vocabulary_size=sizes["V"],
        max_length=sizes.get("L") or max_length or _DEFAULT_LENGTH,
        hidden_dim=sizes["D"],
        num_layers=sizes.get("N", structure["num_layers"]),
        num_heads=sizes["H"],
        mlp_dim=sizes["M"],
        encoder_dim=sizes["E"],
        use_bias=structure["use_bias"],
        special_tokens=SpecialTokens(
            mask=sizes["V"] if sizes["T"] > sizes["V"] else None
        ),
        position_embedding="learned" if structure["learned"] else "sincos2d",
        name="text_decoder",
    )


def paired(rows, model):
    """Matches each row with its variables, in the order of the blocks.

    Args:
        rows: List of `names.Row`.
        model: A built encoder, decoder, `ContrastiveHead` or `Classifier`.

    Returns:
        List of (row, list of variables), with one variable unless blocks are
        stacked.

    Raises:
        ValueError: If the weights of the model are not those of big_vision's.
    """
    # A classifier's encoder has the same names as an encoder alone.
    variables = {
        path.removeprefix("vision_encoder/"): variable
        for path, variable in variables_by_path(model).items()
    }
    # A contrastive head has no blocks.
    blocks = getattr(getattr(model, "vision_encoder", model), "num_layers", 0)
    pairs = []
    for row in rows:
        count = 1 if row.axis is None else blocks
        pairs.append((row, [row.path.format(i) for i in range(count)]))
    wanted = {path for _, paths in pairs for path in paths}
    if wanted != variables.keys():
        raise ValueError(
            "The weights of the model must be those of big_vision's. Received: "
            f"{model.name} with the extra weights "
            f"{sorted(variables.keys() - wanted)}, without "
            f"{sorted(wanted - variables.keys())}"
        )
    return [(row, [variables[path] for path in paths]) for row, paths in pairs]


def load_rows(rows, model, arrays):
    """Assigns arrays to the variables of a model, as `paired` matches them."""
    for row, variables in paired(rows, model):
        parts = [arrays[row.name]]
        if row.axis is not None:
            parts = np.moveaxis(parts[0], row.axis, 0)
        for variable, part in zip(variables, parts, strict=True):
            variable.assign(part)


def _arrays(rows, model):
    """Dict of arrays from the variables of a model."""
    part = getattr(model, "vision_encoder", model)
    check_default_style(part, "A file of big_vision")
    arrays = {}
    for row, variables in paired(rows, model):
        values = [to_numpy(v) for v in variables]
        stacked = row.axis is not None
        arrays[row.name] = np.stack(values, row.axis) if stacked else values[0]
    return arrays


def _write(path, arrays):
    files.write_npz(path, {f"params/{n}": a for n, a in arrays.items()})
