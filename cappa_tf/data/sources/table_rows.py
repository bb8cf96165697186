"""Rows of tables of captioned images, checked while they are listed.

A table yields records, dicts from column to value. Columns have many names:

    image     image, file_name, filename, filepath, ...: `IMAGE_COLUMNS`
    caption   caption, captions, text, title, ...: `CAPTION_COLUMNS`
    question  question; or questions, a list beside one of answers
    answer    answer, answers: one or a list, also of {"answer": ...}
    type      question_type, answer_type, type
    qa        list of [question, answer or answers] or of {"question": ...,
              "answers": ...}
    key, split, label, class_name

Each answer becomes a caption whose prompt is the question.
Rows of one key (by default the path of the image) are merged.
"""

import collections
import dataclasses
import functools
import os
import re

from cappa_tf.data import text

# The first column that a record has is used.
IMAGE_COLUMNS = (
    "image",
    "file_name",
    "filename",
    "image_path",
    "filepath",
    "file_path",
    "image_name",
    "image_file",
    "img",
    "path",
    "file",
)
CAPTION_COLUMNS = (
    "captions",
    "caption",
    "text",
    "title",
    "sentences",
    "sentence",
    "comment",
    "description",
    "txt",
)
# In a record with a question, other columns may hold anything.
_CAPTIONS_BESIDE_QUESTIONS = ("captions", "caption")
_QUESTION_COLUMNS = ("question", "questions")
_ANSWER_COLUMNS = ("answers", "answer")
_PAIR_COLUMNS = ("qa", "qas", "qa_pairs")
_TYPE_COLUMNS = ("question_type", "answer_type", "type")
QUESTION_COLUMNS = (*_QUESTION_COLUMNS, *_ANSWER_COLUMNS, *_PAIR_COLUMNS)
COLUMNS = frozenset(
    (
        *IMAGE_COLUMNS,
        *CAPTION_COLUMNS,
        *QUESTION_COLUMNS,
        *_TYPE_COLUMNS,
        *("key", "split", "label", "class_name"),
    )
)
MALFORMED = "malformed row"
_INT64 = 1 << 63


@dataclasses.dataclass
class Row:
    """One image as listed by the source; the image is not read yet.

    Attributes:
        key: Unique name, the path in the source unless it has a key.
        path: Path of the image file, or of the Parquet file that holds it.
        captions: Captions in the source.
        split: Split in the source, or None.
        label: Integer, class name, or None.
        class_name: Class name of an integer label, or None.
        cell: Cell in the Parquet file, as for `parquet_tables.read_cell`, or
            None.
        refused: List of (reason, name) of captions left out while listing.
        prompts: Question or other prompt of each caption, "" for none; None if
            no caption has one.
        question_types: Type of each question, "" if unknown; None if no
            question has one.
    """

    key: str
    path: str
    captions: list[str]
    split: str | None = None
    label: int | str | None = None
    class_name: str | None = None
    cell: list | None = None
    refused: list = dataclasses.field(default_factory=list)
    prompts: list[str] | None = None
    question_types: list[str] | None = None

    def add(self, row):
        """Adds the captions of another row of the same image."""
        for name in ("prompts", "question_types"):
            old, new = getattr(self, name), getattr(row, name)
            if old is not None or new is not None:
                old = [""] * len(self.captions) if old is None else old
                new = [""] * len(row.captions) if new is None else new
                setattr(self, name, old + new)
        self.captions += row.captions
        self.refused += row.refused


class Skipped:
    """Items left out: counts by reason, and a line for each.

    Attributes:
        counts: A `collections.Counter` by reason.
        lines: List of "reason<tab>name" in the order of the source.
    """

    def __init__(self):
        self.counts = collections.Counter()
        self.lines = []

    def add(self, reason, name):
        """Adds one item that was left out."""
        self.counts[reason] += 1
        self.lines.append(f"{reason}\t{name}")

    def names(self, most):
        """Dict reason -> the first `most` names, printable."""
        found = {reason: [] for reason in self.counts}
        for line in self.lines:
            reason, _, name = line.partition("\t")
            if len(found[reason]) < most:
                found[reason].append(text.printable(name))
        return found

    def __str__(self):
        """Counts with the first names of each reason, in one line."""
        names = self.names(3)
        return "; ".join(
            f"{count} x {reason} ({'; '.join(names[reason])}"
            + ("; ...)" if count > 3 else ")")
            for reason, count in self.counts.most_common()
        )


