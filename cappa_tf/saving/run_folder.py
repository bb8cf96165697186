"""Folder of a run, from which its model opens without any configuration.

model.json           the model's constructor arguments (Keras)
tokenizer.model      its vocabulary, if it reads texts (or tokenizer.json)
preprocessing.json   how images and captions become its input
checkpoints/ best/   training state and best weights (checkpoints.py)
model.keras          the model at the end of the run

Version 0.1.0 wrote captioner.json and captioner.keras. They are read if the
new files are missing, and deleted once a resumed run has written those, so
that an old file is never taken for the newest weights.
"""

import json
import os
import zipfile

import keras
import tensorflow as tf

from cappa_tf.data.huggingface_tokenizer import HuggingFaceTokenizer
from cappa_tf.data.preprocessing import ImagePreprocessing
from cappa_tf.data.tokenizer import Tokenizer
from cappa_tf.models.encoder_adapter import EncoderAdapter, import_packages
from cappa_tf.models.task import Task
from cappa_tf.models.vision_encoder import VisionEncoder
from cappa_tf.saving import model_card, preset_folder
from cappa_tf.saving.checkpoints import restore_model
from cappa_tf.utils import files


def open_workdir(path):
    """Creates the folder of a run, checks that it is writable, returns it.

    Raises:
        ValueError: If files cannot be written to it.
    """
    try:
        files.check_folder(path)
    except OSError as error:
        raise ValueError(
            "`workdir` must be a folder that can be written to. Received: "
            f"workdir={path!r} ({error})"
        ) from error
    return path


def describe_run(workdir, model, data):
    """Writes the files that make the folder self-contained.

    Args:
        workdir: The run's folder.
        model: A `Task`.
        data: A data set, whose tokenizer (if any) and evaluation preprocessing
            are saved.

    Raises:
        ValueError: If the folder holds a run with another vocabulary.
    """
    serialized = keras.saving.serialize_keras_object(model)
    files.write_json(os.path.join(workdir, "model.json"), serialized)
    _remove_old(workdir, "captioner.json")
    save_preprocessing(workdir, data.tokenizer, data.preprocessing)


def save_preprocessing(workdir, tokenizer, preprocessing):
    """Writes what `load_preprocessing` reads: how inputs are made.

    Args:
        workdir: Folder of a run, or of the file of a model.
        tokenizer: `Tokenizer` or None.
        preprocessing: `ImagePreprocessing` of evaluation.

    Raises:
        ValueError: If the folder has another vocabulary.
    """
    kept = {"image": preprocessing.to_json()}
    if tokenizer is not None:
        _keep_vocabulary(workdir, tokenizer)
        kept["tokenizer"] = caption_arguments(tokenizer)
    files.write_json(os.path.join(workdir, "preprocessing.json"), kept)


def _keep_vocabulary(workdir, tokenizer):
    path = tokenizer.path
    vocabulary = files.read_bytes(path)
    kept = os.path.join(workdir, tokenizer.file_name)
    if not files.exists(kept):
        files.write_bytes(kept, vocabulary)
    elif files.read_bytes(kept) != vocabulary:
        raise ValueError(
            f"The run in {workdir} was started with another vocabulary: "
            f"{kept} differs from {path}. Choose another workdir, or set "
            "TOKENIZER (Tokenizer.path) to that file."
        )


def save_model(workdir, model):
    """Writes `model.keras` (atomically) and returns its path."""
    path = os.path.join(workdir, "model.keras")
    with files.replacing(path) as unfinished:
        model.save(unfinished)
    _remove_old(workdir, "captioner.keras")
    return path


def _remove_old(workdir, name):
    path = os.path.join(workdir, name)
    if files.exists(path):
        files.remove(path)


def _named(workdir, suffix):
    """Path of model.json or model.keras, by the new name or the old one."""
    path = os.path.join(workdir, f"model{suffix}")
    old = os.path.join(workdir, f"captioner{suffix}")
    return old if files.exists(old) and not files.exists(path) else path


def load_model(path, weights="auto"):
    """Loads a model without its configuration.

    Args:
        path: Folder of a run or of a preset, or a `.keras` file of a task
            (such as a captioner) or of a vision encoder.
        weights: "final" (model.keras), "best" (by validation), "latest"
            (newest checkpoint), or "auto", the first of these that exists.

    Returns:
        The built `Task` or `VisionEncoder`.

    Raises:
        ValueError: If there is no such model at `path`, or it cannot be read.
    """
    path = os.fspath(path)
    choices = ("auto", "final", "best", "latest")
    if weights not in choices:
        raise ValueError(
            f"`weights` must be one of {choices}. Received: {weights!r}"
        )
    if files.isfile(path):
        return _read_model(path)
    if preset_folder.is_preset(path):
        if weights not in ("auto", "final"):
            raise ValueError(
                "A preset has one set of weights. Received: "
                f"weights={weights!r} for {path}"
            )
        return preset_folder.load_model(path)
    final = _named(path, ".keras")
    if weights in ("auto", "final") and files.exists(final):
        return _read_model(final)
    folders = {"auto": ("best", "checkpoints"), "best": ("best",)}
    for folder in folders.get(weights, ("checkpoints",)):
        latest = tf.train.latest_checkpoint(os.path.join(path, folder))
        if latest and weights != "final":
            return _restored(path, latest)
    raise ValueError(
        "`path` must be the folder of a run (with model.keras, best/ or "
        "checkpoints/), a preset (a folder, hf://user/name or "
        f"{', '.join(preset_folder.shipped()) or 'none in this package'}) or "
        f"a .keras file. Received: {path!r} with weights={weights!r}"
    )


