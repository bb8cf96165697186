"""Vision encoder for PyTorch: transformers' SigLIP and timm.

    save_siglip(encoder, "hf")  # SiglipVisionModel.from_pretrained("hf")
    save_timm(encoder, "timm")  # timm.create_model("local-dir:timm")

Both hold the same ViT: no class token, LayerNorms with epsilon 1e-6, the tanh
approximation of gelu, a final LayerNorm on the patches and then their mean as
`pre_logits`. timm computes that mean (`global_pool="avg"` and, since the norm
comes first, `fc_norm=False`). SiglipVisionModel has only attention pooling,
which CapPa lacks (`vision_use_head=False`); there the caller computes the mean,
`model(pixel_values).last_hidden_state.mean(1)`.

Files are written with NumPy; PyTorch is needed only to read them.

Abbreviations for dimensions:
    h, w: height, width of a patch.  P: patches.  D: width.  H: heads.
    C: width of one head, D / H.     I, O: inputs, outputs of a dense layer.
"""

import collections
import os

import numpy as np

from cappa_tf.models.positions import sincos2d
from cappa_tf.models.vision_encoder import VisionEncoder
from cappa_tf.saving.weights import to_numpy, variables_by_path
from cappa_tf.utils import files
from cappa_tf.utils.arguments import check_extra

# Names of a layer in this project, in SigLIP and in timm; {} is the number of
# the block. If a name of theirs repeats, their weight is the concatenation of
# ours.
_LAYERS = [
    ("patches", "embeddings.patch_embedding", "patch_embed.proj"),
    ("encoder_norm", "post_layernorm", "norm"),
]
_BLOCK_LAYERS = [
    (
        f"encoder_block_{{}}/{ours}",
        f"encoder.layers.{{}}.{hf}",
        f"blocks.{{}}.{timm}",
    )
    for ours, hf, timm in [
        ("attention_norm", "layer_norm1", "norm1"),
        ("attention/query", "self_attn.q_proj", "attn.qkv"),
        ("attention/key", "self_attn.k_proj", "attn.qkv"),
        ("attention/value", "self_attn.v_proj", "attn.qkv"),
        ("attention/out", "self_attn.out_proj", "attn.proj"),
        ("mlp_norm", "layer_norm2", "norm2"),
        ("mlp/expand", "mlp.fc1", "mlp.fc1"),
        ("mlp/project", "mlp.fc2", "mlp.fc2"),
    ]
]
_SIGLIP, _TIMM = 1, 2  # Columns of the tables.
_LEAVES = {
    "kernel": "weight",
    "gamma": "weight",
    "bias": "bias",
    "beta": "bias",
}
_POSITIONS = "positions/position_embedding"


def save_siglip(encoder, folder):
    """Writes a folder for `SiglipVisionModel.from_pretrained`.

    Besides the weights it holds the configuration and that of the image
    processor: resize to the model's size without keeping the aspect ratio,
    bilinear, values in [-1, 1].

    Args:
        encoder: A built `VisionEncoder` with pooling "gap" or "none", for
            square images and patches.
        folder: Folder to write; created if missing.

    Raises:
        ValueError: If SiglipVisionModel cannot represent the encoder.
    """
    _check(encoder)
    sides = {"image_size": encoder.image_size, "patch_size": encoder.patch_size}
    for name, (height, width) in sides.items():
        if height != width:
            raise ValueError(
                "SiglipVisionModel is for square images and patches. "
                f"Received: {name}={height, width}"
            )
    tensors = _state_dict(encoder, _SIGLIP)
    table = _positions(encoder)
    tensors["embeddings.position_embedding.weight"] = table[0]  # -> [P, D]
    # transformers 4 has this module; 5 removes the prefix on loading.
    tensors = {f"vision_model.{n}": value for n, value in tensors.items()}
    processor = _siglip_processor(encoder)
    config = _siglip_config(encoder)
    with files.folder(folder):
        files.write_json(
            os.path.join(folder, "preprocessor_config.json"), processor
        )
        files.write_json(os.path.join(folder, "config.json"), config)
        _write_tensors(folder, tensors)


