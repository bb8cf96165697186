"""Complete shards become a data set: names, TFDS metadata, description last.

Whoever finds a dataset.json finds a complete data set, because everything else
is in place before it is written and it goes before anything is replaced.
"""

import dataclasses
import json
import os
import re
import tempfile

import tensorflow as tf

from cappa_tf.data import description as description_lib
from cappa_tf.utils import files

# What TFDS needs beside the shards, and how a file of ours is told from one
# of a data set that TFDS itself prepared.
TFDS_INFO = "dataset_info.json"
_TFDS_FILES = frozenset((TFDS_INFO, "features.json", "label.labels.txt"))
_TFDS_DESCRIPTION = "Captioned images, written by cappa_tf."

# What may lie in a data set's folder and is not written here: vocabularies
# and logs. Anything else makes the folder somebody else's.
_COMPANIONS = re.compile(r"(tokenizer\..*|.*\.log|\..*)")


@dataclasses.dataclass(frozen=True)
class WrittenShard:
    """A complete TFRecord file that has no final name yet.

    Attributes:
        path: Where it lies.
        num_examples: Records in it.
        num_captions: Captions of all its records.
        max_captions: Captions of the record that has most of them.
        num_labels: Records with a label.
        num_bytes: Size of the file.
        sha256: Hexadecimal digest of the file.
    """

    path: str
    num_examples: int
    num_captions: int
    max_captions: int
    num_labels: int
    num_bytes: int
    sha256: str


def publish(output_dir, name, metadata, splits):
    """Gives complete shards their names and describes them.

    An older version in `output_dir` goes first, its description before all
    else. Shards without a record are left out of the numbering.

    Args:
        output_dir: Folder of the data set, on the file system of the shards.
        name: Name of the data set.
        metadata: JSON-able dict kept in the description.
        splits: A dict split -> list of `WrittenShard`s in order.

    Returns:
        The `DatasetDescription`.

    Raises:
        ValueError: There is no record, or a name does not do.
    """
    check_name("name", name)
    shards = {
        split: [shard for shard in split_shards if shard.num_examples]
        for split, split_shards in splits.items()
    }
    shards = {split: found for split, found in shards.items() if found}
    if not shards:
        raise ValueError(
            f"A data set needs at least one example. Received none for {name!r}"
        )
    for split in shards:
        check_split(split)
    _remove_old(output_dir)
    description = description_lib.DatasetDescription(
        output_dir,
        {
            "name": name,
            "schema_version": description_lib.SCHEMA_VERSION,
            "features": description_lib.FEATURES,
            "metadata": metadata,
            "splits": {
                split: _publish_split(output_dir, name, split, found)
                for split, found in shards.items()
            },
        },
    )
    num_labels = sum(s.num_labels for found in shards.values() for s in found)
    _write_tfds_metadata(description, num_labels)
    description.save()
    return description


def check_output(output_dir, name, metadata=None, overwrite=False):
    """Refuses to write a data set over something that is not the same one.

    Args:
        output_dir: Folder to write to; need not exist.
        name: Name of the data set.
        metadata: Its metadata; "source" tells data sets of a name apart.
        overwrite: Whether another data set may be replaced.

    Raises:
        ValueError: `output_dir` holds another data set (unless `overwrite`)
            or files that are no part of any.
    """
    if not tf.io.gfile.exists(output_dir):
        return
    if not tf.io.gfile.isdir(output_dir):
        raise ValueError(
            f"The output must be a folder. Received: {output_dir}, a file"
        )
    foreign = [
        file
        for file in sorted(tf.io.gfile.listdir(output_dir))
        if not (_is_data_file(file) or _COMPANIONS.fullmatch(file))
    ]
    if not _tfds_metadata_is_ours(output_dir):
        foreign.append(TFDS_INFO)
    if foreign:
        raise ValueError(
            "A data set is written to an empty folder or over its own older "
            f"version. Received: {output_dir}, which holds {foreign[:3]}"
        )
    path = os.path.join(output_dir, description_lib.FILE_NAME)
    if overwrite or not tf.io.gfile.exists(path):
        return
    old = description_lib.DatasetDescription.load(output_dir)
    source = (metadata or {}).get("source")
    if (old.name, old.metadata.get("source")) != (name, source):
        raise ValueError(
            f"{output_dir} already holds the data set {old.name!r} from "
            f"{old.metadata.get('source')!r}; pass overwrite to replace it. "
            f"Received: name={name!r}, source={source!r}"
        )


def check_name(what, value):
    """Names become parts of file names.

    Raises:
        ValueError: `value` has other characters.
    """
    if not isinstance(value, str) or not re.fullmatch(r"\w[\w.-]*", value):
        raise ValueError(
            f"`{what}` must be letters, digits, '_', '.' or '-'. "
            f"Received: {what}={value!r}"
        )


