"""Weights of a model by name, under any Keras backend."""

import os

import numpy as np
from keras import ops


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
