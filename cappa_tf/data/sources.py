"""What users have, pictures with captions in a folder, to `Example`s.

Three forms are understood:

    captions.jsonl   one object a line: {"image": "a/1.jpg", "captions":
                     ["...", "..."]} or "caption": "..."; optional "split",
                     "label" (integer or class name), "class_name" (of an
                     integer label) and "key"
    captions.csv     a row for each caption: image,caption with a header (the
                     same optional columns) or without; rows of one image are
                     put together
    a/1.jpg a/1.txt  a text file beside each image, one caption a line

Image paths are relative to the captions file. All files are opened through
`tf.io.gfile`, so that they may lie in a bucket (gs://...) as well. What is no
good is skipped, counted by reason and listed by name, never passed on.
"""

import collections
import csv
import dataclasses
import hashlib
import io
import json
import os

import tensorflow as tf

from cappa_tf.data import image_formats, picture_files
from cappa_tf.data.tfrecord import Example

DEFAULT_SPLITS = {"train": 0.9, "validation": 0.1}


@dataclasses.dataclass
class Row:
    """One picture as the source lists it, nothing checked yet.

    Attributes:
        key: Unique name: the path as the source gives it, unless it has a key.
        path: The image file.
        captions: As given.
        split: As given, or None.
        label: Integer, class name, or None.
        class_name: What an integer label stands for, or None.
    """

    key: str
    path: str
    captions: list[str]
    split: str | None = None
    label: int | str | None = None
    class_name: str | None = None


class Skipped:
    """What was left out: counts by reason, and a line for each.

    Attributes:
        counts: A `collections.Counter` by reason.
        lines: "reason<tab>name" in the order of the source.
    """

    def __init__(self):
        self.counts = collections.Counter()
        self.lines = []

    def add(self, reason, name):
        """Notes one thing that was left out."""
        self.counts[reason] += 1
        self.lines.append(f"{reason}\t{name}")


def find_captions(path, captions=None):
    """Finds the captions file of a source.

    Args:
        path: A captions file, or a folder with one or with text files beside
            its images.
        captions: The captions file, where it is not to be guessed.

    Returns:
        Path of the captions file, or None for text files beside images.

    Raises:
        ValueError: There is no such file, or several might be meant.
    """
    path = os.fspath(path)
    if captions is not None:
        captions = os.fspath(captions)
        if not _is_file(captions):
            raise ValueError(
                f"The captions must be a file. Received: captions={captions}"
            )
        return captions
    if _is_file(path):
        return path
    if not tf.io.gfile.isdir(path):
        raise ValueError(
            "The input must be a folder or a captions file. "
            f"Received: input={path}, which does not exist"
        )
    found = sorted(
        file
        for file in tf.io.gfile.listdir(path)
        if file.endswith((".jsonl", ".csv"))
    )
    named = [f for f in found if os.path.splitext(f)[0] == "captions"]
    if len(named) == 1 or (not named and len(found) == 1):
        return os.path.join(path, (named or found)[0])
    if found:
        raise ValueError(
            f"{path} holds several captions files ({', '.join(found)}): say "
            "which one (--captions)"
        )
    return None


def read_rows(path, captions=None, skipped=None):
    """Lists the pictures of a source.

    Args:
        path: A captions file or a folder.
        captions: The captions file, where it is not to be guessed; image
            paths are then relative to `path` if that is a folder.
        skipped: A `Skipped` that takes malformed rows.

    Returns:
        A list of `Row`s in the order of the source.

    Raises:
        ValueError: The source is empty or not understood.
    """
    skipped = skipped if skipped is not None else Skipped()
    path = os.fspath(path)
    file = find_captions(path, captions)
    root = path if tf.io.gfile.isdir(path) else os.path.dirname(path)
    if file is None:
        rows = list(_rows_beside_images(root))
    elif file.endswith(".jsonl"):
        rows = list(_rows_of_jsonl(file, root, skipped))
    else:
        rows = list(_rows_of_csv(file, root, skipped))
    if not rows:
        name = os.path.basename(file) if file else None
        raise ValueError(
            f"No pictures found: {path} "
            + (f"lists none in {name}" if file else "holds no images")
            + (f" ({dict(skipped.counts)})" if skipped.counts else "")
        )
    return rows


@dataclasses.dataclass(frozen=True)
class Options:
    """What makes a picture or caption usable, and what happens to it.

    Attributes:
        split_fractions: Split -> fraction, for all rows; None to use the rows'
            own splits and `DEFAULT_SPLITS` for rows without.
        resize: Length of the shorter side larger pictures are shrunk to (and
            stored as JPEG of quality 95); None stores files as they are.
        min_side: Pictures with a shorter side below this are skipped.
        max_pixels: Pictures of more are skipped (not with `resize`).
        max_caption_characters: Longer captions are left out.
        require_captions: Whether a picture without caption is skipped.
    """

    split_fractions: dict | None = None
    resize: int | None = None
    min_side: int = 8
    max_pixels: int = 25_000_000
    max_caption_characters: int = 1000
    require_captions: bool = True


def class_names(rows):
    """Sorted class names of rows whose labels are text."""
    return sorted({row.label for row in rows if isinstance(row.label, str)})


def named_classes(rows):
    """Names of rows whose labels are integers, by number.

    Returns:
        A list; empty unless every class that occurs has one name.
    """
    names = {
        (row.label, row.class_name)
        for row in rows
        if isinstance(row.label, int)
    }
    by_number = dict(names)
    complete = None not in by_number.values() and len(by_number) == len(names)
    if not complete or sorted(by_number) != list(range(len(by_number))):
        return []
    return [by_number[number] for number in sorted(by_number)]


