"""The folder of a run: all a captioner needs, without any configuration.

captioner.json       the model's constructor arguments (Keras)
tokenizer.model      its vocabulary
preprocessing.json   how pictures and captions become its input
checkpoints/ best/   see checkpoints.py
captioner.keras      the model at the end of the run
"""

import json
import os
import tempfile
import zipfile

import keras
import tensorflow as tf

from cappa_tf.data.tokenizer import Tokenizer

# Keras finds the classes of a saved model by their registered names.
from cappa_tf.models import captioner, text_decoder, vision_encoder  # noqa: F401
from cappa_tf.saving.checkpoints import restore_model

# Arguments of `Tokenizer` and of `CaptionDataset` that decide what the model
# is given in evaluation.
_CAPTION = ("max_length", "lowercase", "sticky_eos")
PICTURE = (
    "image_size",
    "resize",
    "resize_small",
    "antialias",
    "reduced_decode",
    "max_pixels",
)


def open_workdir(path):
    """Creates the folder of a run and makes sure files can be written to it.

    Raises:
        ValueError: If they cannot.
    """
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0")
    except OSError as error:
        raise ValueError(
            "`workdir` must be a folder that can be written to. Received: "
            f"workdir={path!r} ({error})"
        ) from error
    return path


def describe_run(workdir, model, data):
    """Writes what makes the folder complete in itself.

    Args:
        workdir: The run's folder.
        model: The `Task` that is trained.
        data: Its data set; where it has a tokenizer, that and the evaluation
            preprocessing are kept.

    Raises:
        ValueError: If the folder holds a run with another vocabulary.
    """
    serialized = keras.saving.serialize_keras_object(model)
    if getattr(data, "tokenizer", None) is None:
        write_json(os.path.join(workdir, "captioner.json"), serialized)
        return
    _keep_vocabulary(workdir, data.tokenizer.path)
    write_json(os.path.join(workdir, "captioner.json"), serialized)
    write_json(
        os.path.join(workdir, "preprocessing.json"),
        {
            "tokenizer": {n: getattr(data.tokenizer, n) for n in _CAPTION},
            "image": {n: getattr(data, n) for n in PICTURE},
        },
    )


def _keep_vocabulary(workdir, path):
    with open(path, "rb") as file:
        vocabulary = file.read()
    kept = os.path.join(workdir, "tokenizer.model")
    if os.path.exists(kept):
        with open(kept, "rb") as file:
            if file.read() != vocabulary:
                raise ValueError(
                    f"The run in {workdir} was started with another "
                    f"vocabulary: {kept} differs from {path}. Choose another "
                    "workdir, or set TOKENIZER (Tokenizer.path) to that file."
                )
        return
    write_file(kept, vocabulary)


def save_captioner(workdir, model):
    """Writes `captioner.keras` (atomically) and returns its path."""
    path = os.path.join(workdir, "captioner.keras")
    unfinished = os.path.join(workdir, "captioner.incomplete.keras")
    model.save(unfinished)
    os.replace(unfinished, path)
    return path


def load_captioner(path, weights="auto"):
    """Loads a captioner from the folder of a run, without its configuration.

    Args:
        path: Folder of a run, or a file that `captioner.save` wrote.
        weights: "final" (captioner.keras), "best" (by validation), "latest"
            (newest checkpoint), or "auto": the first of these that is there.

    Returns:
        The captioner, built.

    Raises:
        ValueError: If there is no such thing at `path`, or it cannot be read.
    """
    model = load_model(path, weights)
    if not isinstance(model, captioner.Captioner):
        raise ValueError(
            "`path` must hold a captioner, for which a vision encoder is not "
            f"enough. Received: {str(path)!r}"
        )
    return model


def load_model(path, weights="auto"):
    """Loads a captioner as `load_captioner`, or a file of a vision encoder."""
    choices = ("auto", "final", "best", "latest")
    if weights not in choices:
        raise ValueError(
            f"`weights` must be one of {choices}. Received: {weights!r}"
        )
    if os.path.isfile(path):
        return _read_keras(path)
    final = os.path.join(path, "captioner.keras")
    if weights in ("auto", "final") and os.path.exists(final):
        return _read_keras(final)
    folders = {"auto": ("best", "checkpoints"), "best": ("best",)}
    for folder in folders.get(weights, ("checkpoints",)):
        latest = tf.train.latest_checkpoint(os.path.join(path, folder))
        if latest and weights != "final":
            return _restored(path, latest)
    raise ValueError(
        "`path` must be the folder of a run (with captioner.keras, best/ or "
        f"checkpoints/) or a .keras file. Received: {path!r} with "
        f"weights={weights!r}"
    )


def _read_keras(path):
    known = (captioner.Captioner, vision_encoder.VisionEncoder)
    if not zipfile.is_zipfile(path):  # Keras says that there is no file.
        raise ValueError(
            "A model file must be one that Keras has saved whole. Received: "
            f"{str(path)!r}, which is not a .keras archive or is cut"
        )
    try:
        model = keras.saving.load_model(path, compile=False)
    # Keras raises what zipfile, json, h5py and the constructors do.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            "A model file must be one that Keras has saved whole. Received: "
            f"{str(path)!r} ({type(error).__name__}: {reason})"
        ) from error
    if not isinstance(model, known):
        raise ValueError(
            "A model file must hold a captioner or a vision encoder. "
            f"Received: {str(path)!r}, which holds a {type(model).__name__}"
        )
    return model


def _restored(workdir, checkpoint):
    path = os.path.join(workdir, "captioner.json")
    model = keras.saving.deserialize_keras_object(_read_json(path))
    if not model.built:
        model.build()
    try:
        restore_model(checkpoint, model)
    # The reader of a cut file raises IndexError.
    except (tf.errors.OpError, IndexError) as error:
        raise ValueError(
            f"A checkpoint must be whole. Received: {checkpoint} ({error})"
        ) from error
    return model


def _read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except ValueError as error:
        raise ValueError(
            f"A file of a run must be JSON. Received: {path} ({error})"
        ) from error


def load_preprocessing(workdir):
    """How a run's pictures and captions were prepared.

    Returns:
        (tokenizer, image), a `Tokenizer` on the run's own vocabulary and a
        dict of the arguments of `CaptionDataset` that decide how pictures
        are prepared in evaluation.

    Raises:
        ValueError: If the folder is not that of a run.
    """
    path = os.path.join(workdir, "preprocessing.json")
    try:
        saved = _read_json(path)
    except OSError as error:
        raise ValueError(
            "`workdir` must be the folder of a run, with preprocessing.json "
            f"and tokenizer.model. Received: {workdir!r} ({error})"
        ) from error
    vocabulary = os.path.join(workdir, "tokenizer.model")
    # Runs older than the option were trained on full decodes.
    image = {"reduced_decode": False, **saved["image"]}
    return Tokenizer(vocabulary, **saved["tokenizer"]), image


def write_json(path, value):
    """Writes JSON atomically, indented; refuses NaN, which is no JSON."""
    text = json.dumps(value, indent=2, allow_nan=False)
    write_file(path, text.encode() + b"\n")


def write_file(path, content):
    """Writes bytes under a temporary name, then renames."""
    unfinished = f"{path}.incomplete"
    with open(unfinished, "wb") as file:
        file.write(content)
    os.replace(unfinished, path)
