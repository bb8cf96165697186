"""Conversion of captioners from clip-jax, which trained the public CapPa.

    captioner = load_captioner("cappa-large-patch16-256-jax")
    captioner = load_captioner(arrays, config)

clip-jax (borisdayma/clip-jax) varies big_vision's blocks: norms without a
scale, norms of the outputs of attention, gated MLPs, rotary text positions,
registers. `BlockStyle` and the positions have all of them, so that a captioner
from there is a `Captioner` like any other.

Abbreviations: the letters of shapes are those of `big_vision_names.py`, with
    R: registers.  Y, X: rows, columns of the tables of factorised positions.
"""

import collections.abc
import json
import os

from cappa_tf.models.block_style import BlockStyle
from cappa_tf.models.captioner import Captioner
from cappa_tf.models.positions import resample_positions
from cappa_tf.models.special_tokens import SpecialTokens
from cappa_tf.models.text_decoder import TextDecoder
from cappa_tf.models.vision_encoder import VisionEncoder
from cappa_tf.saving import big_vision, big_vision_arrays, orbax
from cappa_tf.saving.big_vision_names import (
    Row,
    check_arrays,
    expected_shapes,
)
from cappa_tf.utils import files

CONFIG = "config.json"
_VISION, _TEXT = "vision/", "text/"
# Of the contrastive loss; a captioner has them and never uses them.
_UNUSED = ("logit_scale", "logit_bias")

# What of a configuration may have which values. Others exist in clip-jax, but
# neither in the public weights nor in the configurations of its captioners.
# Fields that matter in training only (dropout, remat_policy, unroll, dtype)
# are not read, nor is float32_logits, which has no effect there.
_BOTH = {
    "activations": (["gelu", "linear"],),
    "use_bias": (False,),
    "force_scale": (False,),
    "pool_type": (None,),
    "use_rmsnorm": (True, False),
    "ln_type": ("normformer", "preln"),
    "normalize_qk": (True, False),
}
_ALLOWED = {
    "vision_config": {
        **_BOTH,
        "position_embedding_type": ("learnt",),
        "use_causal_mask": (False,),
        "position_embedding_factorized": (True, False),
        "keep_registers": (True, False),
    },
    "text_config": {
        **_BOTH,
        "position_embedding_type": ("rotary",),
        "use_causal_mask": (True,),
        "is_decoder": (True,),
    },
}
# What clip-jax takes if a configuration does not say.
_DEFAULTS = {
    "pool_type": None,
    "normalize_qk": False,
    "position_embedding_factorized": False,
    "keep_registers": False,
}
_COUNTS = {
    "vision_config": (
        "hidden_size num_heads mlp_dim num_layers image_size patch_size"
    ).split(),
    "text_config": (
        "hidden_size num_heads mlp_dim num_layers vocab_size max_length"
    ).split(),
}
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")


def is_clip_jax(path):
    """Whether a path is a folder with weights of clip-jax."""
    path = os.path.join(os.fspath(path), CONFIG)
    if not files.isfile(path):
        return False
    try:
        config = json.loads(files.read_text(path))
    except ValueError:
        return False
    vision = config.get("vision_config") if isinstance(config, dict) else None
    return isinstance(vision, dict) and "ln_type" in vision


