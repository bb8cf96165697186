"""Arrays of a JAX training checkpoint, read without JAX.

    arrays = read_params("cappa-large/1460000/default")

Orbax writes arrays that are sharded over devices with TensorStore (OCDBT) and
replicated ones into a msgpack file, in which the others are placeholders. With
one device everything may be in either. Reference: orbax-checkpoint
`PyTreeCheckpointHandler`, flax/serialization.py.
"""

import ast
import json
import os

import ml_dtypes
import numpy as np

from cappa_tf.utils import files
from cappa_tf.utils.arguments import check_extra

_EXTRA = "clip_jax"
_MSGPACK = "checkpoint"
_METADATA = "_METADATA"
_OCDBT = "manifest.ocdbt"
_PLACEHOLDER = "PLACEHOLDER://"
_PARAMS = "params"
_CHUNKED = "__msgpack_chunked_array__"
_NDARRAY, _COMPLEX, _SCALAR = 1, 2, 3  # flax's msgpack extension types


def find_step(folder):
    """The folder of a checkpoint's arrays.

    Args:
        folder: That folder itself, the folder of a step (which holds
            `default`), or that of a training (whose steps are folders with
            numbers as names; the last complete one is chosen).

    Returns:
        A path.

    Raises:
        ValueError: If there is none.
    """
    folder = os.fspath(folder)
    tried = [folder, os.path.join(folder, "default")]
    steps = files.listdir(folder) if files.isdir(folder) else []
    steps = [name.rstrip("/") for name in steps]
    numbers = sorted((int(s), s) for s in steps if s.isascii() and s.isdigit())
    for _, name in reversed(numbers):
        tried += [os.path.join(folder, name, "default")]
        tried += [os.path.join(folder, name)]
    for path in tried:
        if any(
            files.isfile(os.path.join(path, name))
            for name in (_METADATA, _MSGPACK)
        ):
            return path
    raise ValueError(
        "A checkpoint of JAX must be a folder with the file "
        f"{_METADATA} or {_MSGPACK}, below {{step}}/default. Received: "
        f"{folder}, which holds {sorted(steps) or 'nothing'}"
    )


def read_params(folder):
    """Reads the parameters of a checkpoint; optimizer state is left out.

    Args:
        folder: From `find_step`.

    Returns:
        Dict from name ("vision/embeddings/registers/value") to float32 array.

    Raises:
        ValueError: If files are missing or are not a checkpoint's.
        ImportError: If msgpack or tensorstore is needed and not installed.
    """
    in_msgpack = _read_msgpack(os.path.join(folder, _MSGPACK))
    names = set(in_msgpack)
    names |= _names_in_metadata(os.path.join(folder, _METADATA))
    if not names:
        raise ValueError(
            f"A checkpoint must have arrays below {_PARAMS}/. Received: "
            f"{folder}"
        )
    arrays = {
        name: value
        for name, value in in_msgpack.items()
        if not isinstance(value, str)
    }
    sharded = sorted(names - arrays.keys())
    if sharded:
        arrays.update(_read_ocdbt(folder, sharded))
    return {
        name[len(_PARAMS) + 1 :]: np.asarray(value, np.float32)
        for name, value in arrays.items()
    }


def _read_msgpack(path):
    """Dict from "params/..." to an array, or the string of a placeholder."""
    if not files.isfile(path):
        return {}
    check_extra("A checkpoint of JAX", _EXTRA, "msgpack")
    import msgpack

    try:
        tree = msgpack.unpackb(
            files.read_bytes(path),
            raw=False,
            strict_map_key=False,
            ext_hook=_extension,
        )
        if not isinstance(tree, dict):
            raise ValueError(f"it holds a {type(tree).__name__}")
        return dict(_flat(tree.get(_PARAMS, {}), _PARAMS))
    # msgpack passes on ValueError, TypeError and classes of its own.
    except Exception as error:
        raise ValueError(
            f"{path} must be a msgpack file of flax. Received: "
            f"{type(error).__name__}: {error}"
        ) from error


def _extension(code, data):
    """An array of flax: its shape, name of the type and bytes."""
    import msgpack

    if code not in (_NDARRAY, _SCALAR):
        raise ValueError(f"an entry of the unknown type {code}")
    shape, name, buffer = msgpack.unpackb(data, raw=False)
    return np.frombuffer(buffer, _dtype(name)).reshape(shape)


def _dtype(name):
    """The type of weights by its name."""
    if name == "bfloat16":
        return np.dtype(ml_dtypes.bfloat16)
    if np.dtype(name).kind not in "fiu":
        raise ValueError(f"an array of type {name}")
    return np.dtype(name)


def _flat(tree, prefix):
    for name, value in tree.items():
        path = f"{prefix}/{name}"
        if not isinstance(value, dict):
            yield path, value
        elif _CHUNKED in value:
            parts = [
                value["chunks"][str(i)] for i in range(len(value["chunks"]))
            ]
            shape = [value["shape"][str(i)] for i in range(len(value["shape"]))]
            yield path, np.concatenate(parts).reshape(shape)
        else:
            yield from _flat(value, path)


def _metadata(path):
    """The content of _METADATA; {} without such a file."""
    if not files.isfile(path):
        return {}
    try:
        content = json.loads(files.read_text(path))
        if not isinstance(content["tree_metadata"], dict):
            raise ValueError("`tree_metadata` is not an object")
        return content
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must be Orbax' description of a checkpoint, a JSON "
            f"object with `tree_metadata`. Received: {error!r}"
        ) from error


def _names_in_metadata(path):
    """Names "params/..." of all arrays, whichever file they are in."""
    names = set()
    for key in _metadata(path).get("tree_metadata", ()):
        try:
            keys = [str(part) for part in ast.literal_eval(key)]
        except (ValueError, SyntaxError) as error:
            raise ValueError(
                f"The names in {path} must be tuples. Received: {key}"
            ) from error
        if keys[0] == _PARAMS:
            names.add("/".join(keys))
    return names


def _read_ocdbt(folder, names):
    """Dict from name to array, as TensorStore keeps them."""
    if not files.isfile(os.path.join(folder, _OCDBT)):
        raise ValueError(
            f"The checkpoint {folder} is incomplete: it has no {_OCDBT}, which "
            f"holds {len(names)} arrays. Received: {names[0]} and others"
        )
    check_extra("A sharded checkpoint of JAX", _EXTRA, "tensorstore")
    import tensorstore

    zarr3 = _metadata(os.path.join(folder, _METADATA)).get("use_zarr3", False)
    base = os.path.join(files.absolute(folder), "")
    if not files.is_remote(base):
        base = {"driver": "file", "path": base}

    def opened(name):
        store = {
            "driver": "ocdbt",
            "base": base,
            "path": name.replace("/", ".") + "/",
        }
        spec = {"driver": "zarr3" if zarr3 else "zarr", "kvstore": store}
        return tensorstore.open(spec, open=True, read=True)

    # All are opened at once and read one after the other, as float32.
    pending = {name: opened(name) for name in names}
    arrays = {}
    for name, future in pending.items():
        try:
            arrays[name] = future.result().read().result().astype(np.float32)
        # TensorStore passes on ValueError and others, each with a long trace.
        except Exception as error:
            reason = str(error).partition("[")[0].strip()
            raise ValueError(
                f"The array {name} of the checkpoint {folder} cannot be read: "
                f"{reason}. Is the folder complete?"
            ) from error
    return arrays