class RowCollector:
    """Merges the records of one or several tables into rows.

    Args:
        skipped: A `Skipped` to which malformed records are added.
    """

    def __init__(self, skipped):
        self._skipped = skipped
        self._rows = {}
        self._places = {}  # key -> where its label is

    def refuse(self, place, error):
        """Notes a malformed record."""
        self._skipped.add(MALFORMED, f"{place}: {error}")

    def add(self, record, root, place, below="", split=None):
        """Adds one record.

        Args:
            record: A dict from column to value.
            root: Folder of the source.
            place: Place of the record for messages, such as "captions.csv:7".
            below: Folder of the table below `root`, to which its image paths
                are relative.
            split: Split if the record has none.
        """
        try:
            row = make_row(record, root, place, below)
            row.split = row.split or split
            self._merge(row, place)
        except (ValueError, TypeError) as error:
            self.refuse(place, error)

    def rows(self):
        """Returns the `Row`s in order, with labels of one kind."""
        kinds = collections.Counter(
            type(row.label)
            for row in self._rows.values()
            if row.label is not None
        )
        if len(kinds) < 2:
            return list(self._rows.values())
        (kind, _), (other, _) = kinds.most_common()
        names = {int: "a number", str: "a word"}
        rows = []
        for key, row in self._rows.items():
            if row.label is not None and type(row.label) is other:
                self.refuse(
                    self._places[key],
                    f"'label' is {names[other]}, {row.label!r}, but most are "
                    f"{names[kind]}",
                )
            else:
                rows.append(row)
        return rows

    def _merge(self, row, place):
        known = self._rows.get(row.key)
        if known is None:
            self._rows[row.key] = row
        else:
            if (known.path, known.cell) != (row.path, row.cell):
                raise ValueError(f"'key' {row.key!r} is that of another image")
            for name in ("split", "label", "class_name"):
                old, new = getattr(known, name), getattr(row, name)
                if None not in (old, new) and old != new:
                    raise ValueError(
                        f"{name!r} is {new!r}, but {old!r} in another row of "
                        "this image"
                    )
            for name in ("split", "label", "class_name"):
                if getattr(known, name) is None:
                    setattr(known, name, getattr(row, name))
            known.add(row)
        if row.label is not None:
            self._places.setdefault(row.key, place)


@functools.lru_cache(maxsize=1024)
def column(name):
    """Normalizes the name of a column: "File name" becomes file_name."""
    return re.sub(r"[\s-]+", "_", str(name).strip().lower())


def make_row(record, root, place, below=""):
    """Converts a record to a `Row`.

    Args:
        record: A dict from column to value.
        root: Folder of the source, which keys are relative to.
        place: Place of the record, for captions that are left out.
        below: Folder below `root` that the image's path is relative to.

    Returns:
        The `Row`.

    Raises:
        ValueError: If a value is invalid.
    """
    record = {column(name): value for name, value in record.items()}
    image = _first(record, IMAGE_COLUMNS)
    cell = record.get("cell")
    if isinstance(image, str):
        image = image.strip()
    elif image is not None:
        raise ValueError(f"the image is {_what(image)}, not a path")
    if not image:
        raise ValueError("no 'image' (or 'file_name', 'filepath', ...)")
    if below and "://" not in image:
        image = os.path.join(below, image)
    key = record.get("key")
    if type(key) not in (int, str, type(None)):
        raise ValueError(f"'key' is {_what(key)}")
    key = image if key in (None, "") else str(key)
    label = _label(record.get("label"))
    split, class_name = (
        _word(record, name) for name in ("split", "class_name")
    )
    names = f"{image} {key} {label} {split} {class_name}"
    if not text.is_text(names):
        raise ValueError(f"not UTF-8: {text.printable(names)!r}")
    questions, columns = _questions(record), CAPTION_COLUMNS
    if questions:
        columns = _CAPTIONS_BESIDE_QUESTIONS
    captions, refused = _captions(_first(record, columns), place)
    row = Row(
        key=key,
        path=_path(record, root, image),
        captions=captions,
        split=split,
        label=label,
        class_name=class_name,
        cell=cell,
        refused=refused,
    )
    for question in questions:
        _add_answers(row, *question, place)
    return row


def _path(record, root, image):
    if record.get("cell"):
        return record["cell_file"]
    return image if "://" in image else os.path.join(root, image)


def _first(record, names):
    for name in names:
        value = record.get(name)
        if value is not None:
            return value
    return None


