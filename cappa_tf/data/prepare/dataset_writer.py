"""Publication of complete shards as a data set.

A folder with a dataset.json holds a complete data set: that file is written
last, and deleted before anything else is replaced.
"""

import collections
import dataclasses
import json
import os
import re
import tempfile

import tensorflow as tf

from cappa_tf.data import description as description_lib
from cappa_tf.utils import files

# Files that TFDS needs beside the shards, and the description that tells ours
# from those of a data set that TFDS itself prepared.
TFDS_INFO = "dataset_info.json"
_TFDS_FILES = frozenset((TFDS_INFO, "features.json", "label.labels.txt"))
_TFDS_DESCRIPTION = "Captioned images, written by cappa_tf."

# Other files that may be in the folder of a data set: vocabularies and logs. A
# folder with anything else is not overwritten.
_COMPANIONS = re.compile(r"(tokenizer\..*|.*\.log|\..*)")


@dataclasses.dataclass(frozen=True)
class WrittenShard:
    """A complete TFRecord file that has no final name yet.

    Attributes:
        path: Path of the file.
        num_examples: Number of records.
        num_captions: Number of captions of all records.
        max_captions: Maximum number of captions of a record.
        labels: Number of records with each label, a dict of strings.
        num_prompts: Number of captions that answer a prompt.
        num_question_types: Number of captions whose question has a type.
        num_bytes: Size of the file.
        sha256: Hexadecimal digest of the file.
    """

    path: str
    num_examples: int
    num_captions: int
    max_captions: int
    labels: dict
    num_prompts: int
    num_question_types: int
    num_bytes: int
    sha256: str


def publish(output_dir, name, metadata, splits):
    """Gives complete shards their final names and writes the description.

    An older version in `output_dir` is deleted first, beginning with its
    description. Shards without a record are left out of the numbering.

    Args:
        output_dir: Folder of the data set, on the file system of the shards.
        name: Name of the data set.
        metadata: JSON-able dict stored in the description.
        splits: A dict split -> list of `WrittenShard`s in order.

    Returns:
        The `DatasetDescription`.

    Raises:
        ValueError: If there is no record, or a name is invalid.
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
    written = [shard for found in shards.values() for shard in found]
    _write_tfds_metadata(description, written)
    description.save()
    return description


def check_output(output_dir, name, metadata=None, overwrite=False):
    """Checks that a data set would only overwrite its own older version.

    Args:
        output_dir: Folder to write to; need not exist.
        name: Name of the data set.
        metadata: Its metadata; "source" distinguishes data sets of one name.
        overwrite: Whether another data set may be replaced.

    Raises:
        ValueError: If `output_dir` holds another data set (unless `overwrite`)
            or files that do not belong to a data set.
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
            "A data set must be written to an empty folder or over its own "
            f"older version. Received: {output_dir}, which holds {foreign[:3]}"
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
    """Checks that a name can be part of file names.

    Raises:
        ValueError: If it has other characters.
    """
    if not isinstance(value, str) or not re.fullmatch(r"\w[\w.-]*", value):
        raise ValueError(
            f"`{what}` must consist of letters, digits, '_', '.' or '-'. "
            f"Received: {what}={value!r}"
        )


def check_split(split):
    """Checks that a split's name is valid in file names and for TFDS.

    Raises:
        ValueError: If it is not.
    """
    if (
        not isinstance(split, str)
        or not re.fullmatch(r"\w[\w-]*", split)
        or split == "all"
    ):
        raise ValueError(
            "`split` must consist of letters, digits, '_' or '-', and not be "
            "'all', which to TFDS means all splits together. Received: "
            f"split={split!r}"
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
    num_prompts = sum(shard.num_prompts for shard in shards)
    labels = collections.Counter()
    for shard in shards:
        labels.update(shard.labels)
    return {
        "num_examples": sum(shard.num_examples for shard in shards),
        "num_captions": sum(shard.num_captions for shard in shards),
        "max_captions": max(shard.max_captions for shard in shards),
        **({"num_prompts": num_prompts} if num_prompts else {}),
        "labels": {k: labels[k] for k in sorted(labels, key=int)},
        "shards": entries,
    }


def _write_tfds_metadata(description, shards):
    """Writes the files that `tfds.builder_from_directory` reads."""
    # Written atomically: a partial file of a killed process would look foreign.
    with tempfile.TemporaryDirectory() as scratch:
        _tfds_info(description, shards, scratch).write_to_directory(scratch)
        for file in sorted(os.listdir(scratch)):
            content = files.read_bytes(os.path.join(scratch, file))
            path = os.path.join(description.directory, file)
            files.write_bytes(path, content)


def _tfds_info(description, shards, directory):
    """The `tfds.core.DatasetInfo` of a description.

    TFDS has no optional features: if only some records have a label, it is a
    sequence of zero or one.

    Args:
        description: A `DatasetDescription`.
        shards: All `WrittenShard`s, which tell the features in use.
        directory: Any local folder; TFDS requires one but does not store it.
    """
    # Takes seconds to import, and is needed only here.
    import tensorflow_datasets as tfds

    splits = description.content["splits"]
    features = {
        "image/encoded": tfds.features.Image(),
        "captions": tfds.features.Sequence(tfds.features.Text()),
        "key": tfds.features.Text(),
    }
    # An absent list is an empty sequence.
    texts = tfds.features.Sequence(tfds.features.Text())
    if any(shard.num_prompts for shard in shards):
        features["prompts"] = texts
    if any(shard.num_question_types for shard in shards):
        features["question_types"] = texts
    num_labels = sum(sum(shard.labels.values()) for shard in shards)
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
    """Whether the folder holds no data set that TFDS itself prepared."""
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
    """Whether `publish` writes a file of this name."""
    return bool(
        re.fullmatch(r".+\.tfrecord-\d{5}-of-\d{5}", file)
        or file.startswith(description_lib.FILE_NAME)
        or file in _TFDS_FILES
    )
