"""Webdataset tar shards, read in place.

Consecutive files of a shard with the same name up to the first dot are one
sample: 0001.jpg, 0001.txt, 0001.json. A shard is scanned once, when it is first
opened. Then its index (`shard_index.py`) holds for each sample the position of
the image and everything else: the record of `schema.py` up to the image, so
that this followed by the image's bytes is such a record. Resuming inside a
shard reads none of the images before.

Dimensions:
    n: samples of a block.
"""

import itertools
import json
import os
import struct
import tarfile

import numpy as np
import tensorflow as tf

from cappa_tf.data import text
from cappa_tf.data.images import formats
from cappa_tf.data.sources import shard_index
from cappa_tf.data.sources.base import Records, read_tfrecords
from cappa_tf.data.stream import shuffling
from cappa_tf.utils import files

# Number of samples read at a time.
_BLOCK = 32
# Names of image files, without the dot.
_IMAGES = tuple(suffix[1:] for suffix in formats.EXTENSIONS)
_ROW = struct.Struct("<qq")  # offset and size of the image


class WebDataset:
    """A source of tar shards.

    Args:
        path: A pattern with {split}, a dict from split to pattern, or a
            folder with train-*.tar or train/*.tar, as in
            `shard_index.find_files`.
        image: Names of the image file, after the first dot; the first one that
            a sample has is used. None for every suffix of image files.
        captions: Names of the captions' file; "json:caption" is the field
            "caption" of the file json, a string or a list of strings.
        label: Names of the class number's file, such as "cls" or "json:label".
        caption_per_line: Whether each line of a text file is a caption.
    """

    def __init__(
        self,
        path: str | os.PathLike | dict,
        image: tuple | list | None = None,
        captions: tuple | list = ("txt", "caption", "json:caption"),
        label: tuple | list = ("cls", "json:label"),
        caption_per_line: bool = False,
    ):
        image = _IMAGES if image is None else image
        names = {"image": image, "captions": captions, "label": label}
        for name, value in names.items():
            if not isinstance(value, tuple | list):
                raise ValueError(
                    f"`{name}` must be a list of names. Received: "
                    f"{name}={value!r}"
                )
        self._path = path
        self._names = (list(image), list(captions), list(label))
        self._caption_per_line = caption_per_line
        self.name = str(path)

    def split(self, split):
        """Returns the `Records` of a split."""
        found = shard_index.find_files(self._path, split, ".tar")
        settings = ["tar", split, *self._names, self._caption_per_line]
        shards = shard_index.Index(found, settings, self._scan)
        return _TarRecords(f"{self.name} {split}", shards, self._names[1])

    def _scan(self, path, output):
        """Writes the index rows of one shard, as `scan` of `Index`."""
        shard = _Shard(path)
        count = most = 0
        with (
            files.replacing(output, remote=True) as unfinished,
            tf.io.TFRecordWriter(unfinished) as writer,
        ):
            for sample in shard.samples(self._wanted()):
                captions, label, is_lost = self._texts(sample, shard)
                image = next(
                    (
                        sample.files[n]
                        for n in self._names[0]
                        if n in sample.files
                    ),
                    None,
                )
                if image is None or not image[1]:
                    shard.problem("no image", sample.key)
                    continue
                if is_lost:
                    continue  # already counted
                head = _head(sample.key, captions, label, image[1])
                writer.write(_ROW.pack(*image) + head)
                count += 1
                most = max(most, len(captions))
        return count, most, shard.problems

    def _wanted(self):
        """Names of the files to read into the index."""
        names = self._names[1] + self._names[2]
        return {name.split(":")[0] for name in names}

    def _texts(self, sample, shard):
        """Captions and label of a sample.

        Returns:
            (captions, label or None, whether all texts were invalid).
        """
        found, refused = self._value(sample, self._names[1], shard)
        if isinstance(found, _Text):
            found = [found]
            if self._caption_per_line:
                found = list(text.lines(found[0]))
        elif not isinstance(found, list):
            found = [found]
        captions = []
        for caption in found:
            if isinstance(caption, str) and text.is_text(caption):
                captions.append(caption.strip())
            elif caption is not None:
                refused = True
                shard.problem("caption is not text", sample.key)
        captions = list(filter(None, captions))
        label, _ = self._value(sample, self._names[2], shard)
        try:
            label = _label(label)
        except ValueError:
            shard.problem("label is not an integer", sample.key)
            label = None
        return captions, label, refused and not captions and label is None

    def _value(self, sample, names, shard):
        """Value of the first of the names that a sample has.

        Returns:
            (`_Text`, JSON value or None; whether a file was invalid).
        """
        refused = False
        for name in names:
            file, _, field = name.partition(":")
            if file not in sample.texts:
                continue
            try:
                content = text.decode(sample.texts[file])
            except ValueError:
                shard.problem("text is not UTF-8", f"{sample.key}.{file}")
                refused = True
                continue
            if not field:
                return _Text(content), refused
            try:
                value = json.loads(content).get(field)
            except (ValueError, AttributeError, RecursionError):
                shard.problem("json cannot be read", sample.key)
                refused = True
                continue
            if value is not None:
                return value, refused
        return None, refused