def load_captioner(
    folder_or_arrays, config=None, *, image_size=None, **options
):
    """Builds a captioner from weights of clip-jax.

    The decoder's `max_length` is one less than the original's, which counts
    its start token. In mixed precision the original keeps the residual stream
    in float32, which this project does not.

    Args:
        folder_or_arrays: Folder with config.json and a checkpoint (`1460000/`)
            as clip-jax's training saves it, sharded or not; the folder of a
            step, beside or with a config.json, too. Or a mapping from name
            ("vision/embeddings/registers", with or without `params/` and
            `/value`) to array, which may be nested.
        config: The configuration as a dict. Needed with arrays; by default
            that of the folder.
        image_size: Side of the images in pixels, or (height, width), by
            default the configuration's. Positions are resampled. The original
            does so for factorised positions only, by the same rule.
        **options: Further arguments of `Captioner`. `masked_pred_prob` is by
            default the configuration's.

    Returns:
        A built `Captioner`.

    Raises:
        ValueError: If files or arrays are missing, extra or misshapen (all of
            them are listed), or the configuration is not that of a captioner
            that is supported.
        ImportError: If a package that reads the folder is not installed.
    """
    if isinstance(folder_or_arrays, collections.abc.Mapping):
        source = f"a mapping of {len(folder_or_arrays)} entries"
        if config is None:
            raise ValueError(
                "Arrays of clip-jax need `config`, its configuration as a "
                "dict. Received: config=None"
            )
        arrays = folder_or_arrays
    else:
        source = os.fspath(folder_or_arrays)
        step = orbax.find_step(source)
        if config is None:
            config = _read_config(source, step)
        arrays = orbax.read_params(step)
    vision, text = _checked_config(config, source)
    arrays = {
        name.removesuffix("/value"): array
        for name, array in big_vision_arrays.read_arrays(arrays).items()
        if name.removesuffix("/value") not in _UNUSED
    }
    of_vision, vision_sizes = vision_rows(vision)
    of_text, text_sizes = text_rows(text, vision_sizes["D"])
    expected = {
        **expected_shapes(of_vision, vision_sizes, _VISION),
        **expected_shapes(of_text, text_sizes, _TEXT),
    }
    check_arrays(expected, arrays, source, "this configuration of clip-jax")
    encoder = _encoder(vision, image_size)
    options.setdefault("masked_pred_prob", text.get("masked_pred_prob", 0.75))
    captioner = Captioner(encoder, _decoder(text), **options)
    captioner.build()
    below = big_vision_arrays.below(arrays, _VISION)
    table = "embeddings/position_embeds"
    if table in below:
        below[table] = resample_positions(
            below[table], encoder.grid, _table_grid(vision)
        )
    big_vision.load_rows(of_vision, encoder, below)
    below = big_vision_arrays.below(arrays, _TEXT)
    big_vision.load_rows(of_text, captioner.text_decoder, below)
    return captioner


def _read_config(folder, step):
    """The configuration of a checkpoint, which lies in one of its folders."""
    parent = os.path.dirname(os.path.abspath(folder).rstrip("/"))
    places = [folder, os.path.dirname(os.path.dirname(step)), parent]
    paths = [os.path.join(place, CONFIG) for place in dict.fromkeys(places)]
    for path in paths:
        if not files.isfile(path):
            continue
        try:
            return json.loads(files.read_text(path))
        except ValueError as error:
            raise ValueError(
                f"A configuration must be JSON. Received: {path} ({error})"
            ) from error
    raise ValueError(
        f"A checkpoint of clip-jax needs its {CONFIG}, in its folder or as "
        f"`config`. Received: {folder}, without {' or '.join(paths)}"
    )


def _checked_config(config, source):
    """The two towers' configurations, with defaults filled in.

    Raises:
        ValueError: If anything is missing or not supported; lists all.
    """
    wrong, towers = [], []
    for name, allowed in _ALLOWED.items():
        tower = config.get(name) if isinstance(config, dict) else None
        if not isinstance(tower, dict):
            wrong.append(f"{name} is missing")
            continue
        tower = {**_DEFAULTS, **tower}
        towers.append(tower)
        for field, values in allowed.items():
            if field not in tower:
                wrong.append(f"{name}.{field} is missing")
            elif not any(tower[field] == value for value in values):
                wanted = " or ".join(json.dumps(value) for value in values)
                found = json.dumps(tower[field])
                wrong.append(f"{name}.{field} is {found}, not {wanted}")
        for field in _COUNTS[name]:
            if not _is_count(tower.get(field)):
                found = json.dumps(tower.get(field))
                wrong.append(f"{name}.{field} is {found}, not a positive int")
        if name == "text_config":
            for field in _IDS:
                value = tower.get(field)
                if not isinstance(value, int) or isinstance(value, bool):
                    found = json.dumps(value)
                    wrong.append(f"{name}.{field} is {found}, not an id")
    if wrong:
        raise ValueError(
            "The configuration must be that of a captioner of clip-jax as its "
            "public one is. Received: "
            f"{source}, where " + "; ".join(wrong)
        )
    return towers


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _style(tower):
    return BlockStyle(
        norm="rms_norm" if tower["use_rmsnorm"] else "layer_norm",
        norm_scale=False,
        use_bias=False,
        post_norm=tower["ln_type"] == "normformer",
        query_key_norm=tower["normalize_qk"],
        gated_mlp=True,
    )


def _table_grid(vision):
    """(rows, columns) of the position tables; null is the grid of patches."""
    side = vision["image_size"] // vision["patch_size"]
    return tuple(vision.get("position_embedding_shape") or (side, side))


