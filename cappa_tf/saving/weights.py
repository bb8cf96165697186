"""Weights of a model by name, under any Keras backend."""

import hashlib
import os

import numpy as np
from keras import ops

from cappa_tf.models.positions import resample_positions
from cappa_tf.utils.arguments import height_width

POSITIONS = "positions/position_embedding"
# Arguments of a `VisionEncoder` to pass on: mixed precision and dropout belong
# to the run that used them.
PLAIN = {
    "dtype": "float32",
    "dropout": 0.0,
    "patch_dropout": 0.0,
    "stochastic_depth": 0.0,
    "remat": False,
}


def variables_by_path(model):
    """Variables of a built model by their path below it.

    Args:
        model: A built Keras model.

    Returns:
        Dict such as {"encoder_block_0/mlp/expand/kernel": variable}.
    """
    prefix = os.path.commonprefix([v.path for v in model.weights])
    prefix = prefix[: prefix.rfind("/") + 1]
    return {v.path.removeprefix(prefix): v for v in model.weights}


def to_numpy(variable):
    """Converts a variable to a float32 NumPy array."""
    return ops.convert_to_numpy(variable).astype(np.float32)


def digest(variables):
    """Hexadecimal SHA-256 of names, shapes and float32 values.

    Args:
        variables: Dict as `variables_by_path` returns it.
    """
    found = hashlib.sha256()
    for name in sorted(variables):
        value = to_numpy(variables[name])
        found.update(f"{name} {value.shape}\n".encode())
        found.update(np.ascontiguousarray(value))
    return found.hexdigest()


def rebuilt(encoder, **changes):
    """Copies an encoder with some arguments changed.

    Args:
        encoder: A built `VisionEncoder`.
        **changes: Arguments of `VisionEncoder` that do not change the shapes
            of weights; `image_size`, for which learned positions are
            resampled; and `pooling`: the weights of "map" are new if the
            encoder pools otherwise.

    Returns:
        A new built `VisionEncoder` with the same weights.

    Raises:
        ValueError: If the encoder lacks weights that it needs otherwise.
    """
    if "image_size" in changes:
        changes["image_size"] = height_width(
            "image_size", changes["image_size"]
        )
    other = type(encoder).from_config({**encoder.get_config(), **changes})
    other.build()
    old = variables_by_path(encoder)
    for name, variable in variables_by_path(other).items():
        if name not in old and name.startswith("pool/"):
            continue
        if name not in old:
            raise ValueError(
                f"An encoder with pooling={encoder.pooling!r} has no {name}. "
                f"Received: pooling={other.pooling!r}"
            )
        value = to_numpy(old[name])
        if name == POSITIONS:
            value = resample_positions(value, other.grid, encoder.grid)
        variable.assign(value)
    return other
