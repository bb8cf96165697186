"""Description of a folder of shards, dataset.json, and its verification."""

import dataclasses
import json
import os

import tensorflow as tf

from cappa_tf.utils import files

FILE_NAME = "dataset.json"
SCHEMA_VERSION = 1
# The record schema for people and for other readers; `schema.parse` implements
# it.
FEATURES = {
    "image/encoded": {"dtype": "bytes", "shape": []},
    "captions": {"dtype": "bytes", "shape": [None]},
    "key": {"dtype": "bytes", "shape": []},
    "label": {"dtype": "int64", "shape": [], "optional": True},
    "prompts": {"dtype": "bytes", "shape": [None], "optional": True},
    "question_types": {"dtype": "bytes", "shape": [None], "optional": True},
}


@dataclasses.dataclass(frozen=True)
class Shard:
    """One TFRecord file of a split, according to the description.

    Attributes:
        path: Full path of the file.
        num_examples: Number of records in it.
        num_bytes: Size of the file.
        sha256: Hexadecimal digest of the file.
    """

    path: str
    num_examples: int
    num_bytes: int
    sha256: str


def shard_name(name, split, number, count):
    """Names shard 3 of 8: pets-train.tfrecord-00003-of-00008."""
    return f"{name}-{split}.tfrecord-{number:05d}-of-{count:05d}"


class DatasetDescription:
    """The parsed dataset.json of one data set folder.

    Args:
        directory: The folder that holds dataset.json and the shards.
        content: The JSON object: "name", "schema_version", "features",
            "splits" (split -> "num_examples", "num_captions",
            "max_captions", "labels", "shards", and "num_prompts" if any caption
            answers a prompt) and "metadata" (free).
    """

    def __init__(self, directory, content):
        self.directory = os.fspath(directory)
        self.content = content

    @classmethod
    def load(cls, directory):
        """Reads the description of a data set.

        Raises:
            ValueError: If there is none, or it has another schema.
        """
        path = os.path.join(os.fspath(directory), FILE_NAME)
        try:
            with tf.io.gfile.GFile(path) as file:
                content = json.loads(file.read())
        except tf.errors.NotFoundError:
            raise ValueError(
                f"A data set must be a folder with a {FILE_NAME} "
                "(cappa-prepare-data writes one; an interrupted "
                f"preparation leaves none). Received: {directory}"
            ) from None
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        _check_content(path, content)
        return cls(directory, content)

    def save(self):
        """Writes dataset.json atomically."""
        path = os.path.join(self.directory, FILE_NAME)
        files.write_json(path, self.content, indent=1)

    @property
    def name(self):
        """Name of the data set, the first part of each shard's name."""
        return self.content["name"]

    @property
    def metadata(self):
        """The writer's notes about the source, a dict of free form."""
        return self.content.get("metadata", {})

    @property
    def splits(self):
        """Names of the splits, in the order in which they were written."""
        return list(self.content["splits"])

    def split(self, split):
        """The JSON object of one split."""
        if split not in self.content["splits"]:
            raise ValueError(
                f"`split` must be one of {self.splits} of {self.directory}. "
                f"Received: split={split!r}"
            )
        return self.content["splits"][split]

    def shards(self, split):
        """The split's shards, in order."""
        return [
            Shard(
                path=os.path.join(self.directory, shard["file"]),
                num_examples=shard["num_examples"],
                num_bytes=shard["num_bytes"],
                sha256=shard["sha256"],
            )
            for shard in self.split(split)["shards"]
        ]

    def num_examples(self, split):
        """Number of records of a split."""
        return self.split(split)["num_examples"]

    def max_captions(self, split):
        """Maximum number of captions of a record of a split."""
        return self.split(split)["max_captions"]

    def num_prompts(self, split):
        """Number of captions of a split that answer a prompt."""
        return self.split(split).get("num_prompts", 0)

    def label_counts(self, split):
        """Dict label -> number of records; None if an old writer left it out.

        Args:
            split: Name of the split.
        """
        counts = self.split(split).get("labels")
        return counts and {int(k): count for k, count in counts.items()}

    def disagreements(self, split, checksums=False):
        """Lists how the shards on disk differ from the description.

        Args:
            split: Name of the split.
            checksums: Whether to also read every byte and compare SHA-256.

        Returns:
            A list of (shard, its size on disk): 0 for a missing shard, the
            expected size if only the checksum differs.
        """
        wrong = []
        for shard in self.shards(split):
            size = file_size(shard.path)
            if size != shard.num_bytes or (
                checksums and files.sha256(shard.path) != shard.sha256
            ):
                wrong.append((shard, size))
        return wrong

    def verify(self, checksums=False):
        """Checks all splits against the files.

        Args:
            checksums: Whether to compare SHA-256 as well as sizes.

        Raises:
            ValueError: If shards are missing or differ; names the first ones.
        """
        wrong = []
        for split in self.splits:
            wrong.extend(self.disagreements(split, checksums))
        if wrong:
            raise ValueError(disagreement_message(self.directory, wrong))


def file_size(path):
    """Size of a file in bytes, 0 if it cannot be read."""
    if not tf.io.gfile.exists(path):
        return 0
    if os.path.exists(path) and not os.access(path, os.R_OK):
        return 0
    return tf.io.gfile.stat(path).length


def disagreement_message(directory, wrong, most=5):
    """One sentence that names the first shards that differ."""
    listed = "; ".join(
        f"{os.path.basename(shard.path)} {_what_differs(shard, size)}"
        for shard, size in wrong[:most]
    )
    more = f" and {len(wrong) - most} more" if len(wrong) > most else ""
    return (
        f"{FILE_NAME} and the shards of {directory} disagree: {listed}{more}. "
        "Write the data set again (cappa-prepare-data) or restore the files."
    )


def _what_differs(shard, size):
    if size == shard.num_bytes:
        return "has another SHA-256"
    if size == 0:
        return "is missing or unreadable"
    return f"has {size} bytes, not {shard.num_bytes}"


def _check_content(path, content):
    """Checks that JSON content is a description of this schema version."""
    missing = {"name", "schema_version", "splits"} - set(content)
    if missing:
        raise ValueError(f"{path} lacks {sorted(missing)}")
    if content["schema_version"] != SCHEMA_VERSION:
        raise ValueError(
            f"{path} must have schema_version {SCHEMA_VERSION}. "
            f"Received: schema_version={content['schema_version']!r}"
        )
    for split, value in content["splits"].items():
        total = sum(shard["num_examples"] for shard in value["shards"])
        if total != value["num_examples"]:
            raise ValueError(
                f"{path}: the shards of split {split!r} hold {total} examples, "
                f"the split {value['num_examples']}"
            )