def _read_model(path):
    model = read_keras(path)
    if not isinstance(model, Task | VisionEncoder | EncoderAdapter):
        raise ValueError(
            "A model file must hold a task, such as a captioner, or a vision "
            "encoder. "
            f"Received: {str(path)!r}, which holds a {type(model).__name__}"
        )
    return model


def read_keras(path):
    """Loads any model that Keras has saved.

    Args:
        path: Path of a `.keras` file.

    Returns:
        The built Keras model.

    Raises:
        ValueError: If the file is truncated, or Keras cannot read it.
    """
    with files.on_disk(path) as local:
        # Keras would say that there is no file.
        if not zipfile.is_zipfile(local):
            raise ValueError(
                "A model file must be a complete file saved by Keras. "
                f"Received: {str(path)!r}, which is not a .keras archive or "
                "is truncated"
            )
        try:
            with zipfile.ZipFile(local) as archive:
                import_packages(archive.read("config.json").decode())
            return keras.saving.load_model(local, compile=False)
        # Keras passes on any error of zipfile, json, h5py and constructors.
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                "A model file must be a complete file saved by Keras. "
                f"Received: {str(path)!r} ({type(error).__name__}: {reason})"
            ) from error


def _restored(workdir, checkpoint):
    path = _named(workdir, ".json")
    model = keras.saving.deserialize_keras_object(_read_json(path))
    if not model.built:
        model.build()
    try:
        restore_model(checkpoint, model)
    # The reader of a truncated file raises IndexError.
    except (tf.errors.OpError, IndexError) as error:
        raise ValueError(
            f"A checkpoint must be complete. Received: {checkpoint} ({error})"
        ) from error
    return model


def _read_json(path):
    try:
        return json.loads(files.read_text(path))
    except ValueError as error:
        raise ValueError(
            f"A file of a run must be JSON. Received: {path} ({error})"
        ) from error


def training_facts(path):
    """Facts about the training of a model, from the files beside it.

    Args:
        path: Folder of a run or of a preset, or a file.

    Returns:
        Dict of `model_card.run_facts`, {} if nothing is known.
    """
    if preset_folder.is_preset(path):
        return preset_folder.facts(path)
    folder = path if files.isdir(path) else os.path.dirname(path)
    return model_card.run_facts(folder)


def caption_arguments(tokenizer):
    """Dict of the arguments of a `Tokenizer` that a model depends on."""
    return {name: getattr(tokenizer, name) for name in tokenizer.settings}


def find_vocabulary(folder):
    """Path of the vocabulary of a run or a preset, which may have none."""
    if preset_folder.is_preset(folder):
        return preset_folder.vocabulary(folder)
    paths = [
        os.path.join(folder, kind.file_name)
        for kind in (Tokenizer, HuggingFaceTokenizer)
    ]
    return next((path for path in paths if files.exists(path)), paths[0])


def _kind(settings):
    """The class of a tokenizer: only Hugging Face's has ids of its own."""
    return HuggingFaceTokenizer if "pad_id" in settings else Tokenizer


def load_preprocessing(workdir):
    """Loads the tokenizer and the image preprocessing of a run or a preset.

    Returns:
        (tokenizer, preprocessing): a `Tokenizer` with the run's vocabulary, or
        None if the model reads no texts, and the `ImagePreprocessing` of its
        evaluation.

    Raises:
        ValueError: If the folder is not that of a run.
    """
    if preset_folder.is_preset(workdir):
        vocabulary = find_vocabulary(workdir)
        image, texts = preset_folder.preprocessing(workdir)
        tokenizer = texts and _kind(texts)(vocabulary, **texts)
        return tokenizer, ImagePreprocessing.from_json(image)
    path = os.path.join(workdir, "preprocessing.json")
    try:
        saved = _read_json(path)
    except OSError as error:
        raise ValueError(
            "`workdir` must be the folder of a run, with preprocessing.json "
            f"and tokenizer.model. Received: {workdir!r} ({error})"
        ) from error
    tokenizer = None
    try:
        image = ImagePreprocessing.from_json(saved["image"])
        if "tokenizer" in saved:
            settings = saved["tokenizer"]
            kind = _kind(settings)
            vocabulary = os.path.join(workdir, kind.file_name)
            tokenizer = kind(vocabulary, **settings)
    except (KeyError, TypeError) as error:
        raise ValueError(
            "A run's preprocessing.json must have `image`, and `tokenizer` if "
            f"the model reads texts. Received: {path} ({error!r})"
        ) from error
    return tokenizer, image
