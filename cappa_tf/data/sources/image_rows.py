"""Rows of a folder of images with captions or labels, and their `Example`s.

    captions.jsonl   one object per line: {"image": "a/1.jpg", "captions":
                     ["...", "..."]} or "caption": "..."; optional "split",
                     "label" (integer or class name), "class_name" (of an
                     integer label) and "key"
    captions.csv     a row for each caption: image,caption with a header (the
                     same optional columns) or without
                     Questions: "question" and "answers" (one or a list) in
                     place of captions, or "qa": [["...?", "..."], ...]
    other tables     those of `tables.py`; Hugging Face's metadata.* may be in
                     each of train/, validation/, ...
    a/1.jpg a/1.txt  a text file beside each image, one caption per line

Rows of one image are merged. Image paths are relative to the table's folder.
All files are opened through `tf.io.gfile`, so they may also be in a bucket
(gs://...). Invalid rows are skipped, counted by reason and listed by name.
"""

import dataclasses
import hashlib
import os

import tensorflow as tf

from cappa_tf.data import text
from cappa_tf.data.images import image_files
from cappa_tf.data.schema import Example
from cappa_tf.data.sources import (
    folder_listing,
    parquet_tables,
    table_rows,
    tables,
)
from cappa_tf.data.sources.table_rows import Row, Skipped

__all__ = [
    "Options",
    "Row",
    "Skipped",
    "choose_split",
    "class_names",
    "clean_texts",
    "named_classes",
    "read_bytes",
    "read_example",
    "read_rows",
]

DEFAULT_SPLITS = {"train": 0.9, "validation": 0.1}


@dataclasses.dataclass(frozen=True)
class _Table:
    """A table of the source.

    Attributes:
        file: Path of the table.
        below: Folder below the source that its image paths are relative to.
        split: Split of rows that do not name one, or None.
    """

    file: str
    below: str = ""
    split: str | None = None


def read_rows(path, captions=None, skipped=None):
    """Lists the images of a source.

    Args:
        path: Path of a table or a folder.
        captions: Path of the table, if it should not be guessed; image paths
            are then relative to `path` if that is a folder.
        skipped: A `Skipped` to which malformed rows are added.

    Returns:
        A list of `Row`s in the order of the source.

    Raises:
        ValueError: If the source is empty or has no known layout.
    """
    skipped = skipped if skipped is not None else Skipped()
    path = os.fspath(path)
    if not text.is_text(path):
        raise ValueError(
            "The name of the input must be UTF-8. Received: "
            f"input={text.printable(path)}"
        )
    found = _find_tables(path, captions, skipped)
    if not found:
        rows = list(_rows_beside_images(path, skipped))
    else:
        is_folder = tf.io.gfile.isdir(path)
        root = path if is_folder else os.path.dirname(path)
        collector = table_rows.RowCollector(skipped)
        for table in found:
            tables.read(table.file, root, collector, table.below, table.split)
        rows = collector.rows()
    if not rows:
        names = [os.path.basename(table.file) for table in found]
        raise ValueError(
            f"No images found: {path} "
            + (
                f"lists none in {', '.join(names)}"
                if found
                else "holds no images, and no dataset.json"
            )
            + (f": {skipped}" if skipped.counts else "")
        )
    return rows