def check_split(split):
    """Split names are parts of file names and of TFDS's split expressions.

    Raises:
        ValueError: The name does not do.
    """
    if (
        not isinstance(split, str)
        or not re.fullmatch(r"\w[\w-]*", split)
        or split == "all"
    ):
        raise ValueError(
            "`split` must be letters, digits, '_' or '-', and not 'all', "
            f"which to TFDS is all splits together. Received: split={split!r}"
        )


def _publish_split(output_dir, name, split, shards):
    """Renames the shards of a split; returns its part of the description."""
    entries = []
    for number, shard in enumerate(shards):
        file = description_lib.shard_name(name, split, number, len(shards))
        files.rename(shard.path, os.path.join(output_dir, file))
        entries.append(
            {
                "file": file,
                "num_examples": shard.num_examples,
                "num_bytes": shard.num_bytes,
                "sha256": shard.sha256,
            }
        )
    return {
        "num_examples": sum(shard.num_examples for shard in shards),
        "num_captions": sum(shard.num_captions for shard in shards),
        "max_captions": max(shard.max_captions for shard in shards),
        "shards": entries,
    }


def _write_tfds_metadata(description, num_labels):
    """Writes what `tfds.builder_from_directory` reads."""
    # Whole files only: what a killed process left must not look foreign.
    with tempfile.TemporaryDirectory() as scratch:
        _tfds_info(description, num_labels, scratch).write_to_directory(scratch)
        for file in sorted(os.listdir(scratch)):
            content = files.read_bytes(os.path.join(scratch, file))
            path = os.path.join(description.directory, file)
            files.write_bytes(path, content)


def _tfds_info(description, num_labels, directory):
    """The `tfds.core.DatasetInfo` of a description.

    TFDS has no feature that may be absent: where only some records have a
    label, it is a sequence of none or one.

    Args:
        description: A `DatasetDescription`.
        num_labels: Records with a label.
        directory: Any local folder; TFDS wants one, and notes it nowhere.
    """
    # Seconds to import, and needed only here.
    import tensorflow_datasets as tfds

    splits = description.content["splits"]
    features = {
        "image/encoded": tfds.features.Image(),
        "captions": tfds.features.Sequence(tfds.features.Text()),
        "key": tfds.features.Text(),
    }
    if num_labels:
        classes = description.metadata.get("classes")
        label = tfds.features.Scalar(tf.int64)
        if classes:
            label = tfds.features.ClassLabel(names=classes)
        if num_labels < sum(s["num_examples"] for s in splits.values()):
            label = tfds.features.Sequence(label)
        features["label"] = label
    info = tfds.core.DatasetInfo(
        builder=tfds.core.dataset_info.DatasetIdentity(
            name=description.name,
            version=tfds.core.Version("1.0.0"),
            data_dir=directory,
            module_name="",
        ),
        description=_TFDS_DESCRIPTION,
        features=tfds.features.FeaturesDict(features),
    )
    template = tfds.core.ShardedFileTemplate(
        dataset_name=description.name,
        data_dir=directory,
        filetype_suffix="tfrecord",
    )
    info.set_splits(
        tfds.core.splits.SplitDict(
            tfds.core.SplitInfo(
                name=name,
                shard_lengths=[s["num_examples"] for s in split["shards"]],
                num_bytes=sum(s["num_bytes"] for s in split["shards"]),
                filename_template=template,
            )
            for name, split in splits.items()
        )
    )
    return info


def _tfds_metadata_is_ours(output_dir):
    """False where TFDS itself prepared a data set in the folder."""
    path = os.path.join(output_dir, TFDS_INFO)
    if not tf.io.gfile.exists(path):
        return True
    try:
        with tf.io.gfile.GFile(path) as file:
            content = json.loads(file.read())
        return content["description"] == _TFDS_DESCRIPTION
    except (ValueError, KeyError, TypeError):
        return False


def _remove_old(output_dir):
    """Removes an older version: its description first, then the rest."""
    path = os.path.join(output_dir, description_lib.FILE_NAME)
    if tf.io.gfile.exists(path):
        tf.io.gfile.remove(path)
    for file in tf.io.gfile.listdir(output_dir):
        if _is_data_file(file):
            tf.io.gfile.remove(os.path.join(output_dir, file))
    files.remove_abandoned(output_dir)


def _is_data_file(file):
    """Whether a file name is one that `publish` gives."""
    return bool(
        re.fullmatch(r".+\.tfrecord-\d{5}-of-\d{5}", file)
        or file.startswith(description_lib.FILE_NAME)
        or file in _TFDS_FILES
    )