def save_timm(encoder, folder):
    """Writes a folder for `timm.create_model("local-dir:FOLDER")`.

    `config.json` holds the architecture and its arguments, for those who call
    `timm.create_model(architecture, **model_args)` and load the state dict
    themselves.

    Args:
        encoder: A built `VisionEncoder` with pooling "gap" or "none".
        folder: Folder to write; created if missing.

    Raises:
        ValueError: If timm's model cannot represent the encoder.
    """
    _check(encoder)
    tensors = _state_dict(encoder, _TIMM)
    tensors["pos_embed"] = _positions(encoder)
    config = timm_config(encoder)
    with files.folder(folder):
        files.write_json(os.path.join(folder, "config.json"), config)
        _write_tensors(folder, tensors)


def check_installed():
    """Checks that safetensors is installed, which writes the weights.

    Raises:
        ImportError: If it is not; gives the command that installs it.
    """
    check_extra("A folder for PyTorch", "interop", "safetensors")


def _check(encoder):
    check_installed()
    has_head = type(encoder) is not VisionEncoder
    if has_head or encoder.pooling not in ("gap", "none"):
        raise ValueError(
            "An encoder for PyTorch must have pooling 'gap' or 'none' and no "
            f"head. Received: a {type(encoder).__name__}"
            + ("" if has_head else f" with pooling={encoder.pooling!r}")
        )


def _state_dict(encoder, column):
    """All weights but the positions, by their names in PyTorch."""
    blocks = [
        tuple(name.format(i) for name in row)
        for i in range(encoder.num_layers)
        for row in _BLOCK_LAYERS
    ]
    theirs = {row[0]: row[column] for row in [*_LAYERS, *blocks]}
    variables = variables_by_path(encoder)
    variables.pop(_POSITIONS, None)
    parts = collections.defaultdict(list)
    for path, variable in variables.items():
        layer, _, leaf = path.rpartition("/")
        name = f"{theirs[layer]}.{_LEAVES[leaf]}"
        parts[name].append(_in_torch_layout(path, to_numpy(variable)))
    return {
        name: np.ascontiguousarray(np.concatenate(arrays))
        for name, arrays in parts.items()
    }


def _in_torch_layout(path, value):
    """Reshapes to PyTorch's layout: outputs first, heads concatenated."""
    if not path.endswith("kernel"):
        return value.reshape(-1)  # [D], or [H, C] -> [D]
    if value.ndim == 4:
        return value.transpose(3, 2, 0, 1)  # [h, w, 3, D] -> [D, 3, h, w]
    if path.endswith("attention/out/kernel"):
        return value.reshape(-1, value.shape[-1]).T  # [H, C, D] -> [D, D]
    return value.reshape(len(value), -1).T  # [I, O] or [D, H, C] -> [O, I]


def _positions(encoder):
    """The table of positions [1, P, D], learned or fixed."""
    if encoder.position_embedding == "sincos2d":
        return sincos2d(*encoder.grid, encoder.hidden_dim)
    return to_numpy(variables_by_path(encoder)[_POSITIONS])


def _siglip_config(encoder):
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "hidden_size": encoder.hidden_dim,
        "intermediate_size": encoder.mlp_dim,
        "num_hidden_layers": encoder.num_layers,
        "num_attention_heads": encoder.num_heads,
        "num_channels": 3,
        "image_size": encoder.image_size[0],
        "patch_size": encoder.patch_size[0],
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "vision_use_head": False,
        "torch_dtype": "float32",
    }


def _siglip_processor(encoder):
    height, width = encoder.image_size
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,  # Pillow's number of bilinear.
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }


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


def _write_tensors(folder, tensors):
    from safetensors.numpy import save

    path = os.path.join(folder, "model.safetensors")
    # transformers requires the framework of the layout. `save_file` would write
    # a file that only its owner can read.
    files.write_bytes(path, save(tensors, metadata={"format": "pt"}))
