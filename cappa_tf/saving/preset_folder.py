"""Preset: a trained model as a folder to pass on, in KerasHub's layout.

config.json          constructor arguments of the vision encoder (Keras)
model.weights.h5     its weights, or model.weights.json and numbered shards
task.json            constructor arguments of the whole model, if it is a task
task.weights.h5      the task's other weights
preprocessor.json    how images become its input
tokenizer.json       how texts do, with assets/tokenizer/vocabulary.spm
metadata.json        versions, the SHA-256 of each file, facts of the training
README.md            the model card, which may be edited

A preset is named by its folder, by `hf://user/name` (also
`hf://user/name@revision`) on the Hugging Face Hub, or by the name of one that
comes with this package. Nothing here needs TensorFlow: an encoder opens under
JAX and PyTorch, too.
"""

import datetime
import json
import os
import pathlib

import h5py
import keras
import numpy as np

import cappa_tf
from cappa_tf.models.encoder_adapter import EncoderAdapter, import_packages
from cappa_tf.models.vision_encoder import VisionEncoder
from cappa_tf.saving import hub, model_card
from cappa_tf.saving.weights import PLAIN
from cappa_tf.utils import files
from cappa_tf.utils.arguments import check_choice

# Raised whenever an older version could not read what is written.
FORMAT = 1
METADATA = "metadata.json"
CARD = "README.md"
_ENCODER, _TASK = "config.json", "task.json"
_PREPROCESSOR, _TOKENIZER = "preprocessor.json", "tokenizer.json"
_VOCABULARY = "assets/tokenizer/vocabulary.spm"
_WEIGHTS, _SHARDS = "model.weights.h5", "model.weights.json"
_TASK_WEIGHTS = "task.weights.h5"
_OURS = "cappa_tf>"
# GB of one file of weights, as in KerasHub.
SHARD_SIZE = 10
DTYPES = ("float32", "float16")
# Presets that come with the package, a folder each.
SHIPPED = pathlib.Path(__file__).resolve().parents[1] / "shipped"


# -- Names ---------------------------------------------------------------------


