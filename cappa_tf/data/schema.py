"""Record schema, and the sharded, atomic writer of data sets.

One record is one image with all its captions:

    image/encoded  bytes        JPEG, PNG, GIF, BMP or WebP file contents
    captions       bytes list   UTF-8, one or more
    key            bytes        unique name (usually that of the file)
    label          int64        optional class
    prompts        bytes list   optional; captions[i] answers prompts[i]
    question_types bytes list   optional, one for each prompt

A question with several answers, such as the ten of VQAv2, is repeated: one
prompt and one caption for each answer. `questions` groups them again.

Files are `<name>-<split>.tfrecord-00000-of-00008`; `dataset.json` beside them
lists them (`description.DatasetDescription`), and so do the files TFDS needs.
"""

import collections
import contextlib
import dataclasses
import os

import tensorflow as tf

from cappa_tf.data.description import DatasetDescription
from cappa_tf.data.prepare import dataset_writer
from cappa_tf.utils import files

__all__ = [
    "DatasetDescription",
    "Example",
    "Question",
    "ShardWriter",
    "deserialize",
    "parse",
    "questions",
    "serialize",
    "write_dataset",
]

# Lists that are parallel to the captions.
_PARALLEL = ("prompts", "question_types")


@dataclasses.dataclass
class Example:
    """One image with its captions.

    Attributes:
        key: Unique name, for logs, sheets and results.
        image: Contents of an image file.
        captions: One or more captions.
        label: Class number, or None.
        prompts: The question or other text that each caption answers, one for
            each caption ("" for a caption without one); None if there are none.
        question_types: Type of the question of each caption, such as "yes/no"
            ("" if unknown); None if there are none.
    """

    key: str
    image: bytes
    captions: list[str]
    label: int | None = None
    prompts: list[str] | None = None
    question_types: list[str] | None = None


@dataclasses.dataclass
class Question:
    """One question about an image with all of its answers.

    Attributes:
        text: The question.
        answers: One or more answers, in the order of the record.
        type: Type of the question, "" if unknown.
    """

    text: str
    answers: list[str]
    type: str = ""


def questions(example):
    """Groups the captions of an `Example` by their prompts.

    Returns:
        A list of `Question`s in the order in which they first occur; captions
        without a prompt are left out.
    """
    found = {}
    prompts = example.prompts or []
    types = example.question_types or [""] * len(prompts)
    for prompt, answer, kind in zip(prompts, example.captions, types):
        if prompt:
            question = found.setdefault(prompt, Question(prompt, [], kind))
            question.answers.append(answer)
    return list(found.values())


def serialize(example, further=None):
    """Turns an `Example` into the bytes of one record (tf.train.Example).

    Args:
        example: The `Example`.
        further: Dict of further features, name -> bytes or list of floats,
            which `parse` and `deserialize` ignore.

    Raises:
        ValueError: If there is not one prompt, or one question type, for each
            caption.
    """
    _check_parallel(example)
    feature = {
        "image/encoded": _bytes_feature([example.image]),
        "captions": _bytes_feature([c.encode() for c in example.captions]),
        "key": _bytes_feature([example.key.encode()]),
    }
    if example.label is not None:
        feature["label"] = tf.train.Feature(
            int64_list=tf.train.Int64List(value=[example.label])
        )
    # Absent unless needed, so that records without prompts keep their bytes.
    for name in _PARALLEL:
        if getattr(example, name) is not None:
            feature[name] = _bytes_feature(
                [value.encode() for value in getattr(example, name)]
            )
    for name, value in (further or {}).items():
        feature[name] = _feature(value)
    features = tf.train.Features(feature=feature)
    # Maps have no order in a protocol buffer: deterministic=True sorts them,
    # so that the same input gives the same shards, byte for byte.
    return tf.train.Example(features=features).SerializeToString(
        deterministic=True
    )


def deserialize(serialized):
    """The inverse of `serialize`, in Python.

    Raises:
        ValueError: If the bytes are not a record of this schema.
    """
    try:
        feature = tf.train.Example.FromString(serialized).features.feature
    except Exception as error:  # DecodeError's module moves between versions.
        raise ValueError(f"not a tf.train.Example: {error}") from None
    image = feature["image/encoded"].bytes_list.value
    if not image:
        raise ValueError("the record has no feature 'image/encoded'")
    key = feature["key"].bytes_list.value
    label = feature["label"].int64_list.value
    example = Example(
        key=key[0].decode(errors="replace") if key else "",
        image=image[0],
        captions=_texts(feature, "captions"),
        label=label[0] if label else None,
        # An absent list is an empty one.
        **{name: _texts(feature, name) or None for name in _PARALLEL},
    )
    _check_parallel(example)
    return example


def parse(serialized):
    """Parses one record in a TensorFlow graph.

    Args:
        serialized: Scalar string tensor.

    Returns:
        Dict of "image/encoded" and "key", scalar strings; "captions", string
        [number of captions]; "prompts", string [number of captions], or [0]
        if the record has none; and "label", scalar int64 (-1 for none).
    """
    texts = tf.io.FixedLenSequenceFeature([], tf.string, allow_missing=True)
    record = tf.io.parse_single_example(
        serialized,
        {
            "image/encoded": tf.io.FixedLenFeature([], tf.string),
            "captions": texts,
            "prompts": texts,
            "key": tf.io.FixedLenFeature([], tf.string, default_value=""),
            "label": tf.io.FixedLenFeature([], tf.int64, default_value=-1),
        },
    )
    # Fails if there are prompts, but not one for each caption.
    count = tf.size(record["prompts"])
    record["prompts"] = tf.reshape(
        record["prompts"],
        [tf.where(count > 0, tf.size(record["captions"]), 0)],
    )
    return record


