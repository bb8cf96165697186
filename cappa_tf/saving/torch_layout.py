"""Weights in PyTorch's layout, and their files.

PyTorch stores the outputs of a dense layer first and the heads of an attention
concatenated. Files are read and written with NumPy, without PyTorch.

Abbreviations for dimensions:
    h, w: height, width of a patch.  P: positions.  D: width.  H: heads.
    C: width of one head, D / H.     I, O: inputs, outputs of a dense layer.
"""

import collections
import json
import os

import numpy as np

from cappa_tf.saving.weights import to_numpy, variables_by_path
from cappa_tf.utils import files
from cappa_tf.utils.arguments import check_extra

FILE = "model.safetensors"

_LEAVES = {
    "kernel": "weight",
    "gamma": "weight",
    "embeddings": "weight",
    "position_embedding": "weight",
    "bias": "bias",
    "beta": "bias",
}


def check_installed():
    """Checks that safetensors is installed, which reads and writes weights.

    Raises:
        ImportError: If it is not; gives the command that installs it.
    """
    check_extra("A folder for PyTorch", "interop", "safetensors")


def named_variables(part, layers):
    """Matches the variables of a model with tensors.

    Args:
        part: A built model.
        layers: Dict from the path of a layer, or of a variable that belongs to
            the model itself, to the name of the layer or tensor in PyTorch. A
            name that ends in "_" takes "weight" or "bias" without a dot. If a
            name repeats, that tensor is the concatenation of ours.

    Returns:
        Dict from the name of a tensor to a list of (path, variable).

    Raises:
        ValueError: If the model has a weight that the table lacks.
    """
    found = collections.defaultdict(list)
    for path, variable in variables_by_path(part).items():
        layer, _, leaf = path.rpartition("/")
        if path in layers:
            name = layers[path]
        elif layer in layers and leaf in _LEAVES:
            prefix = layers[layer]
            dot = "" if prefix.endswith("_") else "."
            name = f"{prefix}{dot}{_LEAVES[leaf]}"
        else:
            raise ValueError(
                "PyTorch's model must have all weights of the model. Received: "
                f"{part.name} with the extra weight {path}"
            )
        found[name].append((path, variable))
    return found


def tensors(named):
    """Dict of arrays in PyTorch's layout, from `named_variables`."""
    return {
        name: np.ascontiguousarray(
            np.concatenate([_to_torch(p, to_numpy(v)) for p, v in some])
        )
        for name, some in named.items()
    }


def assign(named, arrays):
    """Assigns tensors of the right shapes to variables.

    Args:
        named: From `named_variables`.
        arrays: Dict of arrays by the names of `named`.
    """
    for name, some in named.items():
        parts = np.split(arrays[name], len(some))
        for (path, variable), part in zip(some, parts):
            variable.assign(_from_torch(path, part, tuple(variable.shape)))


def _to_torch(path, value):
    """Reshapes to PyTorch's layout."""
    leaf = path.rpartition("/")[2]
    if leaf == "position_embedding":
        return value[0]  # [1, P, D] -> [P, D]
    if leaf in ("bias", "beta", "gamma"):
        return value.reshape(-1)  # [D], or [H, C] -> [D]
    if leaf != "kernel":
        return value
    if value.ndim == 4:
        return value.transpose(3, 2, 0, 1)  # [h, w, 3, D] -> [D, 3, h, w]
    if path.endswith("attention/out/kernel"):
        return value.reshape(-1, value.shape[-1]).T  # [H, C, D] -> [D, D]
    return value.reshape(len(value), -1).T  # [I, O] or [D, H, C] -> [O, I]


def _from_torch(path, value, shape):
    """Reshapes from PyTorch's layout, the inverse of `_to_torch`."""
    if path.endswith("kernel"):
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    return value.reshape(shape)


def write_tensors(folder, arrays):
    """Writes `model.safetensors`.

    Args:
        folder: Existing folder.
        arrays: Dict of contiguous arrays by name.
    """
    from safetensors.numpy import save

    # transformers requires the framework of the layout. `save_file` would write
    # a file that only its owner can read.
    content = save(arrays, metadata={"format": "pt"})
    files.write_bytes(os.path.join(folder, FILE), content)


def read_tensors(folder):
    """Reads `model.safetensors`, or the parts that an index lists.

    Returns:
        Dict of float32 arrays by name.

    Raises:
        ValueError: If there is no such file, or it is damaged.
    """
    from safetensors import SafetensorError

    names = [FILE]
    index = os.path.join(folder, f"{FILE}.index.json")
    if files.exists(index):
        listed = json.loads(files.read_text(index))["weight_map"]
        names = sorted({*listed.values()})
    arrays = {}
    for name in names:
        path = os.path.join(folder, name)
        try:
            arrays.update(_read_file(path))
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"A folder of transformers must have a complete {name}. "
                f"Received: {path} ({error})"
            ) from error
    return arrays


def _read_file(path):
    from safetensors import safe_open

    with (
        files.on_disk(path) as local,
        safe_open(local, framework="numpy") as file,
    ):
        names = list(file.keys())  # It is not a dict, nor iterable.
        return {n: file.get_tensor(n).astype(np.float32) for n in names}