def _find_tables(path, captions, skipped):
    """Finds the `_Table`s of a source; none for text files beside images.

    A table of a folder is used if it is called captions.* or metadata.*, or is
    the only one. Beside images with text files, any other table is reported
    but not read.

    Raises:
        ValueError: If there is no such file, or the choice is ambiguous.
    """
    if captions is not None:
        captions = os.fspath(captions)
        if not captions or not folder_listing.is_file(captions):
            raise ValueError(
                f"The captions must be a file. Received: captions={captions}"
            )
        return [_Table(captions)]
    if folder_listing.is_file(path):
        return [_Table(path)]
    if not tf.io.gfile.isdir(path):
        raise ValueError(
            "The input must be a folder or a captions file. "
            f"Received: input={path}, which does not exist"
        )
    candidates = _candidates(path)
    named = [n for n in candidates if _stem(n) == "captions"]
    if len(named) != 1:
        good, bad = _judge(path, candidates, skipped=named)
        if not named:
            named = [n for n in good if _stem(n) == "metadata"]
    if len(named) == 1:
        return [_Table(os.path.join(path, named[0]))]
    nested = [] if good else _nested_tables(path)
    if not nested and (good or bad) and _has_text_beside(path):
        for name in [*good, *bad]:
            reason = bad.get(name, f"{name} (--captions={name} reads it)")
            skipped.add("table beside text files", reason)
        return []
    if not good and not nested and bad:
        raise ValueError(
            f"{path} holds no table of a known format: "
            + "; ".join(list(bad.values())[:5])
        )
    for reason in bad.values():
        skipped.add("table not understood", reason)
    if len(good) > 1 and all(n.endswith(".json") for n in good):
        paths = [os.path.join(path, name) for name in good]
        kinds = {file: tables.published_kind(file) for file in paths}
        if all(kinds.values()):
            return [_Table(p) for p, k in kinds.items() if k == "questions"]
    if len(good) > 1 and not all(n.endswith(".parquet") for n in good):
        raise ValueError(
            f"{path} holds several captions files ({', '.join(good)}): choose "
            "one with --captions"
        )
    return nested or [
        _Table(os.path.join(path, name), split=_split_of(name, len(good)))
        for name in good
    ]


def _stem(name):
    return os.path.splitext(name)[0].lower()


def _split_of(name, count):
    """The split of one of several Parquet files, by its name."""
    if count == 1:
        return None
    return tables.SPLITS.get(name.split("-")[0].split(".")[0].lower())


def _candidates(path):
    """Names of the files of a folder that may be tables."""
    names = folder_listing.names(path)
    images = {n for n in names if folder_listing.is_image(n)}
    stems = {os.path.splitext(name)[0] for name in images} | images
    return [
        name
        for name in names
        if name.lower().endswith((*tables.SUFFIXES, ".txt"))
        # A file beside an image of the same name is about that image.
        and os.path.splitext(name)[0] not in stems
        and text.is_text(name)
        and folder_listing.is_file(os.path.join(path, name))
    ]


def _judge(path, candidates, skipped=()):
    """Names of tables of images, and a dict of the others to the reason."""
    good, bad = [], {}
    for name in candidates:
        try:
            if name not in skipped:
                tables.check(os.path.join(path, name), path)
            good.append(name)
        except tables.NotATableError as error:
            # A text file may be anything.
            if not name.lower().endswith(".txt"):
                bad[name] = str(error)
    return good, bad


def _nested_tables(path):
    """Hugging Face's metadata files in folders below."""
    found = []
    for folder, files in folder_listing.walk(path):
        names = [
            name
            for name in files
            if _stem(name) == "metadata" and name.endswith(tables.SUFFIXES)
        ]
        below = folder.removeprefix(path).strip("/")
        if names and below and text.is_text(below):
            split = tables.SPLITS.get(below.split("/")[0].lower())
            found.append(_Table(os.path.join(folder, names[0]), below, split))
    return found


