"""Folders of transformers' SigLIP, written and read.

    save_siglip(model, "hf")          # SiglipModel.from_pretrained("hf")
    save_siglip_vision(encoder, "hf")  # SiglipVisionModel.from_pretrained("hf")
    model = load_siglip("siglip-base-patch16-224")  # a `Contrastive`
    encoder = load_siglip_vision("siglip-base-patch16-224", image_size=384)

A folder holds config.json, model.safetensors and preprocessor_config.json, and
with a vocabulary spiece.model, tokenizer.json and tokenizer_config.json. SigLIP
and SigLIP 2 of fixed resolution have the same form.

SiglipModel is one architecture: image features pooled by attention (MAP)
without a projection, the text's last position with a projection to the width
of the image tower, a scale and a bias of the similarities. SiglipVisionModel
may have no pooling (`vision_use_head`), which is how an encoder that takes the
mean of the patches is written; the caller then computes
`model(pixel_values).last_hidden_state.mean(1)`.

Abbreviations: P patches, D width.
"""

import json
import os

import numpy as np

from cappa_tf.models.block_style import check_default_style
from cappa_tf.models.contrastive import Contrastive
from cappa_tf.models.positions import resample_positions, sincos2d, square_grid
from cappa_tf.models.text_encoder import TextEncoder
from cappa_tf.models.vision_encoder import VisionEncoder
from cappa_tf.saving import huggingface_tokenizer, model_card, torch_layout
from cappa_tf.saving.big_vision_names import check_arrays, pads_with_eos
from cappa_tf.utils import files
from cappa_tf.utils.arguments import height_width

_CONFIG = "config.json"
_POSITIONS = "positions/position_embedding"
_VISION_POSITIONS = "vision_model.embeddings.position_embedding.weight"

_BLOCK = {
    "attention_norm": "layer_norm1",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "mlp/expand": "mlp.fc1",
    "mlp/project": "mlp.fc2",
}
_VISION = {
    "patches": "vision_model.embeddings.patch_embedding",
    "positions": "vision_model.embeddings.position_embedding",
    "encoder_norm": "vision_model.post_layernorm",
    "pool/probe": "vision_model.head.probe",
    # One tensor of the three, in this order.
    "pool/attention/query": "vision_model.head.attention.in_proj_",
    "pool/attention/key": "vision_model.head.attention.in_proj_",
    "pool/attention/value": "vision_model.head.attention.in_proj_",
    "pool/attention/out": "vision_model.head.attention.out_proj",
    "pool/norm": "vision_model.head.layernorm",
    "pool/mlp/expand": "vision_model.head.mlp.fc1",
    "pool/mlp/project": "vision_model.head.mlp.fc2",
}
_TEXT = {
    "tokens": "text_model.embeddings.token_embedding",
    "positions": "text_model.embeddings.position_embedding",
    "encoder_norm": "text_model.final_layer_norm",
}
_HEAD = {
    "text": "text_model.head",
    "log_temperature": "logit_scale",
    "logit_bias": "logit_bias",
}

# Defaults of transformers: config.json may hold only what differs.
_SIZES = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
_COMPUTATION = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_VISION_SIZES = {**_SIZES, "image_size": 224, "patch_size": 16}
_TEXT_SIZES = {**_SIZES, "vocab_size": 32_000, "max_position_embeddings": 64}


