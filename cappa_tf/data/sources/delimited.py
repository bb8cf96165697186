"""Delimited text tables, with comma, tab, semicolon or bar.

A row is a line, unless a quoted field continues on the next lines. A quote that
is not closed costs only its own row; the following lines are read as rows
again.
"""

import contextlib
import csv
import itertools
import json
import os
import re

from cappa_tf.data import text
from cappa_tf.data.sources import folder_listing, table_rows

DELIMITERS = ",\t;|"
# Limit of one field, over all its lines.
_MOST_CHARACTERS = csv.field_size_limit()
_WANTED = frozenset(
    (
        *table_rows.IMAGE_COLUMNS,
        *table_rows.CAPTION_COLUMNS,
        *table_rows.QUESTION_COLUMNS,
    )
)
_INTEGER = re.compile(r"[-+]?[0-9]+")
_DECIMAL = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?", re.I)


class NotATableError(ValueError):
    """The file is not a table of images."""


class DelimitedTable:
    """The records of one file.

    Args:
        content: Text of the file.
        name: Name of the file, for messages.
        root: Folder that image paths are relative to.

    Raises:
        NotATableError: If its first line has neither an image column nor an
            image.
    """

    def __init__(self, content, name, root):
        self._lines = list(text.lines(content))
        self._name, self._root = name, root
        self._has_header = True
        first = next((i for i, x in enumerate(self._lines) if x.strip()), None)
        self._begin = len(self._lines) if first is None else first
        if first is not None:
            self._read_header(self._lines[first])

    def _read_header(self, line):
        """Finds delimiter, columns and first row."""
        found = []
        for delimiter in DELIMITERS:
            try:
                cells = _parse([line], delimiter)
            except csv.Error:  # Reported when the row is read.
                cells = [x.strip(' "') for x in line[:1000].split(delimiter)]
            columns = [table_rows.column(cell) for cell in cells]
            # A text file with one name per line is a list, not a table.
            if len(cells) > 1 or not self._name.lower().endswith(".txt"):
                found.append((delimiter, columns, cells[0].strip(), len(cells)))
        for delimiter, columns, _, _ in found:
            names = set(columns) & set(table_rows.IMAGE_COLUMNS)
            # A caption may be the word "image".
            if names and not any(map(folder_listing.is_image, columns)):
                self._delimiter, self._columns = delimiter, columns
                self._begin += 1
                self._is_literal = delimiter == "|"
                return
        whole = [row for row in found if row[3] > 1] or found
        best = max(whole, key=lambda row: self._is_image(row[2]), default=None)
        if best is None or not self._is_image(best[2]):
            raise NotATableError(
                f"{self._name}:{self._begin + 1}: neither a header with an "
                f"image column ({', '.join(table_rows.IMAGE_COLUMNS)}) nor a "
                f"row that begins with an image. Received: {line[:80]!r}"
            )
        self._delimiter, self._columns = best[0], ["image", "caption"]
        self._has_header = False
        self._is_literal = self._delimiter in "|\t"

    def _is_image(self, cell):
        """How likely a cell is the name of an image: 0, 1 or 2."""
        name = _without_number(cell)
        if folder_listing.is_image(name):
            return 2
        if not name or not text.is_text(name):
            return 0
        return int(folder_listing.is_file(os.path.join(self._root, name)))

    def records(self):
        """Yields (place, record or `ValueError`)."""
        number = self._begin
        while number < len(self._lines):
            if not self._lines[number].strip():
                number += 1
                continue
            place = f"{self._name}:{number + 1}"
            try:
                cells, count = self._row(number)
                yield place, self._record(cells)
            except (csv.Error, ValueError) as error:
                count = 1
                yield place, ValueError(str(error))
            number += count

    def _row(self, number):
        """Cells of the row that begins at a line, and its number of lines."""
        line = self._lines[number]
        try:
            return _parse([line], self._delimiter), 1
        except csv.Error as error:
            problem = error
        try:
            used = []
            cells = _parse(self._field_lines(number, used), self._delimiter)
            return cells, len(used)
        except csv.Error:
            pass
        if self._is_literal:
            # In formats without quoting, a quote is an ordinary character.
            return _parse([line], self._delimiter, csv.QUOTE_NONE), 1
        if "unexpected end of data" in str(problem):
            raise ValueError("a quote is not closed")
        raise ValueError(str(problem))

    def _field_lines(self, number, used):
        """Yields the lines that a quoted field may continue on."""
        length = 0
        for line in itertools.islice(self._lines, number, None):
            length += len(line)
            if length > _MOST_CHARACTERS or (used and self._is_row(line)):
                return
            used.append(line)
            yield line + "\n"

    def _is_row(self, line):
        """Whether a line begins a row, so that no field continues on it."""
        cells = line.split(self._delimiter)
        place = next(
            i
            for i, name in enumerate(self._columns)
            if name in table_rows.IMAGE_COLUMNS
        )
        return len(cells) > max(place, 1) and folder_listing.is_image(
            _without_number(cells[place].strip(' "'))
        )

    def _record(self, cells):
        """Dict from column to value, with the types of a JSON line."""
        columns = self._columns
        if len(cells) > len(columns):
            raise ValueError(
                f"{len(cells)} fields for {len(columns)} columns (quote "
                "captions)"
            )
        missing = [c for c in columns[len(cells) :] if c in _WANTED]
        if missing:
            raise ValueError(
                f"{len(cells)} fields for {len(columns)} columns: "
                f"no {missing[0]!r}"
            )
        record = {
            name: cell if name in _WANTED else cell.strip() or None
            for name, cell in zip(columns, cells)
        }
        if not self._has_header:
            record["image"] = _without_number(record["image"].strip())
        for name in table_rows.QUESTION_COLUMNS:
            if record.get(name):
                record[name] = _value(record[name])
        if record.get("label"):
            record["label"] = _number(record["label"])
        return record


def _without_number(cell):
    """Turns a.jpg#0 into a.jpg, as Flickr8k.token.txt numbers captions."""
    name = re.sub(r"#\d+$", "", cell)
    return name if folder_listing.is_image(name) else cell


def _parse(lines, delimiter, quoting=csv.QUOTE_MINIMAL):
    """The cells of the first row of some lines.

    Raises:
        csv.Error: If the row is malformed, or a field is too long.
    """
    reader = csv.reader(
        lines,
        delimiter=delimiter,
        quoting=quoting,
        skipinitialspace=True,
        strict=True,
    )
    return next(reader, [])


def _value(cell):
    """A JSON list in a cell, such as ["yes", "no"], or the cell itself."""
    if cell.strip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(cell)
    return cell


def _number(label):
    """Parses the label of a cell, an integer or a class name.

    Raises:
        ValueError: If it is a number, but not an integer.
    """
    if _DECIMAL.fullmatch(label):
        raise ValueError(f"'label' is a float, {label}")
    if not _INTEGER.fullmatch(label):
        return label
    if len(label) > 25:  # Python refuses to read thousands of digits.
        raise ValueError(f"'label' is out of range: {label[:25]}...")
    return int(label)
