"""Tables of captioned images, in all supported formats.

    .jsonl          an object per line
    .csv .tsv .txt  a row per caption; delimiter and columns are detected
    .json           a list of objects, COCO's captions, Karpathy's splits, or
                    VQAv2, GQA, OCR-VQA (`question_files.py`)
    .parquet        img2dataset's or Hugging Face's (`parquet_tables.py`)

All of them are converted to `Row`s by the same rules (`table_rows.py`).
"""

import itertools
import json
import os

import tensorflow as tf

from cappa_tf.data import text
from cappa_tf.data.sources import delimited, parquet_tables, question_files

SUFFIXES = (".jsonl", ".csv", ".tsv", ".json", ".parquet")
NotATableError = delimited.NotATableError
SPLITS = question_files.SPLITS


def read(file, root, collector, below="", split=None):
    """Reads a table.

    Args:
        file: Path of the table.
        root: Folder of the source.
        collector: A `table_rows.RowCollector` to which rows and errors are
            added.
        below: Folder below `root` that image paths are relative to.
        split: Split of rows that do not name one.

    Raises:
        NotATableError: If it is not a table of images.
    """
    name = os.path.join(below, os.path.basename(file))
    for place, record in _records(file, name, os.path.join(root, below)):
        if isinstance(record, Exception):
            collector.refuse(place, record)
        else:
            collector.add(record, root, place, below, split)


def check(file, root):
    """Checks whether a file is a table of images, by its beginning.

    Raises:
        NotATableError: If it is not.
    """
    for _ in itertools.islice(_records(file, os.path.basename(file), root), 1):
        pass


def published_kind(file):
    """The kind of published questions that a table is.

    Returns:
        "questions", which name their split; "answers", which are read along
        with the questions beside them; or None.
    """
    if not file.lower().endswith(".json"):
        return None
    try:
        with tf.io.gfile.GFile(file, "rb") as stream:
            value = json.loads(text.decode(stream.read()))
    except (ValueError, RecursionError):
        return None
    if question_files.is_answers(value):
        return "answers"
    return "questions" if question_files.is_published(value) else None


def _records(file, name, root):
    """Returns an iterator of (place, record or error)."""
    suffix = os.path.splitext(file)[1].lower()
    if suffix == ".parquet":
        return parquet_tables.records(file, name, root)
    with tf.io.gfile.GFile(file, "rb") as stream:
        content = stream.read()
    try:
        # Bytes that are not UTF-8 become text that `text.is_text` detects, so
        # that only the rows that contain them are lost.
        content = text.decode(content, "surrogateescape")
    except ValueError as error:
        raise NotATableError(f"{name}: {error}") from None
    if suffix == ".json" or (
        suffix == ".jsonl" and content.lstrip()[:1] == "["
    ):
        return _json_records(content, file, name, root)
    if suffix == ".jsonl":
        return _line_records(content, name)
    return delimited.DelimitedTable(content, name, root).records()


def _line_records(content, name):
    """Yields the records of a JSON object per line."""
    for number, line in enumerate(text.lines(content), 1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            record = ValueError(f"not a JSON object: {error}")
        yield place, record


def _json_records(content, file, name, root):
    """Returns the records of one JSON value."""
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        lines = [line for line in text.lines(content) if line.strip()]
        if len(lines) > 1 and all(line.startswith("{") for line in lines[:2]):
            return _line_records(content, name)
        raise NotATableError(f"{name}:{error.lineno}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise NotATableError(f"{name}: {error}") from None
    if question_files.is_published(value):
        return question_files.records(value, file, name, root)
    if isinstance(value, dict):
        images, annotations = value.get("images"), value.get("annotations")
        if isinstance(images, list) and isinstance(annotations, list):
            return _coco_records(images, annotations, name)
        if isinstance(images, list):
            return _karpathy_records(images, name)
        if "image" in value or "file_name" in value:  # One line of a JSONL.
            return _line_records(content, name)
        value = value.get("data", value)  # DocVQA's list has a header.
    if isinstance(value, list) and any(isinstance(x, dict) for x in value):
        return _list_records(value, name)
    raise NotATableError(
        f"{name}: neither a list of objects with 'image' and 'caption', nor "
        "COCO's captions ('images' and 'annotations'), nor Karpathy's splits "
        "('images' with 'sentences'), nor VQAv2, GQA or OCR-VQA. Received: "
        + (
            f"an object with {sorted(value)[:5]}"
            if value and isinstance(value, dict)
            else f"{content[:40]!r}"
        )
    )


def _list_records(values, name):
    """Yields the records of a list of objects."""
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            value = ValueError(f"not an object: {str(value)[:40]!r}")
        yield f"{name}, item {number}", value


def _coco_records(images, annotations, name):
    """Returns the records of COCO's annotations."""
    if annotations and not any(
        isinstance(a, dict) and "caption" in a for a in annotations
    ):
        raise NotATableError(
            f"{name}: its annotations have no 'caption': COCO's captions are "
            "in captions_*.json"
        )
    return _coco_pairs(images, annotations, name)


def _coco_pairs(images, annotations, name):
    known = {}
    for number, image in enumerate(images, 1):
        place = f"{name}, images item {number}"
        try:
            identity = image["id"]
            known[identity] = image["file_name"]
        except (TypeError, KeyError) as error:
            yield place, ValueError(f"no 'id' or 'file_name' ({error})")
            continue
        # Registers the image even if it has no captions.
        yield place, {"image": image["file_name"]}
    for number, annotation in enumerate(annotations, 1):
        place = f"{name}, annotations item {number}"
        try:
            image = known[annotation["image_id"]]
            record = {"image": image, "caption": annotation["caption"]}
            if record["caption"] is None:
                raise ValueError("'caption' is null")
        except (TypeError, KeyError) as error:
            record = ValueError(f"no 'caption', or no such image ({error})")
        except ValueError as error:
            record = error
        yield place, record


def _karpathy_records(images, name):
    """Returns the records of Karpathy's splits of COCO or Flickr."""
    if not any(isinstance(i, dict) and "sentences" in i for i in images):
        raise NotATableError(
            f"{name}: its images have no 'sentences', and there are no "
            "'annotations'"
        )
    return _karpathy_images(images, name)


def _karpathy_images(images, name):
    for number, image in enumerate(images, 1):
        place = f"{name}, images item {number}"
        try:
            file = image["filename"]
            if not isinstance(file, str):
                raise ValueError("'filename' is not a path")
            split = image.get("split")
            record = {
                "image": os.path.join(image.get("filepath") or "", file),
                "captions": [s["raw"] for s in image["sentences"]],
                "split": SPLITS.get(split, split),
            }
        except (TypeError, KeyError) as error:
            record = ValueError(
                f"no 'filename' or 'sentences' with 'raw' ({error})"
            )
        except ValueError as error:
            record = error
        yield place, record