def save_siglip(model, folder, tokenizer=None, facts=None):
    """Writes a folder for `SiglipModel.from_pretrained`.

    The image processor resizes to the model's size without keeping the aspect
    ratio, bilinearly, to values in [-1, 1]. With a vocabulary,
    `AutoProcessor.from_pretrained` opens both; give its text side
    `padding="max_length", truncation=True`.

    Args:
        model: A built `Contrastive`.
        folder: Folder to write; created if missing.
        tokenizer: The `Tokenizer` of the model, or None.
        facts: Dict of `model_card.run_facts`, for the model card README.md.

    Raises:
        ValueError: If SiglipModel cannot represent the model; says why.
    """
    torch_layout.check_installed()
    _check_representable(model)
    vision, text = model.vision_encoder, model.text_encoder
    tensors = {
        **_vision_tensors(vision),
        **torch_layout.tensors(
            torch_layout.named_variables(text, _text_layers(text))
        ),
        # The softmax loss ignores a bias, so there may be none.
        "logit_bias": np.zeros(1, np.float32),
        **torch_layout.tensors(
            torch_layout.named_variables(model.contrastive_head, _HEAD)
        ),
    }
    special = text.special_tokens
    config = {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "torch_dtype": "float32",
        "vision_config": _vision_config(vision),
        "text_config": {
            "model_type": "siglip_text_model",
            **_sizes(text),
            "vocab_size": text.vocabulary_size,
            "max_position_embeddings": text.max_length,
            "projection_size": vision.hidden_dim,
            "pad_token_id": special.eos if text.pad_with_eos else special.pad,
            "eos_token_id": special.eos,
            "bos_token_id": None,
        },
    }
    vocabulary = {}
    if tokenizer is not None:
        vocabulary = huggingface_tokenizer.contents(
            tokenizer, text.max_length, text.pad_with_eos
        )
    with files.folder(folder):
        for name, content in vocabulary.items():
            files.write_bytes(os.path.join(folder, name), content)
        processor = {**_processor(vision), "processor_class": "SiglipProcessor"}
        card = model_card.export_card(model, facts, "siglip")
        _write(folder, config, processor, tensors, card)


def save_siglip_vision(encoder, folder, facts=None):
    """Writes a folder for `SiglipVisionModel.from_pretrained`.

    Args:
        encoder: A built `VisionEncoder` with pooling "map", "gap" or "none",
            for square images and patches.
        folder: Folder to write; created if missing.
        facts: Dict of `model_card.run_facts`, for the model card README.md.

    Raises:
        ValueError: If SiglipVisionModel cannot represent the encoder.
    """
    torch_layout.check_installed()
    _check_encoder(encoder, ("map", "gap", "none"))
    config = {
        "architectures": ["SiglipVisionModel"],
        "torch_dtype": "float32",
        **_vision_config(encoder),
    }
    tensors = _vision_tensors(encoder)
    with files.folder(folder):
        card = model_card.export_card(encoder, facts, "siglip")
        _write(folder, config, _processor(encoder), tensors, card)


def _write(folder, config, processor, tensors, card):
    files.write_text(os.path.join(folder, "README.md"), card)
    path = os.path.join(folder, "preprocessor_config.json")
    files.write_json(path, processor)
    files.write_json(os.path.join(folder, _CONFIG), config)
    torch_layout.write_tensors(folder, tensors)


def _check_representable(model):
    """Raises ValueError if a `Contrastive` is not SiglipModel's."""
    _check_encoder(model.vision_encoder, ("map",))
    text, head = model.text_encoder, model.contrastive_head
    wrong = []
    if text.pooling != "last":
        wrong.append(f"pooling={text.pooling!r} of the text encoder")
    if head.embedding_dim != (None, model.vision_encoder.hidden_dim):
        wrong.append(
            f"embedding_dim={head.embedding_dim} with an image tower of width "
            f"{model.vision_encoder.hidden_dim}"
        )
    if wrong:
        raise ValueError(
            "SiglipModel has no projection of images, a projection of texts to "
            "the image tower's width, and reads the last position of a text. "
            f"Received: {' and '.join(wrong)}"
        )


def _check_encoder(encoder, poolings):
    """Raises ValueError if an encoder is not SiglipVisionModel's."""
    check_default_style(encoder, "A folder of SigLIP")
    if type(encoder) is not VisionEncoder or encoder.pooling not in poolings:
        allowed = " or ".join(repr(pooling) for pooling in poolings)
        raise ValueError(
            f"An encoder for SigLIP must have pooling {allowed} and no head. "
            f"Received: a {type(encoder).__name__} with "
            f"pooling={encoder.pooling!r}"
        )
    sides = {"image_size": encoder.image_size, "patch_size": encoder.patch_size}
    for name, (height, width) in sides.items():
        if height != width:
            raise ValueError(
                "SiglipVisionModel is for square images and patches. "
                f"Received: {name}={height, width}"
            )


