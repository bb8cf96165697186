"""Shards of annotations: TFRecord with the images, or Parquet without them.

    TFRecord   the record of `schema.py` with "log_likelihoods" (of each
               caption), "scores" (of each caption or label) and "best" (label),
               or "embedding"; bad records are left out
    Parquet    the columns key, label, captions, prompts, log_likelihoods,
               scores, best, embedding and error, as far as they are used; a
               row for each record, also for a bad one

Parquet needs the extra 'parquet' (pyarrow).
"""

import contextlib
import math
import os

import tensorflow as tf

from cappa_tf.data import schema
from cappa_tf.data.prepare import dataset_writer
from cappa_tf.utils import files
from cappa_tf.utils.arguments import check_extra

# Further features of records, and what their values are.
FEATURES = {
    "captions": {"log_likelihoods": "float32 [captions], NaN for older ones"},
    "scores": {"scores": "float32 [captions]"},
    "labels": {"scores": "float32 [labels]", "best": "bytes"},
    "embeddings": {"embedding": "float32 [width]"},
}


def what(options):
    """The key of `FEATURES` for `AnnotationOptions`."""
    return "labels" if options.labels is not None else options.write


@contextlib.contextmanager
def tfrecord_shard(path, options):
    """Yields a `TFRecordShard`; the file appears when it is complete."""
    del options
    with (
        files.replacing(path, remote=True) as unfinished,
        schema.ShardWriter(unfinished) as writer,
    ):
        yield TFRecordShard(writer)


class TFRecordShard:
    """Writes annotations as records.

    Args:
        writer: `schema.ShardWriter`.
    """

    def __init__(self, writer):
        self._writer = writer

    def write(self, one):
        """Appends an `Annotation`, unless its record is bad."""
        if one.example is None:
            return
        further = {
            name: x.encode() if isinstance(x, str) else x
            for name, x in one.values.items()
        }
        self._writer.write(one.example, further)

    def finish(self):
        """Closes the file; returns the `dataset_writer.WrittenShard`."""
        return self._writer.finish()


@contextlib.contextmanager
def parquet_shard(path, options):
    """Yields a `ParquetShard`; the file appears when it is complete."""
    check_extra("format=parquet", "parquet", "pyarrow")
    with files.replacing(path) as unfinished:
        yield ParquetShard(unfinished, options)


class ParquetShard:
    """Writes annotations as rows.

    Args:
        path: Path of the file.
        options: `AnnotationOptions`.
    """

    def __init__(self, path, options):
        self._path, self._options = path, options
        self._rows = []

    def write(self, one):
        """Appends an `Annotation`."""
        example = one.example
        row = {"key": one.key, "error": one.error}
        if example is not None:
            row |= {
                "label": example.label,
                "captions": example.captions,
                "prompts": example.prompts,
            }
        # NaN is a number in Parquet; "none" is null.
        row |= {
            name: [None if math.isnan(x) else x for x in value]
            if isinstance(value, list)
            else value
            for name, value in one.values.items()
        }
        self._rows.append(row)

    def finish(self):
        """Writes the file; returns a `dataset_writer.WrittenShard`."""
        import pyarrow
        from pyarrow import parquet

        numbers = pyarrow.list_(pyarrow.float64())
        texts = pyarrow.list_(pyarrow.string())
        kinds = {
            "captions": {"captions": texts, "log_likelihoods": numbers},
            "scores": {"captions": texts, "prompts": texts, "scores": numbers},
            "labels": {"scores": numbers, "best": pyarrow.string()},
            "embeddings": {"embedding": pyarrow.list_(pyarrow.float32())},
        }
        columns = {
            "key": pyarrow.string(),
            "label": pyarrow.int64(),
            **kinds[what(self._options)],
            "error": pyarrow.string(),
        }
        table = pyarrow.Table.from_pylist(
            self._rows, schema=pyarrow.schema(columns.items())
        )
        parquet.write_table(table, self._path)
        captions = [len(row.get("captions") or ()) for row in self._rows]
        return dataset_writer.WrittenShard(
            path=self._path,
            num_examples=len(self._rows),
            num_captions=sum(captions),
            max_captions=max(captions, default=0),
            labels={},
            num_prompts=0,
            num_question_types=0,
            num_bytes=os.path.getsize(self._path),
            sha256=files.sha256(self._path),
        )


SHARDS = {"tfrecord": tfrecord_shard, "parquet": parquet_shard}
# Parquet has no dataset.json, which describes records. This file is the last.
PARQUET_DESCRIPTION = "annotation.json"


def publish_parquet(output, name, metadata, splits):
    """Gives complete Parquet shards their final names and describes them.

    Args:
        output: Folder, of which an older version is removed first.
        name: First part of the files' names.
        metadata: JSON-able dict for the description, `PARQUET_DESCRIPTION`.
        splits: Dict split -> list of `dataset_writer.WrittenShard`s in order.
    """
    described = os.path.join(output, PARQUET_DESCRIPTION)
    if files.exists(described):
        files.remove(described)
    for file in files.listdir(output):
        if file.endswith(".parquet"):
            files.remove(os.path.join(output, file))
    content = {}
    for split, shards in splits.items():
        content[split] = {"num_examples": 0, "shards": []}
        for number, shard in enumerate(shards):
            file = f"{name}-{split}-{number:05d}-of-{len(shards):05d}.parquet"
            files.rename(shard.path, os.path.join(output, file))
            content[split]["num_examples"] += shard.num_examples
            content[split]["shards"].append(
                {
                    "file": file,
                    "num_examples": shard.num_examples,
                    "num_bytes": shard.num_bytes,
                    "sha256": shard.sha256,
                }
            )
    found = {"name": name, "metadata": metadata, "splits": content}
    files.write_json(described, found)


def check_parquet_output(output):
    """Checks that a folder holds nothing but an older version.

    Args:
        output: The folder; need not exist.

    Raises:
        ValueError: It holds other files.
    """
    if not files.exists(output):
        return
    if not tf.io.gfile.isdir(output):
        raise ValueError(
            f"The output must be a folder. Received: {output}, a file"
        )
    names = sorted(files.listdir(output))
    ours = PARQUET_DESCRIPTION in names
    foreign = [
        name
        for name in names
        if not name.startswith(".")
        and not name.endswith(".log")
        and not (ours and name.endswith((".parquet", PARQUET_DESCRIPTION)))
        # Of a run that was killed while it published.
        and not ("-of-" in name and name.endswith(".parquet"))
    ]
    if foreign:
        raise ValueError(
            "The output must be an empty folder or hold an older version. "
            f"Received: {output}, which holds {foreign[:3]}"
        )