def _what(value):
    """Describes a value, for a message."""
    names = {
        bool: "a bool",
        dict: "an object",
        float: "a float",
        int: "a number",
        list: "a list",
    }
    shown = repr(value)
    shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
    return f"{names.get(type(value), type(value).__name__)}, {shown}"


def _word(record, name):
    value = record.get(name)
    if not isinstance(value, str | None):
        raise ValueError(f"{name!r} is {_what(value)}")
    return (value or "").strip() or None


def _captions(value, place):
    """Valid captions of a record, and (reason, name) of the others."""
    if value is None:
        return [], []
    captions, refused = [], []
    for caption in value if isinstance(value, list) else [value]:
        if caption is None:
            refused.append(("empty caption", place))
        elif not isinstance(caption, str):
            raise ValueError(f"a caption is {_what(caption)}")
        elif not text.is_text(caption):
            refused.append(("caption is not valid Unicode", place))
        else:
            captions.append(caption)
    return captions, refused


def _questions(record):
    """The questions of a record, a list of (question, answers, type).

    They are not checked, and answers are not yet a list.

    Raises:
        ValueError: There is not one list of answers for each of `questions`.
    """
    pairs = _first(record, _PAIR_COLUMNS)
    question = _first(record, _QUESTION_COLUMNS)
    answers = _first(record, _ANSWER_COLUMNS)
    kind = _first(record, _TYPE_COLUMNS)
    if pairs is not None:
        if not isinstance(pairs, list):
            raise ValueError(f"'qa' is {_what(pairs)}, not a list")
        return [_pair(pair, kind) for pair in pairs]
    if isinstance(question, list):
        if not isinstance(answers, list) or len(answers) != len(question):
            raise ValueError(
                "'questions' and 'answers' are not lists of the same length"
            )
        return [(*pair, kind) for pair in zip(question, answers)]
    if question is not None:
        return [(question, answers, kind)]
    if answers is not None and _first(record, CAPTION_COLUMNS) is None:
        return [(None, answers, kind)]
    return []


def _pair(pair, kind):
    """(question, answers, type) of an item of the column qa."""
    if isinstance(pair, dict):
        pair = {column(name): value for name, value in pair.items()}
        return (
            _first(pair, _QUESTION_COLUMNS),
            _first(pair, _ANSWER_COLUMNS),
            _first(pair, _TYPE_COLUMNS) or kind,
        )
    if isinstance(pair, list) and len(pair) in (2, 3):
        return (*pair, kind)[:3]
    return pair, None, None


def _add_answers(row, question, answers, kind, place):
    """Adds valid answers to a row, and notes why others are left out."""
    if not isinstance(question, str | None):
        problem = f"{place}: the question is {_what(question)}"
        row.refused.append(("malformed question", problem))
        return
    if not (question or "").strip():
        row.refused.append(("empty question", place))
        return
    if not text.is_text(question):
        row.refused.append(("question is not valid Unicode", place))
        return
    place = f"{place}: {question}"
    kind = kind.strip() if isinstance(kind, str) and text.is_text(kind) else ""
    try:
        answers = _answers(answers)
    except ValueError as error:
        row.refused.append(("malformed answer", f"{place}: {error}"))
        return
    if not any((answer or "").strip() for answer in answers):
        row.refused.append(("no answer", place))
        return
    found = Row(row.key, row.path, [], prompts=[])
    for answer in answers:
        if not (answer or "").strip():
            found.refused.append(("empty answer", place))
        elif not text.is_text(answer):
            found.refused.append(("answer is not valid Unicode", place))
        else:
            found.captions.append(answer)
            found.prompts.append(question)
    if kind:
        found.question_types = [kind] * len(found.captions)
    row.add(found)


def _answers(value):
    """The answers of one question: a list of strings and None."""
    if isinstance(value, list):
        return [answer for each in value for answer in _answers(each) or [None]]
    if isinstance(value, dict) and "answer" in value:
        return _answers(value["answer"])
    if isinstance(value, str):
        return [value]
    if type(value) in (int, float):
        return [str(value)]
    if value is not None:
        raise ValueError(f"the answer is {_what(value)}")
    return []


def _label(value):
    """Parses a label: an int64, a class name, or None."""
    if isinstance(value, str):
        # A class name must fit a line of a list of names.
        return " ".join(value.split()) or None
    if value is None:
        return None
    if type(value) is not int:
        raise ValueError(f"'label' is {_what(value)}")
    # -1 means none, in TFDS and in our records.
    if not -1 <= value < _INT64:
        raise ValueError(
            f"'label' must be in [0, 2**63). Received: {str(value)[:40]}"
        )
    return None if value == -1 else value