def _layers(table, blocks, count):
    """A table of layers with those of all blocks."""
    return table | {
        f"encoder_block_{i}/{ours}": f"{blocks}.encoder.layers.{i}.{theirs}"
        for i in range(count)
        for ours, theirs in _BLOCK.items()
    }


def _vision_layers(encoder):
    return _layers(_VISION, "vision_model", encoder.num_layers)


def _text_layers(encoder):
    return _layers(_TEXT, "text_model", encoder.num_layers)


def _vision_tensors(encoder):
    """Tensors of an image tower, of fixed positions, too."""
    named = torch_layout.named_variables(encoder, _vision_layers(encoder))
    tensors = torch_layout.tensors(named)
    if encoder.position_embedding == "sincos2d":
        table = sincos2d(*encoder.grid, encoder.hidden_dim)
        tensors[_VISION_POSITIONS] = table[0]  # -> [P, D]
    return tensors


def _sizes(encoder):
    return {
        "hidden_size": encoder.hidden_dim,
        "intermediate_size": encoder.mlp_dim,
        "num_hidden_layers": encoder.num_layers,
        "num_attention_heads": encoder.num_heads,
        "attention_dropout": 0.0,
        **_COMPUTATION,
    }


def _vision_config(encoder):
    return {
        "model_type": "siglip_vision_model",
        **_sizes(encoder),
        "num_channels": 3,
        "image_size": encoder.image_size[0],
        "patch_size": encoder.patch_size[0],
        "vision_use_head": encoder.pooling == "map",
    }


def _processor(encoder):
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


def is_siglip(path):
    """Whether a path is a folder of a SiglipModel or SiglipVisionModel."""
    return _model_type(path) in ("siglip", "siglip_vision_model")


def has_text(path):
    """Whether a folder of SigLIP is that of a SiglipModel, with both towers."""
    return _model_type(path) == "siglip"


def _model_type(path):
    config = os.path.join(path, _CONFIG)
    if not files.isdir(path) or not files.exists(config):
        return None
    return _read_config(path).get("model_type")


def load_siglip(folder, image_size=None, **options):
    """Builds a contrastive model from a folder of transformers' SiglipModel.

    Args:
        folder: Folder with config.json and model.safetensors.
        image_size: Side of the images in pixels, or (height, width); positions
            are resampled if it is not that of the file.
        **options: Further arguments of `Contrastive`.

    Returns:
        A built `Contrastive` with the sigmoid loss.

    Raises:
        ValueError: If there is no such model, it computes something else, or
            tensors are missing, extra or misshapen (all of them are listed).
    """
    torch_layout.check_installed()
    config = _read_config(folder)
    if not has_text(folder):
        raise ValueError(
            "A SiglipModel's config.json has the model_type 'siglip'. "
            f"Received: {folder} with {config.get('model_type')!r}"
        )
    given = config.get("text_config") or {}
    text_config = _read_sizes(given, _TEXT_SIZES, folder)
    vision = _encoder(config.get("vision_config") or {}, folder, image_size)
    text = TextEncoder(
        vocabulary_size=text_config["vocab_size"],
        max_length=text_config["max_position_embeddings"],
        **_arguments(text_config),
        pad_with_eos=pads_with_eos(text_config["vocab_size"])
        and given.get("pad_token_id", 1) != 0,
        name="text_encoder",
    )
    width = given.get("projection_size") or text.hidden_dim
    tensors = _tensors(folder)
    options = {"loss": "sigmoid", **options}
    scale, bias = tensors.get("logit_scale"), tensors.get("logit_bias")
    if scale is not None and bias is not None:
        options["temperature"] = float(np.exp(scale.reshape(-1)[0]))
        options["bias"] = float(bias.reshape(-1)[0])
    else:
        options["bias"] = 0.0  # Listed as missing below.
    model = Contrastive(vision, text, embedding_dim=(None, width), **options)
    model.build()
    named = {
        **torch_layout.named_variables(vision, _vision_layers(vision)),
        **torch_layout.named_variables(text, _text_layers(text)),
        **torch_layout.named_variables(model.contrastive_head, _HEAD),
    }
    _load(named, tensors, vision, folder)
    return model


