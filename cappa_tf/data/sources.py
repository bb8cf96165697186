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

Image paths are relative to the captions file. What is no good is skipped,
counted by reason and listed by name, never passed on.
"""

import collections
import concurrent.futures
import csv
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib

from cappa_tf.data import picture_files
from cappa_tf.data.tfrecord import Example

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff")
)
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
    path: pathlib.Path
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
    path = pathlib.Path(path)
    if captions is not None:
        if not pathlib.Path(captions).is_file():
            raise ValueError(
                f"The captions must be a file. Received: captions={captions}"
            )
        return pathlib.Path(captions)
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(
            "The input must be a folder or a captions file. "
            f"Received: input={path}, which does not exist"
        )
    found = sorted([*path.glob("*.jsonl"), *path.glob("*.csv")])
    named = [file for file in found if file.stem == "captions"]
    if len(named) == 1 or (not named and len(found) == 1):
        return (named or found)[0]
    if found:
        raise ValueError(
            f"{path} holds several captions files "
            f"({', '.join(file.name for file in found)}): say which one "
            "(--captions)"
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
    path = pathlib.Path(path)
    file = find_captions(path, captions)
    root = path if path.is_dir() else path.parent
    if file is None:
        rows = list(_rows_beside_images(root))
    elif file.suffix == ".jsonl":
        rows = list(_rows_of_jsonl(file, root, skipped))
    else:
        rows = list(_rows_of_csv(file, root, skipped))
    if not rows:
        raise ValueError(
            f"No pictures found: {path} "
            + (f"lists none in {file.name}" if file else "holds no images")
            + (f" ({dict(skipped.counts)})" if skipped.counts else "")
        )
    return rows


def read_examples(rows, skipped, options=None, workers=2, classes=()):
    """Reads, checks and cleans the pictures and captions of rows.

    Args:
        rows: Iterable of `Row`s.
        skipped: A `Skipped` that takes what is left out.
        options: `Options`.
        workers: Threads that read and check images.
        classes: `class_names` of the rows; the label of one becomes its
            position.

    Yields:
        (split, `Example`) in the order of the rows.

    Raises:
        ValueError: Nothing was left.
    """
    options = options or Options()
    numbers = {name: i for i, name in enumerate(classes)}
    seen = set()
    count = 0
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        loaded = _ordered_map(
            pool, lambda row: _load(row, options), rows, ahead=4 * workers
        )
        for row, captions, image, reasons in loaded:
            if not reasons and row.key in seen:
                reasons = [("repeated key", row.key)]
            for reason, name in reasons:
                skipped.add(reason, name)
            if image is None or captions is None or row.key in seen:
                continue
            seen.add(row.key)
            label = numbers.get(row.label, row.label)
            split = choose_split(row, options.split_fractions)
            count += 1
            yield split, Example(row.key, image, captions, label)
    if not count:
        raise ValueError(f"No usable example was left: {dict(skipped.counts)}")


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


def _load(row, options):
    """Image bytes and captions of a row, or reasons why not."""
    reasons = []
    captions = _clean(row, options.max_caption_characters, reasons)
    if not captions and options.require_captions:
        if not reasons:
            reasons.append(("no caption", row.key))
        return row, None, None, reasons
    try:
        image = picture_files.read(
            row.path, options.resize, options.min_side, options.max_pixels
        )
    except picture_files.UnusableError as error:
        return row, None, None, [*reasons, (error.reason, row.key)]
    return row, captions, image, reasons


def _clean(row, max_characters, reasons):
    """The captions of a row that are worth keeping."""
    captions = []
    for caption in row.captions:
        if not isinstance(caption, str) or not caption.strip():
            reasons.append(("empty caption", row.key))
        elif len(caption) > max_characters:
            reasons.append(
                (f"caption of more than {max_characters} characters", row.key)
            )
        else:
            captions.append(caption.strip())
    return captions


def _ordered_map(pool, function, items, ahead):
    """Results in order, with at most `ahead` items under way."""
    items = iter(items)
    waiting = collections.deque(
        pool.submit(function, item) for item in itertools.islice(items, ahead)
    )
    try:
        while waiting:
            yield waiting.popleft().result()
            for item in itertools.islice(items, 1):
                waiting.append(pool.submit(function, item))
    finally:
        for future in waiting:
            future.cancel()


def _rows_of_jsonl(file, root, skipped):
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = _row(json.loads(line), root)
            except (ValueError, TypeError, AttributeError) as error:
                skipped.add("malformed row", f"{file.name}:{number}: {error}")
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
    if label is not None and not isinstance(label, int | str):
        raise ValueError(f"'label' is {label!r}")
    return Row(
        key=str(value.get("key") or image),
        path=root / image,
        captions=list(captions),
        split=value.get("split") or None,
        label=label,
        class_name=value.get("class_name") or None,
    )


def _rows_of_csv(file, root, skipped):
    rows = {}
    with open(file, encoding="utf-8-sig", newline="") as lines:
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
                    f"{file.name}:{reader.line_num}: {error}",
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
    for directory, folders, files in os.walk(root):
        folders.sort()
        for file in sorted(files):
            path = pathlib.Path(directory) / file
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            text = path.with_suffix(".txt")
            captions = []
            if text.is_file():
                lines = text.read_text(encoding="utf-8", errors="replace")
                captions = [c for c in lines.splitlines() if c.strip()]
            key = path.relative_to(root).as_posix()
            yield Row(key=key, path=path, captions=captions)