def _encoder(vision, image_size):
    factorised = vision["position_embedding_factorized"]
    return VisionEncoder(
        hidden_dim=vision["hidden_size"],
        num_layers=vision["num_layers"],
        num_heads=vision["num_heads"],
        mlp_dim=vision["mlp_dim"],
        patch_size=vision["patch_size"],
        image_size=image_size or vision["image_size"],
        position_embedding="factorised" if factorised else "learned",
        position_grid=_table_grid(vision) if factorised else None,
        num_registers=vision.get("registers") or 0,
        keep_registers=vision["keep_registers"],
        style=_style(vision),
        name="vision_encoder",
    )


def _decoder(text):
    return TextDecoder(
        vocabulary_size=text["vocab_size"],
        max_length=text["max_length"] - 1,
        hidden_dim=text["hidden_size"],
        num_layers=text["num_layers"],
        num_heads=text["num_heads"],
        mlp_dim=text["mlp_dim"],
        position_embedding="rotary",
        special_tokens=SpecialTokens(
            pad=text["pad_token_id"],
            start=text["bos_token_id"],
            eos=text["eos_token_id"],
            mask=text["mask_token_id"],
        ),
        style=_style(text),
        name="text_decoder",
    )


def _sizes(tower):
    """Sizes of a tower by letter."""
    heads = tower["num_heads"]
    return {
        "D": tower["hidden_size"],
        "H": heads,
        "C": tower["hidden_size"] // heads,
        "M": tower["mlp_dim"],
        "N": tower["num_layers"],
    }


def _block_rows(tower, ours, attentions):
    """Rows of all blocks, which clip-jax stacks along axis 0.

    Args:
        tower: Configuration.
        ours: Path of a block of this project.
        attentions: List of (clip-jax's name, ours, width of keys' input).
    """
    rows = []
    for name, path, memory in attentions:
        for part in ("query", "key", "value"):
            source = "D" if part == "query" else memory
            rows.append(
                (
                    f"{name}/{part}/kernel",
                    f"{path}/{part}/kernel",
                    f"{source}HC",
                )
            )
        rows.append((f"{name}/out/kernel", f"{path}/out/kernel", "HCD"))
        if tower["normalize_qk"]:
            rows += [
                (f"{name}/norm_{part}/scale", f"{path}/{part}_norm/scale", "C")
                for part in ("query", "key")
            ]
        if tower["ln_type"] == "normformer":
            scale = "scale" if tower["use_rmsnorm"] else "gamma"
            rows.append(
                (f"post_{name}_norm/scale", f"{path}_post_norm/{scale}", "D")
            )
    rows += [
        ("mlp/wi_0/kernel", "mlp/gate/kernel", "DM"),
        ("mlp/wi_1/kernel", "mlp/expand/kernel", "DM"),
        ("mlp/wo/kernel", "mlp/project/kernel", "MD"),
    ]
    return [
        Row(f"encoder/layers/{name}", f"{ours}/{path}", ("N", *shape), 0)
        for name, path, shape in rows
    ]


def vision_rows(vision):
    """The table of the encoder, and the sizes by letter."""
    side, grid = vision["patch_size"], _table_grid(vision)
    sizes = {**_sizes(vision), "h": side, "w": side, "Y": grid[0]}
    sizes.update(X=grid[1], P=grid[0] * grid[1])
    rows = [("patch_embeds/kernel", "patches/kernel", ("h", "w", 3, "D"))]
    if vision["position_embedding_factorized"]:
        rows += [
            ("position_embeds_height", "positions/rows", (1, "Y", "D")),
            ("position_embeds_width", "positions/columns", (1, "X", "D")),
        ]
    else:
        path = "positions/position_embedding"
        rows.append(("position_embeds", path, (1, "P", "D")))
    if vision.get("registers"):
        sizes["R"] = vision["registers"]
        rows.append(("registers", "registers", (1, "R", "D")))
    rows = [Row(f"embeddings/{n}", p, shape) for n, p, shape in rows]
    attention = [("attention", "attention", "D")]
    return rows + _block_rows(vision, "encoder_block_{}", attention), sizes


def text_rows(text, encoder_dim):
    """The table of the decoder, and the sizes by letter."""
    sizes = {**_sizes(text), "E": encoder_dim, "V": text["vocab_size"]}
    embedding = "embeddings/embeddings/embedding"
    rows = [
        Row(embedding, "tokens/embeddings", ("V", "D")),
        Row("logits/kernel", "head/kernel", ("D", "V")),
        Row("logits/bias", "head/bias", ("V",)),
    ]
    attentions = [
        ("attention", "self_attention", "D"),
        ("cross_attention", "cross_attention", "E"),
    ]
    return rows + _block_rows(text, "decoder_block_{}", attentions), sizes