class _Text(str):
    """The contents of a text file, other than a string in JSON."""


def _label(value):
    """Parses the class number in a text file or JSON; None for none."""
    if value is None or isinstance(value, bool | float):
        if value is not None:
            raise ValueError("not an integer")
        return None
    try:
        value = int(value)
    except TypeError:
        raise ValueError("not an integer") from None
    if not -1 <= value < 1 << 63:
        raise ValueError("not an int64 from 0 on")
    return None if value == -1 else value


class _Sample:
    """The files of one sample: name -> (offset, size), name -> contents."""

    def __init__(self, key):
        self.key = key
        self.files = {}
        self.texts = {}


class _Shard:
    """One tar file, scanned in order.

    Attributes:
        problems: Dict reason -> (count, name of the first), as in
            `shard_index.IndexedShard`.
    """

    def __init__(self, path):
        self._path = path
        self.problems = {}

    def problem(self, reason, name):
        """Notes one item that is left out."""
        count, first = self.problems.get(reason, (0, name))
        self.problems[reason] = (count + 1, first)

    def samples(self, wanted):
        """Yields `_Sample`s, with the contents of the files `wanted`."""
        size = tf.io.gfile.stat(self._path).length
        # End of the last complete sample, and number of complete samples.
        self._end = self._count = 0
        with shard_index.open_binary(self._path) as file:
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    yield from self._samples(tar, wanted, size)
                    end = tar.offset
                # A tar ends with zeros; anything else is not part of a tar.
                file.seek(min(end, size))
                mark = file.read(512)
                if not mark:
                    self.problems[shard_index.DAMAGED] = (
                        0,
                        shard_index.NO_MARK,
                    )
                elif mark.strip(b"\0") and len(mark) < 512:
                    self.problems[shard_index.DAMAGED] = (
                        0,
                        "ends inside a header",
                    )
                elif mark.strip(b"\0"):
                    self._damaged(f"not a tar from byte {end} on", size)
            except EOFError as error:
                self.problems[shard_index.DAMAGED] = (0, str(error))
            except (tarfile.TarError, OSError, tf.errors.OpError) as error:
                self._damaged(str(error), size)

    def _damaged(self, reason, size):
        """Notes damage and how many samples the rest may have held."""
        lost = shard_index.estimate(self._count, self._end, size)
        self.problems[shard_index.DAMAGED] = (lost, reason)

    def _samples(self, tar, wanted, size):
        # macOS adds ._NAME to each NAME; no sample's name begins with a dot.
        found = (
            member
            for member in tar
            if member.isfile()
            and not os.path.basename(member.name).startswith(".")
        )
        shard = os.path.basename(self._path)
        for key, members in itertools.groupby(
            found, lambda m: _split(m.name)[0]
        ):
            sample = _Sample(text.printable(f"{shard}/{key}"))
            for member in members:
                if member.offset_data + member.size > size:
                    raise EOFError(f"ends inside {member.name}")
                name = _split(member.name)[1]
                sample.files[name] = (member.offset_data, member.size)
                if name in wanted:
                    sample.texts[name] = tar.extractfile(member).read()
            tar.members = []  # It would keep them all.
            self._count += 1
            self._end = member.offset_data + member.size
            yield sample


