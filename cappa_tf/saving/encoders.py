"""Vision encoders from any supported source, as frozen or initial ones.

    encoder = open_encoder("runs/mine", image_size=384)
    encoder = open_encoder("siglip-base-patch16-224")        # transformers
    encoder = open_encoder("convnext.keras", value_range=(0, 255))

In a gin file it is a model's `vision_encoder`, see gin/transfer/.
"""

import functools
import json
import os

import keras
import numpy as np

from cappa_tf.models.encoder_adapter import EncoderAdapter
from cappa_tf.models.task import Task
from cappa_tf.models.vision_encoder import VisionEncoder
from cappa_tf.saving import (
    big_vision,
    clip_jax,
    preset_folder,
    run_folder,
    siglip,
)
from cappa_tf.saving.weights import rebuilt
from cappa_tf.utils import files
from cappa_tf.utils.arguments import check_choice

_HUB_CONFIG = "config.json"
# Attributes by which KerasHub's models with text have their image tower.
_IMAGE_TOWERS = ("vision_encoder", "vit_encoder", "image_encoder")


def open_encoder(
    path: str | os.PathLike,
    image_size: int | tuple | list | None = None,
    pooling: str | None = None,
    *,
    weights="auto",
    dropout=0.0,
    patch_dropout=0.0,
    stochastic_depth=0.0,
    remat=False,
    output: str | None = None,
    prefix_tokens: int | None = None,
    value_range: tuple | list | None = None,
    mean: float | tuple | list | None = None,
    std: float | tuple | list | None = None,
    num_heads: int | None = None,
):
    """Opens a vision encoder with its weights.

    It computes in Keras' current dtype policy (but a model of another library
    in its own).

    Args:
        path: Folder of a run; a preset (its folder, `hf://user/name` or the
            name of one in this package); `.keras` file of a task, of a vision
            encoder, of a backbone of KerasHub or of any Keras vision model;
            npz file of big_vision; folder of transformers' SigLIP, also of
            the image tower alone; or folder of a KerasHub preset.
        image_size: Side of the images in pixels, or (height, width); None for
            that of the file. Learned positions of our encoders and SigLIP's
            are resampled; a model of another library must take this size.
        pooling: As of `VisionEncoder`, None for that of the file. The weights
            of "map" are new if the file has none.
        weights: Weights of a run, as in `run_folder.load_model`; or "random"
            for new weights in an encoder of the same architecture, which is
            the baseline of a study.
        dropout: As of `VisionEncoder`, as are the next three.
        patch_dropout: Fraction of the patches left out in training.
        stochastic_depth: Fraction of the examples that skip the last block.
        remat: Whether to recompute activations.
        output: As of `EncoderAdapter`, as are the next ones: for a model of
            another library only. None for what its files say, or for the
            defaults of `EncoderAdapter`.
        prefix_tokens: Tokens before the patches.
        value_range: The model's values for black and white.
        mean: Subtracted from them.
        std: What the difference is divided by.
        num_heads: Attention heads of a new "map".

    Returns:
        A built `VisionEncoder` or `EncoderAdapter`.

    Raises:
        ValueError: If there is no such encoder at `path`, it cannot be read,
            or an argument does not fit it.
    """
    check_choice(("auto", "final", "best", "latest", "random"), weights=weights)
    random = weights == "random"
    try:
        path = preset_folder.locate(path)
        found, described = _open(
            path, "auto" if random else weights, image_size
        )
    except (ValueError, OSError) as error:
        raise ValueError(
            f"ENCODER (`path` of open_encoder) cannot be opened: {error}"
        ) from error
    foreign = {
        "output": output,
        "prefix_tokens": prefix_tokens,
        "value_range": value_range,
        "mean": mean,
        "std": std,
        "num_heads": num_heads,
    }
    own = {
        "dropout": dropout,
        "patch_dropout": patch_dropout,
        "stochastic_depth": stochastic_depth,
        "remat": remat,
    }
    foreign = {name: x for name, x in foreign.items() if x is not None}
    changes = {"image_size": image_size, "pooling": pooling}
    changes = {name: x for name, x in changes.items() if x is not None}
    if isinstance(found, VisionEncoder):
        _refuse(foreign, path, "a vision encoder of this project")
        return _own(found, {**own, **changes}, random)
    own = {name: x for name, x in own.items() if x}
    _refuse(own, path, "a model of another library")
    return _foreign(found, {**described, **foreign, **changes}, random)


@functools.cache
def image_size(path: str | os.PathLike):
    """(height, width) of the images of the encoder at `path`.

    For gin files, where the data has the size of an encoder that is given.

    Args:
        path: As of `open_encoder`.

    Raises:
        ValueError: As `open_encoder`, or the encoder takes any size.
    """
    return tuple(open_encoder(path).image_size)


def _refuse(arguments, path, what):
    """Raises ValueError if arguments are given that such a model has not."""
    if arguments:
        raise ValueError(
            f"{', '.join(arguments)} cannot be set for {what}. Received: "
            f"{', '.join(f'{k}={v!r}' for k, v in arguments.items())} for "
            f"{path}"
        )


