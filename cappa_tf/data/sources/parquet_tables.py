"""Parquet tables, with paths of images or with the images themselves.

    caption, image          as in any other table
    caption, image {bytes, path}    Hugging Face's
    question, answers, image, image_id    its questions: rows of one image_id
                            are of one image, stored once
    caption, jpg            img2dataset's, with --output_format=parquet
    caption, key, url       img2dataset's beside its files: 00000.parquet
                            beside 00000/000000000.jpg

This module needs the extra 'parquet' (pyarrow).
"""

import functools
import os
import threading

import tensorflow as tf

from cappa_tf.data.sources import shard_index, table_rows
from cappa_tf.data.sources.delimited import NotATableError

# Columns that hold image files as bytes, in img2dataset and webdataset.
_BYTES_COLUMNS = ("jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
_SUFFIXES = (".jpg", ".png", ".webp", ".jpeg")
_lock = threading.Lock()


def records(path, name, root):
    """Reads a Parquet table.

    Args:
        path: Path of the file.
        name: Its name, for messages.
        root: Folder that image paths are relative to.

    Returns:
        An iterator of (place, record or error).

    Raises:
        NotATableError: If no column holds images.
    """
    table = _open(path)
    columns = {table_rows.column(c): c for c in table.schema_arrow.names}
    binary = {c for c, real in columns.items() if _holds_bytes(table, real)}
    image = next((c for c in table_rows.IMAGE_COLUMNS if c in columns), None)
    content = image if image in binary else None
    if image is None:
        content = next((c for c in _BYTES_COLUMNS if c in binary), None)
    if image is None and content is None and "key" not in columns:
        urls = " (download the images of 'url' first, with img2dataset)"
        raise NotATableError(
            f"{name}: no column holds images: "
            f"{', '.join(table_rows.IMAGE_COLUMNS)}. Received: "
            f"{', '.join(table.schema_arrow.names)}"
            + (urls if "url" in columns else "")
        )
    return _rows(table, path, name, root, columns, image, content)


def _rows(table, path, name, root, columns, image, content):
    wanted = (table_rows.COLUMNS | {"status", "image_id"}) - {content}
    read = [real for c, real in columns.items() if c in wanted]
    number, first = 0, {}
    for group in range(table.num_row_groups):
        if read:
            cells = table.read_row_group(group, columns=read).to_pylist()
        else:
            cells = [{}] * table.metadata.row_group(group).num_rows
        for position, cell in enumerate(cells):
            number += 1
            place = f"{name}, row {number}"
            record = {table_rows.column(c): v for c, v in cell.items()}
            status = record.pop("status", None)
            if status not in (None, "success"):
                yield place, ValueError(f"not downloaded: {status}")
                continue
            if content is not None:
                own = (number - 1, group, position)
                # Hugging Face's tables of questions repeat the image with each.
                identity = record.get("image_id")
                if identity is not None and "question" in record:
                    own = first.setdefault(identity, own)
                record["image"] = f"{os.path.basename(name)}/{own[0]}"
                record["cell"] = [columns[content], *own[1:]]
                record["cell_file"] = path
            elif image is None:
                record["image"] = _file_of_key(root, name, record.get("key"))
            yield place, record


def read_cell(path, cell):
    """Reads the image file that a cell holds.

    Args:
        path: Path of the Parquet file.
        cell: (column, row group, row in the group).

    Returns:
        Bytes, or None if the cell is empty. A path in the cell is relative to
        the folder of the Parquet file.
    """
    column, group, position = cell
    # One thread reads a row group while the others wait for it.
    with _lock:
        values = _read_group(path, column, group)
    value = values[position].as_py()
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            file = os.path.join(os.path.dirname(path), value["path"])
            with tf.io.gfile.GFile(file, "rb") as stream:
                return stream.read()
        value = value.get("bytes")
    return value


@functools.lru_cache(maxsize=2)
def _read_group(path, column, group):
    return _open(path).read_row_group(group, columns=[column]).column(0)


def _open(path):
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{os.path.basename(path)} needs the extra 'parquet': "
            f"pip install 'cappa-tf[parquet]' ({error})"
        ) from None
    try:
        return parquet.ParquetFile(shard_index.open_binary(path))
    except (ArrowException, OSError) as error:
        raise NotATableError(
            f"{os.path.basename(path)}: {str(error).splitlines()[0]}"
        ) from None


def _holds_bytes(table, column):
    """Whether a column holds files: bytes, or a struct {bytes, path}."""
    from pyarrow import types

    kind = table.schema_arrow.field(column).type
    return (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or (types.is_struct(kind) and kind.get_field_index("bytes") >= 0)
    )


def _file_of_key(root, name, key):
    """Path of img2dataset's file with this key, whatever its suffix."""
    folder = os.path.splitext(os.path.basename(name))[0]
    if key is None:
        return None
    stems = [os.path.join(folder, str(key)), str(key)]
    paths = [stem + suffix for stem in stems for suffix in _SUFFIXES]
    for path in paths:
        if tf.io.gfile.exists(os.path.join(root, path)):
            return path
    return paths[0]