def write_dataset(
    examples,
    output_dir,
    name,
    num_shards=8,
    metadata=None,
    overwrite=False,
):
    """Writes examples as shards with a description, all or nothing.

    Shards are written in a hidden folder inside `output_dir` and renamed when
    all are complete. The description is written last, so that a folder with a
    dataset.json holds a complete data set. Example i of a split goes to shard
    i modulo the number of shards; a split with fewer examples than shards gets
    one shard per example. The same examples yield the same bytes.

    Args:
        examples: A dict split -> iterable of `Example`, or an iterable of
            (split, `Example`); read once, never held in memory.
        output_dir: Folder to write to; created if missing.
        name: Name of the data set.
        num_shards: Number of shards per split, or a dict split -> number.
        metadata: JSON-able dict stored in the description. Its "source", if
            any, distinguishes data sets of the same name.
        overwrite: Whether an existing data set of another name or source may
            be replaced. One of the same name and source always is.

    Returns:
        The `DatasetDescription`.

    Raises:
        ValueError: If there are no examples, a name is invalid, or the folder
            holds something else.
    """
    output_dir = os.fspath(output_dir)
    metadata = metadata or {}
    dataset_writer.check_name("name", name)
    dataset_writer.check_output(output_dir, name, metadata, overwrite)
    files.makedirs(output_dir)
    with _incomplete_directory(output_dir) as temporary:
        writers = {}
        with contextlib.ExitStack() as stack:
            for split, example in _pairs(examples):
                if split not in writers:
                    dataset_writer.check_split(split)
                    writers[split] = stack.enter_context(
                        _SplitWriter(temporary, split, num_shards)
                    )
                writers[split].write(example)
        splits = {split: writer.finish() for split, writer in writers.items()}
        return dataset_writer.publish(output_dir, name, metadata, splits)


class ShardWriter(contextlib.AbstractContextManager):
    """Appends examples to one TFRecord file and counts them.

    Args:
        path: Path of the file, which is created or replaced.
    """

    def __init__(self, path):
        self._path = path
        self._writer = tf.io.TFRecordWriter(path)
        self._num_examples = 0
        self._num_captions = 0
        self._max_captions = 0
        self._labels = collections.Counter()
        self._num_prompts = 0
        self._num_types = 0

    def write(self, example, further=None):
        """Appends an `Example`; `further` is that of `serialize`."""
        self._writer.write(serialize(example, further))
        self._num_examples += 1
        self._num_captions += len(example.captions)
        self._max_captions = max(self._max_captions, len(example.captions))
        if example.label is not None:
            # As JSON has it.
            self._labels[str(example.label)] += 1
        self._num_prompts += sum(map(bool, example.prompts or []))
        self._num_types += sum(map(bool, example.question_types or []))

    def __exit__(self, *error):
        self._writer.close()

    def finish(self):
        """Closes the file; returns the `WrittenShard`."""
        self._writer.close()
        return dataset_writer.WrittenShard(
            path=self._path,
            num_examples=self._num_examples,
            num_captions=self._num_captions,
            max_captions=self._max_captions,
            labels=dict(self._labels),
            num_prompts=self._num_prompts,
            num_question_types=self._num_types,
            num_bytes=tf.io.gfile.stat(self._path).length,
            sha256=files.sha256(self._path),
        )


class _SplitWriter(contextlib.AbstractContextManager):
    """The open shards of one split, under temporary names."""

    def __init__(self, directory, split, num_shards):
        if isinstance(num_shards, dict):
            num_shards = num_shards[split]
        if not isinstance(num_shards, int) or num_shards < 1:
            raise ValueError(
                "`num_shards` must be a positive integer. Received: "
                f"num_shards={num_shards!r} for split {split!r}"
            )
        self._paths = [
            os.path.join(directory, f"{split}-{i:05d}")
            for i in range(num_shards)
        ]
        self._writers = []
        self._num_examples = 0

    def write(self, example):
        """Appends an example to the next shard in turn."""
        shard = self._num_examples % len(self._paths)
        if shard == len(self._writers):
            self._writers.append(ShardWriter(self._paths[shard]))
        self._writers[shard].write(example)
        self._num_examples += 1

    def __exit__(self, *error):
        for writer in self._writers:
            writer.__exit__(*error)

    def finish(self):
        """The `WrittenShard`s, in order."""
        return [writer.finish() for writer in self._writers]


@contextlib.contextmanager
def _incomplete_directory(output_dir):
    """A hidden folder for unfinished shards, deleted at the end."""
    files.remove_abandoned(output_dir)
    path = files.temporary_name(os.path.join(output_dir, "shards"))
    files.makedirs(path)
    try:
        yield path
    finally:
        files.rmtree(path)


def _pairs(examples):
    """Yields (split, example) of either form that `write_dataset` takes."""
    if not isinstance(examples, dict):
        yield from examples
        return
    for split, split_examples in examples.items():
        for example in split_examples:
            yield split, example


def _check_parallel(example):
    for name in _PARALLEL:
        values = getattr(example, name)
        if values is not None and len(values) != len(example.captions):
            raise ValueError(
                f"`{name}` must have one value for each caption. Received: "
                f"{len(values)} {name}, {len(example.captions)} captions of "
                f"{example.key!r}"
            )


def _texts(feature, name):
    """The strings of a feature, none if it is absent."""
    return [
        value.decode(errors="replace")
        for value in feature[name].bytes_list.value
    ]


def _feature(value):
    if isinstance(value, bytes):
        return _bytes_feature([value])
    return tf.train.Feature(float_list=tf.train.FloatList(value=value))


def _bytes_feature(values):
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
