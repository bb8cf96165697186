"""Published files of visual question answering: VQAv2, GQA and OCR-VQA.

    VQAv2    v2_OpenEnded_mscoco_train2014_questions.json, and beside it
             v2_mscoco_train2014_annotations.json: {"questions": [{"image_id",
             "question", "question_id"}], "data_subtype": "train2014"} and
             {"annotations": [{"question_id", "answers": [{"answer"}, ...],
             "answer_type"}]}; image COCO_train2014_000000000009.jpg
    GQA      train_balanced_questions.json: {number: {"imageId", "question",
             "answer", "types": {"structural"}}}; image images/2370799.jpg
    OCR-VQA  dataset.json: {image: {"questions", "answers", "imageURL", "split"
             (1, 2 or 3)}}; image images/1612436169.jpg

They become the records that `table_rows.py` reads. Images are looked for in
the folders in which the publishers' archives put them, and in the source's.
"""

import json
import os
import re

import tensorflow as tf

from cappa_tf.data import text
from cappa_tf.data.sources import folder_listing
from cappa_tf.data.sources.delimited import NotATableError

# Names of splits in published files and in folders, to ours.
SPLITS = {
    "train": "train",
    "training": "train",
    "restval": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
_OCR_VQA_SPLITS = {1: "train", 2: "validation", 3: "test"}
# The parts of a name by which VQAv2's two files differ.
_PARTS = re.compile(r"openended_|multiplechoice_|questions|annotations", re.I)
# Number of images to look for before a folder is given up.
_TRIED = 20


def is_answers(value):
    """Whether a JSON value is VQAv2's annotations, a part of a table."""
    return _is_list(value, "annotations", "question_id")


def is_published(value):
    """Whether a JSON value is questions, whose split the file names."""
    return (
        is_answers(value)
        or _is_list(value, "questions", "question_id")
        or _is_dict_of(value, "imageId", "question")
        or _is_dict_of(value, "questions", "answers", "imageURL")
    )


def records(value, file, name, root):
    """Returns the records of a published file.

    Args:
        value: Its JSON value, for which `is_published` holds.
        file: Path of the file.
        name: Its name, for messages.
        root: Folder that holds the images, or their folder.

    Returns:
        An iterator of (place, record or error).

    Raises:
        NotATableError: If it is one of VQAv2's two files and the other one is
            not beside it.
    """
    if is_answers(value):
        return _vqav2(_other(file, name, "questions"), value, name, root)
    if _is_list(value, "questions", "question_id"):
        return _vqav2(value, _other(file, name, "annotations"), name, root)
    if _is_dict_of(value, "imageId", "question"):
        return _gqa(value, name, root)
    return _ocr_vqa(value, name, root)


def _is_list(value, name, key):
    """Whether a value is an object with a list of objects that have a key."""
    found = value.get(name) if isinstance(value, dict) else None
    return (
        isinstance(found, list)
        and bool(found)
        and isinstance(found[0], dict)
        and key in found[0]
    )


def _is_dict_of(value, *keys):
    """Whether a value is an object of objects that have some keys."""
    first = next(iter(value.values()), None) if isinstance(value, dict) else 0
    return isinstance(first, dict) and all(key in first for key in keys)


def _other(file, name, what):
    """Reads the other one of VQAv2's two files.

    Args:
        file: Path of the one.
        name: Its name, for messages.
        what: "questions" or "annotations", what the other one holds.
    """
    folder, base = os.path.split(file)
    own = _PARTS.sub("", base).lower()
    fitting = [
        other
        for other in folder_listing.names(folder or ".")
        if other != base
        and what in other.lower()
        and _PARTS.sub("", other).lower() == own
    ]
    if len(fitting) != 1:
        raise NotATableError(
            f"{name}: VQAv2 has questions and annotations in two files, of the "
            f"same name but for these words; there is no such file of {what} "
            f"beside it. Received: {fitting or 'none'}"
        )
    (other,) = fitting
    try:
        with tf.io.gfile.GFile(os.path.join(folder, other), "rb") as stream:
            value = json.loads(text.decode(stream.read(), "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise NotATableError(f"{other}: {error}") from None
    if not _is_list(value, what, "question_id"):
        raise NotATableError(f"{other}: it holds no {what} of VQAv2")
    return value


def _vqav2(questions, annotations, name, root):
    subtype = str(questions.get("data_subtype", "")).replace("-dev", "")
    split = re.match("[a-z]*", subtype).group()
    split = SPLITS.get(split, split) or None
    answers = {
        one["question_id"]: one
        for one in annotations["annotations"]
        if isinstance(one, dict) and "question_id" in one
    }
    questions = questions["questions"]
    # Zero-padded, as in 000000000009.jpg.
    names = [
        pattern
        for coco in (f"COCO_{subtype}_{{:012}}.jpg", "{:012}.jpg")
        for pattern in (f"{subtype}/{coco}", coco, f"images/{coco}")
    ]
    pattern = _pattern(root, names, (_get(q, "image_id") for q in questions))
    for number, question in enumerate(questions, 1):
        place = f"{name}, questions item {number}"
        try:
            own = answers.get(question["question_id"], {})
            record = {
                "image": pattern.format(int(question["image_id"])),
                "question": question["question"],
                "answers": own.get("answers"),
                "type": own.get("answer_type"),
                "split": split,
            }
        except (TypeError, KeyError, ValueError) as error:
            record = ValueError(f"no 'image_id' or 'question' ({error})")
        yield place, record


def _gqa(questions, name, root):
    split = re.match("[a-z]*", os.path.basename(name).lower()).group()
    split = SPLITS.get(split, split) or None
    names = ("images/{}.jpg", "{}.jpg")
    ids = (_get(question, "imageId") for question in questions.values())
    pattern = _pattern(root, names, ids)
    for number, question in questions.items():
        place = f"{name}, question {number}"
        try:
            kinds = question.get("types")
            record = {
                "image": pattern.format(question["imageId"]),
                "question": question["question"],
                "answer": question.get("answer"),
                "type": _get(kinds, "structural"),
                "split": split,
            }
        except (TypeError, KeyError, AttributeError) as error:
            record = ValueError(f"no 'imageId' or 'question' ({error})")
        yield place, record


def _ocr_vqa(images, name, root):
    ids = list(images)[:_TRIED]
    suffixes = {_suffix(images[i]) for i in ids} | {".jpg"}
    folder = next(
        (
            folder
            for folder in ("images", "")
            if any(_exists(root, folder, i + s) for i in ids for s in suffixes)
        ),
        "images",
    )
    for identity, image in images.items():
        place = f"{name}, image {identity}"
        try:
            record = {
                "image": os.path.join(folder, identity + _suffix(image)),
                "questions": image["questions"],
                "answers": image["answers"],
                "split": _OCR_VQA_SPLITS.get(image.get("split")),
            }
        except (TypeError, KeyError) as error:
            record = ValueError(f"no 'questions' or 'answers' ({error})")
        yield place, record


def _suffix(image):
    """The suffix under which OCR-VQA's own script stores an image."""
    return os.path.splitext(str(_get(image, "imageURL")))[1] or ".jpg"


def _pattern(root, patterns, ids):
    """The pattern by which the first images are found; else the first one."""
    for _, identity in zip(range(_TRIED), ids):
        for pattern in patterns:
            try:
                image = pattern.format(identity)
            except (TypeError, ValueError):  # Reported with the record.
                continue
            if _exists(root, image):
                return pattern
    return patterns[0]


def _exists(*parts):
    return tf.io.gfile.exists(os.path.join(*parts))


def _get(value, key):
    return value.get(key) if isinstance(value, dict) else None