def _split(path):
    """Splits a/b.c.jpg into (a/b, c.jpg)."""
    folder, slash, file = path.rpartition("/")
    stem, _, name = file.partition(".")
    return folder + slash + stem, name.lower()


def _head(key, captions, label, size):
    """The bytes that precede an image in a record of `schema.py`.

    Concatenated protocol buffers are merged into one. The second of two holds
    only the image, which therefore comes last.
    """
    feature = {
        "key": _bytes_feature([key.encode()]),
        "captions": _bytes_feature([c.encode() for c in captions]),
    }
    if label is not None:
        feature["label"] = tf.train.Feature(
            int64_list=tf.train.Int64List(value=[label])
        )
    image = {"image/encoded": _bytes_feature([bytes(size)])}
    return _serialize(feature) + _serialize(image)[:-size]


def _serialize(feature):
    features = tf.train.Features(feature=feature)
    return tf.train.Example(features=features).SerializeToString(
        deterministic=True
    )


def _bytes_feature(values):
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))


class _TarRecords(Records):
    """The samples of indexed tar files."""

    def __init__(self, name, shards, captions):
        super().__init__(name, shards.shards)
        self._index = shards
        self._captions = captions
        self._max_captions = max(s.max_captions for s in self.shards)
        with tf.device("CPU:0"):
            self._paths = tf.constant([s.path for s in self.shards])
            self._sizes = tf.constant(
                [s.num_bytes for s in self.shards], tf.int64
            )
            self._rows = tf.constant(
                [shards.companion(s.path) for s in self.shards]
            )

    @property
    def settings(self):
        """As `Records.settings`: what is read of a sample."""
        return [self._index.digest]

    def check(self, counter):
        """Checks the files, as in `Records`."""
        self._index.check(counter)

    def _where_to_look(self):
        first = next(_Shard(self.shards[0].path).samples(()))
        return (
            f"They are looked for in {', '.join(self._captions)}; the first "
            f"sample, {first.key}, has {', '.join(sorted(first.files))}"
        )

    def read(self, shard, skip, count):
        """Reads records of a shard, as in `Records`.

        Python is called for each block, because TensorFlow has no op that
        reads bytes from an offset, other than `FixedLengthRecordDataset` with
        a header of that length, which took 7 ms of CPU time per image in
        shards of 67 MB.
        """
        path, num_bytes = self._paths[shard], self._sizes[shard]

        def read_block(rows):
            block = tf.numpy_function(
                _read_block, [path, num_bytes, rows], tf.string
            )
            return tf.ensure_shape(block, [None])

        rows = read_tfrecords(self._rows[shard], skip, count)
        return rows.batch(_BLOCK).map(read_block).unbatch()


def _read_block(path, num_bytes, rows):
    """Records of one block of rows.

    Args:
        path: Path of the tar file.
        num_bytes: Its size when it was indexed. If the size has changed, the
            old offsets are not used.
        rows: bytes [n].

    Returns:
        bytes [n], the records; `LOST` and the path for lost ones.
    """
    records = np.full(rows.shape, shuffling.LOST + path, object)
    try:
        with shard_index.open_binary(path.decode()) as file:
            if file.seek(0, os.SEEK_END) != num_bytes:
                return records
            for i, row in enumerate(rows):
                if row.startswith(shuffling.LOST):
                    continue
                offset, size = _ROW.unpack_from(row)
                file.seek(offset)
                records[i] = row[_ROW.size :] + file.read(size)
    except (OSError, tf.errors.OpError):
        pass  # The remaining records are lost.
    return records