@dataclasses.dataclass(frozen=True)
class Options:
    """Options for the checks and the conversion of images and captions.

    Attributes:
        split_fractions: Dict split -> fraction, for all rows; None to use the
            rows' own splits and `DEFAULT_SPLITS` for rows without a split.
        resize: Length of the shorter side to which larger images are downsized
            (stored as JPEG of quality 95); None stores files as they are.
        min_side: Minimum length of the shorter side of an image.
        max_pixels: Maximum number of pixels of an image (not with `resize`).
        max_caption_characters: Maximum length of a caption.
        require_captions: Whether an image without captions is skipped.
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
    """Class names by number, of rows whose labels are integers.

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
    """The split of a row: its own, or chosen by a hash of its key.

    The hash keeps an image in its split when the data set grows.

    Args:
        row: A `Row`.
        fractions: Dict split -> fraction, or None to use the row's own split.

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
    """Reads, checks and cleans the image and captions of a row.

    Args:
        row: A `Row`.
        options: `Options`.
        classes: A dict class name -> label.

    Returns:
        (example, reasons): the `Example`, or None if it is left out; and a
        list of (reason, name) of everything left out, including captions.
    """
    reasons = [tuple(refused) for refused in row.refused]
    captions, prompts, types = clean_texts(
        row, options.max_caption_characters, reasons
    )
    if not captions and options.require_captions:
        if not reasons:
            reasons.append(("no caption", row.key))
        return None, reasons
    try:
        image = _read_image(row, options)
    except image_files.UnusableError as error:
        return None, [*reasons, (error.reason, row.key)]
    label = row.label
    if isinstance(label, str):
        label = classes[label]
    example = Example(row.key, image, captions, label, prompts, types)
    return example, reasons


def _read_image(row, options):
    """The bytes to store for the image of a row."""
    return image_files.check(
        read_bytes(row.path, row.cell),
        options.resize,
        options.min_side,
        options.max_pixels,
    )


def read_bytes(path, cell):
    """Reads the image file at a path, or in a cell of a Parquet file."""
    if cell is None:
        return image_files.read_bytes(path)
    try:
        content = parquet_tables.read_cell(path, cell)
    except (tf.errors.OpError, OSError):
        content = None
    if not content:
        raise image_files.UnusableError("image missing")
    return content


def clean_texts(row, max_characters, reasons):
    """Chooses the valid captions of a row.

    Args:
        row: A `Row`.
        max_characters: Maximum length of a caption, an answer or a question.
        reasons: List to which (reason, name) of the others are added.

    Returns:
        (captions, prompts, question types), parallel lists; the latter two are
        None if the row has none.
    """
    nothing = [""] * len(row.captions)
    kept = []
    for caption, prompt, kind in zip(
        row.captions, row.prompts or nothing, row.question_types or nothing
    ):
        what = "answer" if prompt else "caption"
        name = f"{row.key}: {prompt}" if prompt else row.key
        if not isinstance(caption, str) or not caption.strip():
            reasons.append(("empty caption", row.key))
        elif not text.is_text(caption):
            reasons.append(("caption is not valid Unicode", row.key))
        elif len(prompt) > max_characters:
            reasons.append(
                (f"question of more than {max_characters} characters", row.key)
            )
        elif len(caption) > max_characters:
            reasons.append(
                (f"{what} of more than {max_characters} characters", name)
            )
        else:
            kept.append((caption.strip(), prompt.strip(), kind))
    captions, prompts, types = map(list, zip(*kept)) if kept else ([], [], [])
    return captions, _if_any(prompts), _if_any(types)


def _if_any(values):
    return values if any(values) else None


def _rows_beside_images(root, skipped):
    """Yields rows of all images below a folder."""
    for folder, files in folder_listing.walk(root):
        texts = {name.lower(): name for name in files}
        for file in filter(folder_listing.is_image, files):
            path = os.path.join(folder, file)
            key = path.removeprefix(root).lstrip("/")
            if not text.is_text(key):
                skipped.add("name is not valid Unicode", text.printable(key))
                continue
            row = Row(key=key, path=path, captions=[])
            beside = _text_of(file, files, texts)
            if beside is not None:
                _read_text(row, os.path.join(folder, beside), beside)
            yield row


def _has_text_beside(root):
    """Whether an image below a folder has a text file."""
    for _, files in folder_listing.walk(root):
        texts = {name.lower(): name for name in files}
        images = filter(folder_listing.is_image, files)
        if any(_text_of(file, files, texts) for file in images):
            return True
    return False


def _text_of(file, files, texts):
    """The text file beside an image: 1.txt, 1.caption or 1.jpg.txt."""
    stem = os.path.splitext(file)[0]
    for name in (f"{stem}.txt", f"{stem}.caption", f"{file}.txt"):
        found = texts.get(name.lower())
        # 1.TXT belongs to 1.jpg, but a.txt not to A.jpg.
        if found is not None and found.startswith(stem):
            return found
    return None


def _read_text(row, path, name):
    """Adds the captions of a text file to a row."""
    with tf.io.gfile.GFile(path, "rb") as file:
        content = file.read()
    try:
        captions = text.lines(text.decode(content, "surrogateescape"))
    except ValueError as error:
        row.refused.append(("caption is not valid Unicode", f"{name}: {error}"))
        return
    folder = os.path.dirname(row.key)
    for number, caption in enumerate(captions, 1):
        if not text.is_text(caption):
            place = os.path.join(folder, f"{name}:{number}")
            row.refused.append(("caption is not valid Unicode", place))
        elif caption.strip():
            row.captions.append(caption)
