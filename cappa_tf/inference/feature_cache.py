"""`FeatureCache`: features of all images of a split, computed once, on disk.

    cache = FeatureCache.open_or_compute(encoder, data, folder="features")
    data.with_features(cache).train(512)    # no image is read any more

A cache belongs to the weights of an encoder, the images of a split and their
preprocessing. They are its key, and name its folder:

    features/pre_logits-1f0c.../
        cache.json      the key, sizes, and whether all is there
        rows            features of all records, in the order of the files, raw
        part-00012.npz  what else is in the records of a part, and the checksum
                        of its rows: written when these are on the disk

A part without its npz file, or with other rows than that knows, is computed
again, and nothing else is: so a killed process goes on where it was.

Dimensions:
    B: images encoded at a time.    N: records of the split.
    M: most captions of a record of a batch.
    P: patches.    D: width.
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import io
import json
import logging
import math
import os
import shutil
import time
import zlib

import keras
import numpy as np
import tensorflow as tf
import tqdm

from cappa_tf.data.stream import features as stream_features
from cappa_tf.saving import weights
from cappa_tf.saving.run_lock import RunLock, WorkdirInUseError
from cappa_tf.utils import arguments, files

KINDS = ("pre_logits", "encoded")
TYPES = ("float32", "float16", "bfloat16")
# Changes whenever what is computed or stored does.
_VERSION = 2
# Records of a part: what a kill loses at most. Fewer where rows are large, more
# where there would be too many parts.
_PART_RECORDS, _PART_BYTES, _MOST_PARTS = 1024, 64 << 20, 4096
# Rows of so many bytes are compared with their checksums when a cache is
# opened; of a larger one, parts at equal distances.
_CHECKED_BYTES = 8 << 30
_THREADS = 4
_SECONDS_BETWEEN_TRIES = 2.0
# Arguments of an encoder that do not change its features.
_WITHOUT_EFFECT = (
    "name",
    "trainable",
    "dropout",
    "patch_dropout",
    "stochastic_depth",
    "remat",
)


class FeatureCache:
    """Features of one split, and the captions and labels beside them.

    Made by `open_or_compute`.

    Attributes:
        path: Folder of this cache.
        row_shape: Shape of the features of an image: (D,) or (P, D).
        dtype: Name of the type they are kept in.
        num_examples: N.
        origin: Log line that says whether they were computed or found.
    """

    @classmethod
    def open_or_compute(
        cls,
        encoder,
        data,
        kind="pre_logits",
        *,
        folder,
        dtype="float32",
        batch_size=64,
        hosts=None,
    ):
        """Opens the cache of a split, and computes what it lacks.

        Several hosts compute a share each, and must see one folder.
        Another process that computes the same cache is waited for.

        Args:
            encoder: Built `VisionEncoder`.
            data: `CaptionDataset` of the split.
            kind: "pre_logits" or "encoded", the output of the encoder.
            folder: Folder of all caches, on a disk.
            dtype: Type to keep them in: "float32", "float16" or "bfloat16".
            batch_size: B.
            hosts: The `Hosts` of a run on several; every host must call this.

        Raises:
            ValueError: If the folder cannot be used, has no room, or holds a
                file of another cache under this one's name.
        """
        arguments.check_choice(KINDS, kind=kind)
        arguments.check_choice(TYPES, dtype=dtype)
        arguments.check_counts(batch_size=batch_size)
        if files.is_remote(folder):
            raise ValueError(
                "FEATURE_CACHE (`folder`) must be on a disk, as features are "
                f"read from anywhere in a file. Received: folder={folder!r}"
            )
        if kind not in encoder.output_shapes():
            raise ValueError(
                f"The encoder has no {kind!r}. Received: "
                f"pooling={encoder.pooling!r}"
            )
        self = cls()
        self.key = cache_key(encoder, data, kind, dtype)
        digest = _digest(self.key)
        self.path = os.path.join(folder, f"{kind}-{digest[:16]}")
        self.num_examples, self.dtype = data.num_examples, dtype
        self.row_shape = encoder.output_shapes()[kind]
        self._name = f"{data.path} {data.split}"
        self._numpy_type = tf.as_dtype(dtype).as_numpy_dtype
        self._row_bytes = (
            math.prod(self.row_shape) * np.dtype(self._numpy_type).itemsize
        )
        self._part_size = _part_size(self.num_examples, self._row_bytes)
        # Of the files of this cache, whose parts are of this size.
        self._id = f"{digest}-{self._part_size}"
        start = time.monotonic()
        computed = self._compute_missing(encoder, data, kind, batch_size, hosts)
        self._open()
        self.origin = (
            f"features of {self._name}: {self.num_examples:,} x "
            f"{list(self.row_shape)} {dtype}, "
            + (
                f"{computed:,} computed in {time.monotonic() - start:.0f} s, in"
                if computed
                else "read from"
            )
            + f" {self.path}"
        )
        return self

    def _compute_missing(self, encoder, data, kind, batch_size, hosts):
        """Computes what the cache lacks; returns the number of its examples.

        Each host computes a share. What fails on one fails on all of them.
        """
        index, count = (0, 1) if hosts is None else (hosts.index, hosts.count)
        gather = (lambda value: [value]) if hosts is None else hosts.gather

        def agreed(action):
            """Does it on all hosts; if one fails, all of them do."""
            problem = result = None
            try:
                result = action()
            except (ValueError, OSError) as error:
                problem = error
            messages = [m for m in gather(problem and str(problem)) if m]
            if messages:
                raise ValueError(messages[0]) from problem
            return result

        if not any(gather(agreed(self._missing))):
            return 0
        with contextlib.ExitStack() as stack:
            if index == 0:
                agreed(lambda: self._prepare(stack))
            else:
                agreed(lambda: None)
            # Another process may have computed them in the meantime.
            missing = agreed(self._missing)
            begin, end = (len(missing) * i // count for i in (index, index + 1))
            own = missing[begin:end]
            computed = agreed(
                lambda: self._compute(
                    own, encoder, data, kind, batch_size, index == 0
                )
            )
            computed = sum(gather(computed))
            missing = agreed(self._missing)
            agreed(lambda: self._check_all(missing))
            if index == 0:
                self._describe(complete=True)
        return computed

    # Reading.

    def rows(self, numbers):
        """Looks up records.

        Args:
            numbers: int64 [B], record numbers; a negative one is padding.

        Returns:
            (features [B, ...]; captions, objects [B, M], bytes filled up with
            b""; their prompts in the same form; labels int64 [B]; whether the
            image is a good one, bool [B]; what is wrong with the record,
            objects [B], for `stream.features.diagnose`, or b"").
        """
        is_real = numbers >= 0
        numbers = np.where(is_real, numbers, 0)
        texts = [
            self._captions(number) if real else []
            for number, real in zip(numbers.tolist(), is_real.tolist())
        ]
        captions = np.full(
            (len(texts), max(1, *map(len, texts))), b"", np.object_
        )
        prompts = captions.copy()
        notes = np.full(len(texts), b"", np.object_)
        for i, (number, found) in enumerate(zip(numbers.tolist(), texts)):
            captions[i, : len(found)] = found
            if found and self._prompt_ends is not None:
                prompts[i, : len(found)] = self._prompts(number)
            if number in self._notes:
                notes[i] = self._notes[number]
            elif is_real[i] and not any(text.strip() for text in found):
                name = f"record {number} of {self._name}"
                notes[i] = stream_features.note("no caption", name)
        return (
            self._rows[numbers],
            captions,
            prompts,
            self._labels[numbers],
            self._ok[numbers] & is_real,
            notes,
        )

    def labelled(self):
        """All examples with a label, in the order of the files.

        Returns:
            (features [examples, ...] in the cache's type; labels int64; Counter
            of the records left out, by reason).
        """
        without = self._ok & (self._labels < 0)
        skipped = collections.Counter({"no label": int(without.sum())})
        for number in np.flatnonzero(~self._ok):
            note = self._notes.get(number)
            skipped[
                stream_features.diagnose(note)[0] if note else "unreadable"
            ] += 1
        chosen = np.flatnonzero(self._ok & ~without)
        return self._rows[chosen], self._labels[chosen], +skipped

    def _captions(self, number):
        return self._texts(number, self._ends, self._text)

    def _prompts(self, number):
        return self._texts(number, self._prompt_ends, self._prompt_text)

    def _texts(self, number, ends, text):
        """The texts of a record, in those of all records."""
        first, last = self._first[number : number + 2].tolist()
        ends = ends[first : last + 1].tolist()  # Of the one before, too.
        return [text[a:b] for a, b in zip(ends, ends[1:])]

    def _open(self):
        """Opens the rows, and reads what else is in the records."""
        self._rows = np.memmap(
            os.path.join(self.path, "rows"),
            self._numpy_type,
            "r",
            shape=(self.num_examples, *self.row_shape),
        )
        parts = [self._read_part(part) for part in range(self._num_parts)]
        self._labels = np.concatenate([part["labels"] for part in parts])
        self._ok = np.concatenate([part["ok"] for part in parts])
        counts = np.concatenate([part["counts"] for part in parts])
        lengths = np.concatenate([part["lengths"] for part in parts])
        self._first = np.concatenate([[0], np.cumsum(counts)])
        self._ends = np.concatenate([[0], np.cumsum(lengths)])
        self._text = b"".join(part["text"].tobytes() for part in parts)
        self._prompt_text = b"".join(
            part["prompt_text"].tobytes() for part in parts
        )
        self._prompt_ends = None
        if self._prompt_text:
            lengths = [part["prompt_lengths"] for part in parts]
            self._prompt_ends = np.cumsum(np.concatenate([[0], *lengths]))
        self._notes = {}
        for part, content in enumerate(parts):
            notes = json.loads(content["notes"].tobytes())
            for number, note in notes.items():
                number = part * self._part_size + int(number)
                self._notes[number] = stream_features.note(*note)

    @property
    def _num_parts(self):
        return math.ceil(self.num_examples / self._part_size)

    def _bounds(self, part):
        """First record of a part, and of the next one."""
        first = part * self._part_size
        return first, min(first + self._part_size, self.num_examples)

    def _part_path(self, part):
        return os.path.join(self.path, f"part-{part:05d}.npz")

    def _read_part(self, part):
        """Arrays of a part's file, or None if it is not there or another's."""
        path = self._part_path(part)
        if not os.path.exists(path):
            return None
        try:
            with np.load(path, allow_pickle=False) as content:
                found = dict(content)
            if found["id"].item() == self._id:
                return found
            why = "belongs to another cache"
        # numpy and zipfile raise whatever they stumble over.
        except Exception as error:
            why = f"is damaged ({error})"
        logging.warning("%s %s: its part is computed again", path, why)
        return None

    # Checks.

    def _missing(self):
        """Numbers of the parts that are not there, or not as written."""
        self._check_description()
        path = os.path.join(self.path, "rows")
        size = self.num_examples * self._row_bytes
        if not os.path.exists(path):
            return list(range(self._num_parts))
        if os.path.getsize(path) != size:
            logging.warning(
                "%s has %d bytes instead of %d: what it lacks is computed "
                "again",
                path,
                os.path.getsize(path),
                size,
            )
        step = max(1, math.ceil(size / _CHECKED_BYTES))

        def is_good(part):
            found = self._read_part(part)
            if found is None:
                return False
            first, last = self._bounds(part)
            if last * self._row_bytes > os.path.getsize(path):
                return False
            if part % step:
                return True
            if _checksum(path, first, last, self._row_bytes) == found["crc"]:
                return True
            logging.warning(
                "%s differs from its checksum in the rows of %s: they are "
                "computed again",
                path,
                os.path.basename(self._part_path(part)),
            )
            return False

        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            good = list(pool.map(is_good, range(self._num_parts)))
        return [part for part, is_there in enumerate(good) if not is_there]

    def _check_description(self):
        """Refuses a folder of this name that says it is another cache."""
        path = os.path.join(self.path, "cache.json")
        if not os.path.exists(path):
            return
        try:
            found = json.loads(files.read_text(path))["key"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} does not describe a cache of features ({error!r}). "
                f"Delete the folder {self.path}, or set FEATURE_CACHE to "
                "another one."
            ) from error
        differing = [
            name
            for name in {**self.key, **found}
            if self.key.get(name) != found.get(name)
        ]
        if differing:
            raise ValueError(
                f"{self.path} holds features of another "
                f"{', '.join(differing)} than its name says. Delete the "
                "folder, or set FEATURE_CACHE to another one. Received: "
                + "; ".join(
                    f"{name}: {_short(found.get(name))} instead of "
                    f"{_short(self.key.get(name))}"
                    for name in differing
                )
            )

    def _check_all(self, missing):
        if missing:
            raise ValueError(
                f"{self.path} lacks {len(missing)} of {self._num_parts} parts "
                "after they were computed: FEATURE_CACHE must be a folder that "
                "all hosts see"
            )

    # Computing.

    def _prepare(self, stack):
        """Claims the folder, and makes room for the rows."""
        size = self.num_examples * self._row_bytes
        path = os.path.join(self.path, "rows")
        try:
            os.makedirs(self.path, exist_ok=True)
            there = 512 * os.stat(path).st_blocks if files.exists(path) else 0
            free = shutil.disk_usage(self.path).free + there
            if free < size:
                raise ValueError(
                    f"The features of {self._name} take {size / 1e9:.2f} GB. "
                    f"Set FEATURE_CACHE to a folder on a disk with more room. "
                    f"Received: {self.path}, with {free / 1e9:.2f} GB free"
                )
            self._claim(stack)
            self._describe(complete=False)
            with open(path, "ab") as file:
                file.truncate(size)
        except OSError as error:
            raise self._cannot_write(error) from error

    def _claim(self, stack):
        """Waits until no other process computes this cache."""
        for attempt in range(10**9):
            try:
                stack.enter_context(RunLock(self.path))
                return
            except WorkdirInUseError as error:
                if attempt == 0:
                    logging.warning(
                        "Another process computes %s: waiting for it (%s)",
                        self.path,
                        error,
                    )
                time.sleep(_SECONDS_BETWEEN_TRIES)

    def _cannot_write(self, error):
        return ValueError(
            "FEATURE_CACHE must be a folder that can be written to, with room "
            f"for {self.num_examples * self._row_bytes / 1e9:.2f} GB. "
            f"Received: {self.path} ({error}). What is complete there is used "
            "the next time."
        )

    def _describe(self, complete):
        content = {
            "key": self.key,
            "num_examples": self.num_examples,
            "row_shape": list(self.row_shape),
            "dtype": self.dtype,
            "part_size": self._part_size,
            "complete": complete,
        }
        files.write_json(os.path.join(self.path, "cache.json"), content)

    def _compute(self, parts, encoder, data, kind, batch_size, show):
        """Computes and writes some parts; returns their number of records."""
        if not parts:
            return 0
        encode = tf.function(
            lambda images: tf.cast(
                encoder(images, training=False)[kind], tf.float32
            ),
            autograph=False,
        )
        total = 0
        try:
            for first, last in _ranges(parts):
                begin, end = self._bounds(first)[0], self._bounds(last)[1]
                batches = data.records_with_images(
                    begin, end - begin, batch_size
                )
                with tqdm.tqdm(
                    total=end - begin,
                    unit="image",
                    leave=False,
                    disable=not show,
                ) as bar:
                    rows = _encoded(encode, batches, end - begin)
                    for part in range(first, last + 1):
                        self._write_part(part, rows, data.diagnose, bar)
                total += end - begin
        except OSError as error:
            raise self._cannot_write(error) from error
        return total

    def _write_part(self, part, encoded, diagnose, bar):
        """Writes the rows of a part, and then what says that they are there.

        Args:
            part: Its number.
            encoded: Iterator of (record, features), as `_encoded` gives them.
            diagnose: Function of a bad record to (reason, name).
            bar: A tqdm bar.
        """
        first, last = self._bounds(part)
        path = os.path.join(self.path, "rows")
        texts, prompts, notes = [], [], {}
        found = {"labels": [], "ok": [], "counts": []}
        with open(path, "r+b") as file:
            file.seek(first * self._row_bytes)
            for i in range(last - first):
                record, row = next(encoded)
                file.write(row.astype(self._numpy_type).tobytes())
                asked = list(record["prompts"])
                asked += [b""] * (len(record["captions"]) - len(asked))
                kept = [i for i, text in enumerate(record["captions"]) if text]
                texts += [record["captions"][i] for i in kept]
                prompts += [asked[i] for i in kept]
                found["counts"].append(len(kept))
                found["labels"].append(record["label"])
                found["ok"].append(record["ok"])
                if not record["ok"]:
                    notes[i] = diagnose(record["raw"])
                bar.update()
            file.flush()
            os.fsync(file.fileno())
        content = {
            "id": np.array(self._id),
            "crc": np.array(
                _checksum(path, first, last, self._row_bytes), np.uint32
            ),
            "labels": np.array(found["labels"], np.int64),
            "ok": np.array(found["ok"], bool),
            "counts": np.array(found["counts"], np.int64),
            "lengths": np.array([len(text) for text in texts], np.int64),
            "text": np.frombuffer(b"".join(texts), np.uint8),
            "prompt_lengths": np.array([len(p) for p in prompts], np.int64),
            "prompt_text": np.frombuffer(b"".join(prompts), np.uint8),
            "notes": np.frombuffer(json.dumps(notes).encode(), np.uint8),
        }
        packed = io.BytesIO()
        np.savez(packed, **content)
        files.write_bytes(self._part_path(part), packed.getvalue())


def cache_key(encoder, data, kind, dtype):
    """All that features depend on: a JSON object.

    Args:
        encoder: Built `VisionEncoder`.
        data: `CaptionDataset`, of which `identity` is used.
        kind: "pre_logits" or "encoded".
        dtype: Type they are kept in.
    """
    config = {
        name: value
        for name, value in encoder.get_config().items()
        if name not in _WITHOUT_EFFECT
    }
    variables = weights.variables_by_path(encoder)
    if kind == "encoded" and encoder.pooling != "tok":
        # How these are pooled, and by which weights, has no part in it.
        del config["pooling"]
        variables = {
            name: variable
            for name, variable in variables.items()
            if not name.startswith("pool/")
        }
    key = {
        "version": _VERSION,
        "kind": kind,
        "dtype": dtype,
        "encoder": config,
        "weights": weights.digest(variables),
        **data.identity,
    }
    # As it is read from a file: without tuples.
    return json.loads(
        json.dumps(key, default=keras.saving.serialize_keras_object)
    )


def _digest(key):
    text = json.dumps(key, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _part_size(num_examples, row_bytes):
    size = max(1, min(_PART_RECORDS, _PART_BYTES // row_bytes))
    return max(size, math.ceil(num_examples / _MOST_PARTS))


def _ranges(numbers):
    """Yields (first, last) of the runs of sorted numbers without a gap."""
    first = None
    for number, following in zip(numbers, [*numbers[1:], None]):
        first = number if first is None else first
        if following != number + 1:
            yield first, number
            first = None


def _encoded(encode, batches, count):
    """Yields (dict of what is in a record, its features) of `count` records."""
    left = count
    for batch in batches:
        features = encode(batch.pop("image")).numpy()
        found = {name: value.numpy() for name, value in batch.items()}
        for i in range(min(left, len(features))):
            yield {name: value[i] for name, value in found.items()}, features[i]
        left -= len(features)


def _checksum(path, first, last, row_bytes):
    """CRC-32 of some rows of a file."""
    crc, left = 0, (last - first) * row_bytes
    with open(path, "rb") as file:
        file.seek(first * row_bytes)
        while left and (piece := file.read(min(left, 1 << 22))):
            crc = zlib.crc32(piece, crc)
            left -= len(piece)
    return crc


def _short(value):
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