def load_siglip_vision(folder, image_size=None):
    """Builds the image tower of a SiglipModel or SiglipVisionModel.

    Args:
        folder: Folder with config.json and model.safetensors.
        image_size: As of `load_siglip`.

    Returns:
        A built `VisionEncoder` with pooling "map", or "gap" of a model
        without attention pooling.

    Raises:
        ValueError: As `load_siglip`.
    """
    torch_layout.check_installed()
    config = _read_config(folder)
    if not is_siglip(folder):
        raise ValueError(
            "A folder of transformers' SigLIP has the model_type 'siglip' or "
            "'siglip_vision_model' in config.json. Received: "
            f"{folder} with {config.get('model_type')!r}"
        )
    if config["model_type"] == "siglip":
        config = config.get("vision_config") or {}
    encoder = _encoder(config, folder, image_size)
    encoder.build()
    tensors = {
        name: tensor
        for name, tensor in _tensors(folder).items()
        if not name.startswith(("text_model.", "logit_"))
    }
    named = torch_layout.named_variables(encoder, _vision_layers(encoder))
    _load(named, tensors, encoder, folder)
    return encoder


def _read_config(folder):
    path = os.path.join(folder, _CONFIG)
    try:
        config = json.loads(files.read_text(path))
    except (OSError, ValueError) as error:
        raise ValueError(
            "A folder of transformers must have a config.json. Received: "
            f"{folder} ({error})"
        ) from error
    return config if isinstance(config, dict) else {}


def _read_sizes(config, defaults, folder):
    """The sizes of a tower; raises ValueError if it computes otherwise."""
    for name, value in _COMPUTATION.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"A SigLIP tower must have {name}={value!r}. Received: "
                f"{name}={config[name]!r} in {folder}/{_CONFIG}"
            )
    return {name: config.get(name, value) for name, value in defaults.items()}


def _arguments(sizes):
    """Arguments of an encoder."""
    return {
        "hidden_dim": sizes["hidden_size"],
        "num_layers": sizes["num_hidden_layers"],
        "num_heads": sizes["num_attention_heads"],
        "mlp_dim": sizes["intermediate_size"],
    }


def _encoder(config, folder, image_size):
    sizes = _read_sizes(config, _VISION_SIZES, folder)
    return VisionEncoder(
        patch_size=height_width("patch_size", sizes["patch_size"]),
        image_size=height_width(
            "image_size", image_size or sizes["image_size"]
        ),
        pooling="map" if config.get("vision_use_head", True) else "gap",
        **_arguments(sizes),
        name="vision_encoder",
    )


def _tensors(folder):
    """All tensors, the image tower's below `vision_model.` in any case."""
    tensors = torch_layout.read_tensors(folder)
    # Buffers of transformers before 4.32.
    tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith(".position_ids")
    }
    if any(name.startswith("vision_model.") for name in tensors):
        return tensors
    return {f"vision_model.{name}": t for name, t in tensors.items()}


def _load(named, tensors, encoder, folder):
    """Assigns tensors after a check of all names and shapes."""
    table = tensors.get(_VISION_POSITIONS)
    patches = encoder.grid[0] * encoder.grid[1]
    if table is not None and table.ndim == 2 and len(table) != patches:
        table = resample_positions(
            table[None], encoder.grid, square_grid(len(table))
        )
        tensors = {**tensors, _VISION_POSITIONS: table[0]}
    expected = {
        name: tensor.shape
        for name, tensor in torch_layout.tensors(named).items()
    }
    check_arrays(expected, tensors, folder, "transformers' SigLIP")
    torch_layout.assign(named, tensors)