def _own(found, changes, random):
    """A `VisionEncoder` for another task; without a head of version 0.1.0."""
    changes = {
        **changes,
        "name": "vision_encoder",
        "trainable": True,
        "dtype": keras.config.dtype_policy(),
        "rep_size": None,
        "num_classes": None,
    }
    if not random:
        return rebuilt(found, **changes)
    encoder = type(found).from_config({**found.get_config(), **changes})
    encoder.build()
    return encoder


def _foreign(found, arguments, random):
    """An `EncoderAdapter` of a model, or another one of an adapter."""
    pool = None
    if isinstance(found, EncoderAdapter):
        config = found.get_config()
        for name in ("name", "trainable", "dtype", "model"):
            del config[name]
        if not random and "map" == config["pooling"] == arguments.get(
            "pooling", "map"
        ):
            pool = found.pooling_weights()
        found, arguments = found.model, {**config, **arguments}
    if random:
        found = type(found).from_config(found.get_config())
    encoder = EncoderAdapter(found, **arguments, name="vision_encoder")
    encoder.build()
    if pool is not None:
        encoder.set_pooling_weights(pool)
    return encoder


def _open(path, weights, image_size):
    """(the model at `path`, arguments of an adapter that its files tell)."""
    if path.endswith(".npz"):
        return _encoder(big_vision.load_vision_encoder(path, image_size), path)
    if clip_jax.is_clip_jax(path):
        return _encoder(clip_jax.load_captioner(path), path)
    if siglip.is_siglip(path):
        return siglip.load_siglip_vision(path), {}
    if _is_hub(path):
        return _open_hub(path)
    if files.isfile(path):
        return _encoder(run_folder.read_keras(path), path)
    return _encoder(run_folder.load_model(path, weights), path)


def _encoder(model, path):
    """(the vision encoder of a model or a model, arguments of its adapter)."""
    if isinstance(model, Task):
        if "vision_encoder" not in model.parts:
            raise ValueError(
                "A run must have a vision encoder. Received: "
                f"{path}, a {type(model).__name__} of {list(model.parts)}"
            )
        return model.parts["vision_encoder"], {}
    if isinstance(model, VisionEncoder | EncoderAdapter):
        return model, {}
    return _image_tower(model)


def _image_tower(model):
    """(a Keras model or its image tower, arguments of its adapter)."""
    for name in _IMAGE_TOWERS:
        if isinstance(tower := getattr(model, name, None), keras.Model):
            model = tower
            break
    patch, inputs = getattr(model, "patch_size", None), model.inputs
    if not isinstance(patch, int) or None in inputs[0].shape[1:3]:
        return model, {}
    height, width = inputs[0].shape[1:3]
    patches = (height // patch) * (width // patch)
    # The last layer of patches, if the model itself gives one vector.
    for layer in reversed(model.layers):
        shape = getattr(layer.output, "shape", ())
        if len(shape) == 3 and (shape[1] or 0) >= patches:
            break
    else:
        return model, {}
    if layer.output is not model.output:
        own = tuple(model.output_shape) == (None, shape[2])
        return model, {
            "output": layer.name,
            "pooling": "own" if own else "gap",
        }
    # Tokens that are not patches precede them.
    prefix = EncoderAdapter(model).output_shapes()["encoded"][0] - patches
    if prefix == 0:
        return model, {}
    return model, {"prefix_tokens": prefix, "pooling": "tok"}


def _is_hub(path):
    """Whether a path is the folder of a preset of KerasHub."""
    config = os.path.join(path, _HUB_CONFIG)
    if not files.isdir(path) or not files.exists(config):
        return False
    try:
        found = json.loads(files.read_text(config))
    except ValueError:
        return False
    return "keras_hub" in str(found.get("registered_name"))


def _open_hub(path):
    """The backbone of a preset, and what its preprocessing says."""
    from keras_nlp import models  # KerasHub; takes seconds.

    try:
        backbone = models.Backbone.from_preset(
            path, dtype=keras.config.dtype_policy().name
        )
    # KerasHub passes on any error of h5py, json and constructors.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            "A preset of KerasHub must be complete. Received: "
            f"{path} ({type(error).__name__}: {reason})"
        ) from error
    model, arguments = _image_tower(backbone)
    return model, {**arguments, **_hub_range(path)}


def _hub_range(path):
    """Value range of a preset's images, from its image converter."""
    converter = os.path.join(path, "image_converter.json")
    if not files.exists(converter):
        return {}
    config = json.loads(files.read_text(converter)).get("config", {})
    scale, offset = config.get("scale"), config.get("offset")
    scale = np.array(1.0 if scale is None else scale, np.float64)
    offset = np.array(0.0 if offset is None else offset, np.float64)
    # x * scale + offset for x in [0, 255]
    scale, offset = np.broadcast_arrays(scale, offset)
    three = np.broadcast_to((-offset / scale).reshape(-1), 3)
    return {
        "value_range": (0.0, 255.0),
        "mean": tuple(three.tolist()),
        "std": tuple(np.broadcast_to((1.0 / scale).reshape(-1), 3).tolist()),
    }
