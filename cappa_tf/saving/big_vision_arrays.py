"""Reading and writing of big_vision's files, including old formats.

P: patches.  D: width.
"""

import collections.abc
import os
import re
import zipfile

import numpy as np
import tensorflow as tf

from cappa_tf.models.positions import side
from cappa_tf.utils import files

_BFLOAT16 = tf.bfloat16.as_numpy_dtype


def read_arrays(path_or_arrays):
    """Reads all weights of a checkpoint.

    Args:
        path_or_arrays: Path of an npz file, local or remote, or a mapping from
            name to array, which may be nested as in flax.

    Returns:
        Dict from name to float32 array, without the prefix `params/` or
        `opt/target/`. If one of these is present, only the arrays below it are
        weights; the others (optimizer state, counters) are left out.

    Raises:
        ValueError: If the file is not an npz or an array is not numeric.
    """
    if isinstance(path_or_arrays, collections.abc.Mapping):
        arrays = dict(_flatten(path_or_arrays))
    else:
        arrays = _read_npz(os.fspath(path_or_arrays))
    for prefix in ("params/", "opt/target/"):
        if any(name.startswith(prefix) for name in arrays):
            arrays = below(arrays, prefix)
            break
    return {name: _float32(name, value) for name, value in arrays.items()}


def below(arrays, prefix):
    """The arrays whose names start with `prefix`, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in arrays.items()
        if name.startswith(prefix)
    }


def _flatten(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, collections.abc.Mapping):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", np.asarray(value)


def _read_npz(path):
    try:
        with files.on_disk(path) as local:
            loaded = np.load(local, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                raise ValueError("it holds a single array without a name")
            with loaded:
                arrays = dict(loaded)
        # Any zip file can be opened; entries other than arrays come as bytes.
        others = [n for n, v in arrays.items() if isinstance(v, bytes)]
        if others:
            raise ValueError(f"it is a zip file with {others}")
        return arrays
    except FileNotFoundError as error:
        raise ValueError(f"There is no file {path}.") from error
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            "Weights of big_vision must be an npz file. Received: "
            f"{path} ({error})"
        ) from error


def _float32(name, value):
    if value.dtype.kind == "V" and value.itemsize == 2:
        value = value.view(_BFLOAT16)  # NumPy saves it as raw bytes.
    if value.dtype.kind not in "fiu" and value.dtype != _BFLOAT16:
        raise ValueError(
            "Weights must be numbers. "
            f"Received: {name} of type {value.dtype}, shape {value.shape}"
        )
    return value.astype(np.float32)


def write_npz(path, arrays):
    """Writes arrays, sorted by name, to an npz file, atomically."""
    with files.replacing(path) as unfinished, open(unfinished, "wb") as file:
        np.savez(file, **{name: arrays[name] for name in sorted(arrays)})


def modernise(arrays, patches=None):
    """Converts the arrays of encoders from before 2022 to the current form.

    Args:
        arrays: Dict of an encoder's arrays by name.
        patches: Number of patches of the encoder to build, or None. It
            distinguishes a 2 x 5 grid from a 3 x 3 grid with a class token.

    Returns:
        Dict of arrays by their current names.

    Reference: big_vision models/vit.py `fix_old_checkpoints`.
    """
    renamed = {_modern_name(name): array for name, array in arrays.items()}
    table, token = renamed.get("pos_embedding"), renamed.get("cls")
    if table is None or token is None or table.ndim != 3:
        return renamed
    # The class token once had a position; only the sum of the two matters.
    count = table.shape[1]
    if count != patches and side(count) is None and side(count - 1):
        renamed["cls"] = token + table[:, :1]
        renamed["pos_embedding"] = table[:, 1:]
    return renamed


def modernise_text(arrays):
    """Converts the arrays of an old text tower to the current form.

    Args:
        arrays: Dict of a text tower's arrays by name, as below `txt/`.

    Returns:
        Dict of arrays by their current names.

    Reference: big_vision models/proj/image_text/text_transformer.py `load`.
    """
    renamed = {_modern_name(name): array for name, array in arrays.items()}
    # Positions were once added twice, by the tower and by its encoder.
    second = renamed.get("Encoder_0/pos_embedding")
    first = renamed.get("pos_embedding")
    if first is not None and getattr(second, "shape", ()) == first.shape:
        del renamed["Encoder_0/pos_embedding"]
        renamed["pos_embedding"] = first + second
    return renamed


def _modern_name(name):
    name = re.sub(
        r"^Transformer/(posembed_input/)?pos_embedding$", "pos_embedding", name
    )
    # A MAP head that was part of the encoder instead of a module of its own.
    head = (
        r"^(?=probe$|MlpBlock_0/|MultiHeadDotProductAttention_0/|LayerNorm_0/)"
    )
    name = re.sub(head, "MAPHead_0/", name)
    # Modules of a block were once numbered across all classes.
    for old, new in (
        ("MultiHeadDotProductAttention_1", "MultiHeadDotProductAttention_0"),
        ("LayerNorm_2", "LayerNorm_1"),
        ("MlpBlock_3", "MlpBlock_0"),
    ):
        name = re.sub(rf"(/encoderblock(_\d+)?/){old}/", rf"\1{new}/", name)
    return name
