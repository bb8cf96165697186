"""Vision encoder for timm.

    save_timm(encoder, "timm")  # timm.create_model("local-dir:timm")

timm's ViT is the same: no class token, LayerNorms with epsilon 1e-6, the tanh
approximation of gelu, a final LayerNorm on the patches and then their mean as
`pre_logits` (`global_pool="avg"` and, since the norm comes first,
`fc_norm=False`). For transformers see `siglip.py`.
"""

import os

import numpy as np

from cappa_tf.models.block_style import check_default_style
from cappa_tf.models.positions import sincos2d
from cappa_tf.models.vision_encoder import VisionEncoder
from cappa_tf.saving import model_card, torch_layout
from cappa_tf.utils import files

# Names of a layer in this project and in timm; a repeated name is one weight.
_LAYERS = {"patches": "patch_embed.proj", "encoder_norm": "norm"}
_BLOCK_LAYERS = {
    "attention_norm": "norm1",
    "attention/query": "attn.qkv",
    "attention/key": "attn.qkv",
    "attention/value": "attn.qkv",
    "attention/out": "attn.proj",
    "mlp_norm": "norm2",
    "mlp/expand": "mlp.fc1",
    "mlp/project": "mlp.fc2",
}
_POSITIONS = "pos_embed"


def save_timm(encoder, folder, facts=None):
    """Writes a folder for `timm.create_model("local-dir:FOLDER")`.

    `config.json` holds the architecture and its arguments, for those who call
    `timm.create_model(architecture, **model_args)` and load the state dict
    themselves.

    Args:
        encoder: A built `VisionEncoder` with pooling "gap" or "none".
        folder: Folder to write; created if missing.
        facts: Dict of `model_card.run_facts`, for the model card README.md.

    Raises:
        ValueError: If timm's model cannot represent the encoder.
    """
    _check(encoder)
    layers = _LAYERS | {
        f"encoder_block_{i}/{ours}": f"blocks.{i}.{theirs}"
        for i in range(encoder.num_layers)
        for ours, theirs in _BLOCK_LAYERS.items()
    }
    layers["positions/position_embedding"] = _POSITIONS
    named = torch_layout.named_variables(encoder, layers)
    tensors = torch_layout.tensors(named)
    if encoder.position_embedding == "sincos2d":
        tensors[_POSITIONS] = sincos2d(*encoder.grid, encoder.hidden_dim)[0]
    tensors[_POSITIONS] = tensors[_POSITIONS][None]  # [P, D] -> [1, P, D]
    config = timm_config(encoder)
    with files.folder(folder):
        files.write_json(os.path.join(folder, "config.json"), config)
        card = model_card.export_card(encoder, facts, "timm")
        files.write_text(os.path.join(folder, "README.md"), card)
        torch_layout.write_tensors(folder, tensors)


def _check(encoder):
    torch_layout.check_installed()
    check_default_style(encoder, "A folder for timm")
    has_head = type(encoder) is not VisionEncoder
    if has_head or encoder.pooling not in ("gap", "none"):
        raise ValueError(
            "An encoder for timm must have pooling 'gap' or 'none' and no "
            f"head. Received: a {type(encoder).__name__}"
            + ("" if has_head else f" with pooling={encoder.pooling!r}")
        )


def timm_config(encoder):
    """Architecture, arguments and preprocessing in timm's format."""
    return {
        "architecture": "vit_base_patch16_siglip_gap_224",
        "num_classes": 0,
        "num_features": encoder.hidden_dim,
        "global_pool": "avg",
        "model_args": {
            "img_size": list(encoder.image_size),
            "patch_size": list(encoder.patch_size),
            "embed_dim": encoder.hidden_dim,
            "depth": encoder.num_layers,
            "num_heads": encoder.num_heads,
            "mlp_ratio": _mlp_ratio(encoder),
            "act_layer": "gelu_tanh",
            "class_token": False,
            "global_pool": "avg",
            "fc_norm": False,
            "num_classes": 0,
        },
        "pretrained_cfg": {
            "input_size": [3, *encoder.image_size],
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _mlp_ratio(encoder):
    """A ratio for which timm's `int(width * ratio)` is the MLP's width."""
    ratio = encoder.mlp_dim / encoder.hidden_dim
    if int(encoder.hidden_dim * ratio) < encoder.mlp_dim:
        ratio = np.nextafter(ratio, np.inf).item()
    return ratio