def choose_split(row, fractions=None):
    """The split of a row: its own, or drawn by a hash of its key.

    The hash keeps a picture in its split when the data set grows.

    Args:
        row: A `Row`.
        fractions: Split -> fraction, or None to go by the row.

    Returns:
        Name of the split.
    """
    if fractions is None:
        if row.split is not None:
            return row.split
        fractions = DEFAULT_SPLITS
    digest = hashlib.sha256(row.key.encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    position *= sum(fractions.values())
    for split, fraction in fractions.items():
        position -= fraction
        if position < 0:
            return split
    return split


def read_example(row, options, classes):
    """Reads, checks and cleans the picture and captions of a row.

    Args:
        row: A `Row`.
        options: `Options`.
        classes: A dict class name -> label.

    Returns:
        The `Example`, or None for one that is left out; and a list of
        (reason, name) of what was left out, captions included.
    """
    reasons = []
    captions = _clean(row, options.max_caption_characters, reasons)
    if not captions and options.require_captions:
        if not reasons:
            reasons.append(("no caption", row.key))
        return None, reasons
    try:
        image = picture_files.read(
            row.path, options.resize, options.min_side, options.max_pixels
        )
    except picture_files.UnusableError as error:
        return None, [*reasons, (error.reason, row.key)]
    label = row.label
    if isinstance(label, str):
        label = classes[label]
    return Example(row.key, image, captions, label), reasons


def is_text(value):
    """Whether a string can be written as UTF-8: no half of a pair in it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _clean(row, max_characters, reasons):
    """The captions of a row that are worth keeping."""
    captions = []
    for caption in row.captions:
        if not isinstance(caption, str) or not caption.strip():
            reasons.append(("empty caption", row.key))
        elif not is_text(caption):
            reasons.append(("caption is not valid Unicode", row.key))
        elif len(caption) > max_characters:
            reasons.append(
                (f"caption of more than {max_characters} characters", row.key)
            )
        else:
            captions.append(caption.strip())
    return captions


def _is_file(path):
    return tf.io.gfile.exists(path) and not tf.io.gfile.isdir(path)


def _open_text(file):
    """The lines of a captions file, whatever wrote it."""
    with tf.io.gfile.GFile(file, "rb") as stream:
        content = io.BytesIO(stream.read())
    # What is no UTF-8 becomes text that `is_text` gives away.
    return io.TextIOWrapper(
        content, "utf-8-sig", errors="surrogateescape", newline=""
    )


def _rows_of_jsonl(file, root, skipped):
    name = os.path.basename(file)
    with _open_text(file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = _row(json.loads(line), root)
            except (ValueError, TypeError, AttributeError) as error:
                skipped.add("malformed row", f"{name}:{number}: {error}")
                continue
            yield row


def _row(value, root):
    """A `Row` of a JSON object or CSV line."""
    image = value.get("image")
    if not isinstance(image, str) or not image:
        raise ValueError("no 'image'")
    captions = value.get("captions", value.get("caption"))
    if captions is None:
        captions = []
    if isinstance(captions, str):
        captions = [captions]
    label = value.get("label")
    if isinstance(label, str):
        # A class name is one line of a list of names.
        label = " ".join(label.split()) or None
    elif label is not None and not isinstance(label, int):
        raise ValueError(f"'label' is {label!r}")
    key = str(value.get("key") or image)
    if not is_text(f"{image}{key}{label}"):
        raise ValueError("'image', 'key' or 'label' is not valid Unicode")
    return Row(
        key=key,
        path=os.path.join(root, image),
        captions=list(captions),
        split=value.get("split") or None,
        label=label,
        class_name=value.get("class_name") or None,
    )


def _rows_of_csv(file, root, skipped):
    rows = {}
    name = os.path.basename(file)
    with _open_text(file) as lines:
        first = lines.readline()
        lines.seek(0)
        header = next(csv.reader([first]), [])
        names = None if "image" in header else ["image", "caption"]
        reader = csv.DictReader(lines, fieldnames=names)
        for value in reader:
            try:
                row = _row(_csv_values(value), root)
            except (ValueError, TypeError) as error:
                skipped.add(
                    "malformed row",
                    f"{name}:{reader.line_num}: {error}",
                )
                continue
            rows.setdefault(row.key, dataclasses.replace(row, captions=[]))
            rows[row.key].captions.extend(row.captions)
    yield from rows.values()


def _csv_values(value):
    """A line of a CSV file with the types a JSON line has."""
    if None in value:
        raise ValueError("more fields than the header has (quote captions)")
    label = value.get("label")
    if label:
        value["label"] = int(label) if label.lstrip("-").isdigit() else label
    else:
        value["label"] = None
    return value


def _rows_beside_images(root):
    # os.walk gives local names that are no Unicode, too; gfile.walk fails.
    walk = os.walk if os.path.isdir(root) else tf.io.gfile.walk
    for directory, folders, files in walk(root):
        folders.sort()
        names = set(files)
        for file in sorted(files):
            stem, suffix = os.path.splitext(file)
            if suffix.lower() not in image_formats.EXTENSIONS:
                continue
            captions = []
            if f"{stem}.txt" in names:
                text = os.path.join(directory, f"{stem}.txt")
                captions = _lines_of_text(text) if is_text(text) else []
            path = os.path.join(directory, file)
            key = path.removeprefix(root).lstrip("/")
            yield Row(key=key, path=path, captions=captions)


def _lines_of_text(path):
    with tf.io.gfile.GFile(path, "rb") as file:
        lines = file.read().decode(errors="replace").splitlines()
    return [line for line in lines if line.strip()]