def shipped():
    """Names of the presets that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{METADATA}"))


def locate(path):
    """The path of a model that may be given by the name of a preset.

    Args:
        path: `hf://user/name`, which is downloaded unless it is in the cache;
            the name of a preset that comes with the package, unless there is
            a file or folder of that name; or any other path.

    Returns:
        A path; any other path is returned as it is.

    Raises:
        ValueError: If the preset cannot be downloaded.
    """
    path = os.fspath(path)
    if path.startswith(hub.SCHEME):
        return hub.download(path)
    if path in shipped() and not files.exists(path):
        return str(SHIPPED / path)
    return path


def is_preset(path):
    """Whether a path is the folder of a preset of this project, or half one."""
    if not files.isdir(path):
        return False
    for name in (_ENCODER, _TASK, METADATA):
        found = _json_if_any(os.path.join(path, name))
        if str(found.get("registered_name")).startswith(_OURS):
            return True
        if "cappa_tf_version" in found:
            return True
    return False


def _json_if_any(path):
    """The JSON object in a file; {} if there is none."""
    try:
        found = json.loads(files.read_text(path))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# -- Writing -------------------------------------------------------------------


def save(
    folder,
    model,
    image,
    tokenizer=None,
    *,
    facts=None,
    dtype="float32",
    license=None,
    max_shard_size=SHARD_SIZE,
    overwrite=False,
):
    """Writes a preset, the whole folder or nothing.

    Args:
        folder: Folder to write.
        model: A built `Task` with a vision encoder, or a vision encoder.
        image: Dict of JSON values, the image preprocessing.
        tokenizer: (Dict of its arguments, path of its vocabulary), or None.
        facts: Dict of `model_card.run_facts`, or None.
        dtype: "float32", or "float16", which halves the files and rounds each
            weight to 11 bits.
        license: Identifier of the licence in the model card, such as
            "apache-2.0"; by default that of the facts, or "unknown".
        max_shard_size: GB of one file of the encoder's weights; if there are
            more, they are written in shards.
        overwrite: Whether to replace an existing preset.

    Raises:
        ValueError: If the folder exists, or float16 cannot hold a weight.
    """
    check_choice(DTYPES, dtype=dtype)
    folder = os.fspath(folder)
    if files.exists(folder) and not (overwrite and is_preset(folder)):
        raise ValueError(
            "`folder` must not exist or, with `overwrite`, hold a preset. "
            f"Received: {folder}, overwrite={overwrite}"
        )
    facts = dict(facts or {})
    if license is not None:
        model_card.check_license(license)
        facts["license"] = license
    # The metadata are written last, so they mark a complete preset.
    with files.replacing_folder(folder, (METADATA,), overwrite) as unfinished:
        os.makedirs(unfinished)
        _write_model(unfinished, model, max_shard_size)
        if dtype == "float16":
            for path in pathlib.Path(unfinished).glob("*.h5"):
                _to_float16(path)
        _write_data(unfinished, image, tokenizer)
        metadata = {
            "keras_version": keras.version(),
            "cappa_tf_version": cappa_tf.__version__,
            "format": FORMAT,
            "parameter_count": model.count_params(),
            "date_saved": datetime.datetime.now().strftime("%Y-%m-%d@%H:%M:%S"),
            "tasks": [type(model).__name__],
            "dtype": dtype,
            "facts": facts,
            "files": _digests(unfinished),
        }
        # Not among the files with a digest: people complete it.
        card = model_card.card(model, facts, image, tokenizer, dtype)
        files.write_text(os.path.join(unfinished, CARD), card)
        files.write_json(os.path.join(unfinished, METADATA), metadata)


def _write_model(folder, model, max_shard_size):
    encoder = _encoder_of(model)
    config = keras.saving.serialize_keras_object(encoder)
    if isinstance(encoder, VisionEncoder):
        # Mixed precision and dropout belong to the run that used them.
        config["config"] |= PLAIN
    files.write_json(os.path.join(folder, _ENCODER), config)
    size = sum(np.prod(v.shape) * 4 for v in encoder.weights) / 2**30
    if max_shard_size is not None and size > max_shard_size:
        keras.saving.save_weights(
            encoder,
            os.path.join(folder, _SHARDS),
            max_shard_size=max_shard_size,
        )
    else:
        keras.saving.save_weights(encoder, os.path.join(folder, _WEIGHTS))
    if model is encoder:
        return
    config = keras.saving.serialize_keras_object(model)
    files.write_json(os.path.join(folder, _TASK), config)
    if _has_other_weights(model, encoder):
        keras.saving.save_weights(
            model,
            os.path.join(folder, _TASK_WEIGHTS),
            objects_to_skip=[encoder],
        )


def _encoder_of(model):
    """The vision encoder of a model, or the model itself if it is one."""
    if isinstance(model, VisionEncoder | EncoderAdapter):
        return model
    encoder = getattr(model, "parts", {}).get("vision_encoder")
    if encoder is None:
        raise ValueError(
            "A preset is a task with a vision encoder, or a vision encoder. "
            f"Received: a {type(model).__name__}"
        )
    return encoder


def _has_other_weights(model, encoder):
    return len(model.weights) > len(encoder.weights)


def _to_float16(path):
    """Rounds the float32 arrays of a file of weights."""
    rounded = path.with_name(f"rounded-{path.name}")
    with h5py.File(path) as source, h5py.File(rounded, "w") as target:

        def copy(name, item):
            if isinstance(item, h5py.Group):
                made = target.require_group(name)
            else:
                made = target.create_dataset(name, data=_rounded(name, item))
            made.attrs.update(item.attrs)

        source.visititems(copy)
        target.attrs.update(source.attrs)
    os.replace(rounded, path)


def _rounded(name, item):
    value = item[()]
    if getattr(value, "dtype", None) != np.float32:
        return value
    with np.errstate(over="ignore"):
        half = value.astype(np.float16)
    if not np.isfinite(half).all():
        raise ValueError(
            "dtype='float16' needs weights below 65,504. Received: "
            f"{np.abs(value).max():g} in {name}"
        )
    return half


def _write_data(folder, image, tokenizer):
    """Writes the preprocessing of images and the vocabulary."""
    content = _object("data.preprocessing", "ImagePreprocessing", image)
    files.write_json(os.path.join(folder, _PREPROCESSOR), content)
    if tokenizer is None:
        return
    arguments, vocabulary = tokenizer
    content = _object("data.tokenizer", "Tokenizer", arguments)
    files.write_json(os.path.join(folder, _TOKENIZER), content)
    vocabulary = files.read_bytes(vocabulary)
    files.write_bytes(os.path.join(folder, _VOCABULARY), vocabulary)


def _object(module, name, config):
    """The form in which Keras describes an object."""
    return {
        "module": f"cappa_tf.{module}",
        "class_name": name,
        "config": config,
        "registered_name": f"{_OURS}{name}",
    }


def _digests(folder):
    paths = sorted(p for p in pathlib.Path(folder).rglob("*") if p.is_file())
    return {
        path.relative_to(folder).as_posix(): files.sha256(path)
        for path in paths
    }


# -- Reading -------------------------------------------------------------------


def check(folder, with_digests=True):
    """Checks that a preset is complete, of a known format and undamaged.

    Args:
        folder: Its folder.
        with_digests: Whether to read all files for their SHA-256.

    Returns:
        The contents of metadata.json.

    Raises:
        ValueError: If it is not; names the file.
    """
    metadata = _json_if_any(os.path.join(folder, METADATA))
    listed = metadata.get("files")
    if not isinstance(listed, dict) or "format" not in metadata:
        raise ValueError(
            f"A preset must have a complete {METADATA}. Received: {folder}, "
            "which has none: was it copied or downloaded in part?"
        )
    if metadata["format"] > FORMAT:
        raise ValueError(
            f"This is cappa_tf {cappa_tf.__version__}, which reads presets up "
            f"to format {FORMAT}: upgrade it (pip install -U cappa-tf). "
            f"Received: {folder} of format {metadata['format']}, written by "
            f"cappa_tf {metadata.get('cappa_tf_version')}"
        )
    missing = [
        name for name in listed if not files.exists(os.path.join(folder, name))
    ]
    if missing:
        raise ValueError(
            f"A preset must have all files that its {METADATA} lists. "
            f"Received: {folder}, which lacks {', '.join(missing)}"
        )
    for name, wanted in listed.items() if with_digests else ():
        found = files.sha256(os.path.join(folder, name))
        if found != wanted:
            raise ValueError(
                "A file of a preset must have the SHA-256 that its "
                f"{METADATA} lists, {wanted}. Received: "
                f"{os.path.join(folder, name)} with {found}: it was changed "
                "or damaged; copy or download it again"
            )
    return metadata


def facts(folder):
    """The facts of the training that the metadata of a preset holds."""
    return check(folder, with_digests=False).get("facts", {})


def load_model(folder):
    """Loads the model of a preset.

    Args:
        folder: Folder of a preset, as `locate` returns.

    Returns:
        The built `Task`, or the vision encoder if there is no task.

    Raises:
        ValueError: If the folder is not complete, a file is damaged or of a
            newer version, or Keras cannot read it.
    """
    with files.folder_on_disk(folder) as local:
        check(local)
        path = os.path.join(local, _TASK)
        if not files.exists(path):
            return _load_encoder(local)
        model = _deserialize(path)
        encoder = _encoder_of(model)
        _load_weights(encoder, local)
        if _has_other_weights(model, encoder):
            weights = os.path.join(local, _TASK_WEIGHTS)
            _read(model, weights, objects_to_skip=[encoder])
        return model


def load_encoder(folder):
    """Loads the vision encoder of a preset, under any Keras backend.

    Args:
        folder: Folder of a preset, as `locate` returns.

    Returns:
        A built `VisionEncoder` or `EncoderAdapter`, without dropout, that
        computes in float32.

    Raises:
        ValueError: As `load_model`.
    """
    with files.folder_on_disk(folder) as local:
        check(local)
        return _load_encoder(local)


def _load_encoder(folder):
    encoder = _deserialize(os.path.join(folder, _ENCODER))
    _load_weights(encoder, folder)
    return encoder


def _deserialize(path):
    text = files.read_text(path)
    import_packages(text)
    try:
        model = keras.saving.deserialize_keras_object(json.loads(text))
    # Keras passes on any error of json and of constructors.
    except Exception as error:
        raise _unreadable(path, error) from error
    if not model.built:
        model.build()
    return model


def _load_weights(encoder, folder):
    path = os.path.join(folder, _WEIGHTS)
    if not files.exists(path):
        path = os.path.join(folder, _SHARDS)
    _read(encoder, path)


def _read(model, path, **options):
    try:
        keras.saving.load_weights(model, path, **options)
    # Keras passes on any error of h5py.
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path, error):
    reason = str(error).strip().partition("\n")[0]
    return ValueError(
        "A file of a preset must be one that this version can read. Received: "
        f"{path} ({type(error).__name__}: {reason})"
    )


def preprocessing(folder):
    """The inputs of a preset's model, as it was trained with them.

    Args:
        folder: Folder of a preset.

    Returns:
        (dict of the image preprocessing, dict of arguments of the tokenizer
        or None).
    """
    check(folder, with_digests=False)
    return tuple(
        _json_if_any(os.path.join(folder, name)).get("config")
        for name in (_PREPROCESSOR, _TOKENIZER)
    )


def vocabulary(folder):
    """Path of the vocabulary of a preset, which may have none."""
    return os.path.join(folder, _VOCABULARY)
