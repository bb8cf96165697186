"""Decoding of serialized records to pixels and captions.

An exception in a tf.data function ends the whole stream, and TensorFlow has no
`try`. But `ignore_errors` drops the elements of a data set that fail, so a
chunk of records is decoded by a small data set inside the function, and the
missing records are the bad ones. They keep their place in the chunk (a step is
always the same number of positions) and are passed on as raw bytes, so that
Python can diagnose them. Compared to decoding one record per function call,
the additional cost is not measurable.

Dimensions:
    C: records of a chunk.
    K: captions per image.
    M: maximum number of captions of a record in the chunk.
    H, W: height and width after resizing.
"""

import tensorflow as tf

from cappa_tf.data import schema
from cappa_tf.data.images import from_python, image_files
from cappa_tf.data.stream import shuffling, stateless_random

# Maximum number of records of a chunk; chunks are decoded in parallel.
CHUNK = 16


class RecordDecoder:
    """Decodes chunks of serialized records in a tf.data graph.

    Args:
        preprocessing: The `ImagePreprocessing`.
        num_captions: K; 0 if captions are not needed, and then a record
            without captions is good.
        seed: Seed of the choice of captions, or None for the first K.
        max_words: Maximum number of words of the captions to choose from; if a
            record has only longer ones, its shortest ones are chosen. None for
            no limit.
        records: The `base.Records` to decode, which parse their records; by
            default those of `schema.py`.
        prompts: The `Prompts` that captions answer, or None for none.
    """

    def __init__(
        self,
        preprocessing,
        num_captions,
        seed,
        max_words=None,
        records=schema,
        prompts=None,
    ):
        self.preprocessing = preprocessing
        self.num_captions = num_captions
        self.seed = seed
        self.max_words = max_words
        self.records = records
        self.prompts = prompts
        self._min_side = getattr(records, "min_side", 1)

    def decode_one(self, serialized):
        """Decodes one record; fails if it is bad.

        Args:
            serialized: Scalar string.

        Returns:
            Dict of "image" uint8 [H, W, 3], "captions" string [any number],
            "prompts" string, as many or none, and "label" int64 (-1 for none).
        """
        record = self.records.parse(serialized)
        return {
            "image": self.preprocessing.decode(
                record["image/encoded"], min_side=self._min_side
            ),
            "captions": record["captions"],
            "prompts": record["prompts"],
            "label": record["label"],
        }

    def decode_chunk(self, serialized, index):
        """Decodes C records and chooses their captions.

        Args:
            serialized: string [C], with a static C.
            index: int64 [C].

        Returns:
            Dict of "image" uint8 [C, H, W, 3]; "captions" string [C, K]; with
            prompts also "prompts" string [C, K], and "left_out" int32 [C], the
            number of captions whose prompt is too long; "count" int32 [C], the
            number of captions to choose from; "label" and "index" int64 [C];
            "ok" bool [C]; and "raw" string [C], the record if it is bad (its
            other entries are then meaningless) or something is left out, else
            "".
        """
        return self.choose(self.decode_records(serialized), index)

    def decode_records(self, serialized):
        """Decodes C records with all of their captions.

        Args:
            serialized: string [C], with a static C.

        Returns:
            A dict: "image" uint8 [C, H, W, 3], "captions" string [C, M],
            filled up with "", "prompts" string [C, M or 0], the questions of
            the records, "label" int64 [C], "ok" bool [C], whether the
            image is a good one, and "raw" string [C], the records.
        """
        count = serialized.shape[0]
        good = tf.data.Dataset.from_tensor_slices(
            (serialized, tf.range(count))
        ).map(lambda s, n: {**self.decode_one(s), "number": n})
        # The blank keeps the data set from being empty, and replaces the bad
        # records.
        blank = tf.data.Dataset.from_tensors(self._blank(count))
        decoded = (
            blank.concatenate(good.ignore_errors())
            .padded_batch(count + 1)
            .get_single_element()
        )
        row = tf.tensor_scatter_nd_update(
            tf.zeros([count + 1], tf.int32),
            decoded.pop("number")[:, tf.newaxis],
            tf.range(tf.shape(decoded["label"])[0]),
        )[:count]
        chunk = {k: tf.gather(v, row) for k, v in decoded.items()}
        return {**chunk, "ok": row > 0, "raw": serialized}

    def choose(self, chunk, index):
        """Chooses K captions of each record, and says which ones are bad.

        Args:
            chunk: What `decode_records` gives; also without "image", or with
                anything in its place.
            index: int64 [C].

        Returns:
            The dict that `decode_chunk` describes.
        """
        ok, told = chunk["ok"], chunk["ok"]
        texts, found = {"captions": chunk["captions"]}, {}
        usable = tf.ones_like(texts["captions"], tf.bool)
        if self.prompts is not None:
            texts["prompts"], texts["captions"], long = self.prompts.fill_in(
                chunk["prompts"], chunk["captions"]
            )
            usable = ~long
            long &= tf.strings.length(texts["captions"]) > 0
            found["left_out"] = tf.reduce_sum(tf.cast(long, tf.int32), axis=1)
            told &= found["left_out"] == 0
        texts, count = self._choose(texts, usable, index)
        if self.num_captions:
            ok &= count > 0
        chunk = {k: v for k, v in chunk.items() if k != "prompts"}
        return {
            **chunk,
            **texts,
            **found,
            "count": count,
            "index": index,
            "ok": ok,
            "raw": tf.where(ok & told, "", chunk["raw"]),
        }

    def _choose(self, texts, usable, index):
        """Chooses among the captions that are neither blank nor too long.

        This is done for a whole chunk at once, as these are many small
        operations, which would take a tenth of the decoding time per record.

        Args:
            texts: Dict of "captions" string [C, M], padded with "", and of
                what goes with them.
            usable: bool [C, M], False for those not to choose.
            index: int64 [C].

        Returns:
            The dict with the chosen ones, string [C, K], and int32 [C], the
            number of captions each record has to choose from, which is 0 only
            if all are blank or not usable.
        """
        captions = tf.strings.strip(texts["captions"])
        texts = {**texts, "captions": captions}
        usable &= tf.strings.length(captions) > 0
        if self.max_words is not None:
            usable &= _are_short(captions, usable, self.max_words)
        counts = tf.reduce_sum(tf.cast(usable, tf.int32), axis=1)
        slots = choose_slots(
            self.seed, index, tf.maximum(counts, 1), self.num_captions
        )
        first = tf.argsort(tf.cast(~usable, tf.int32), axis=1, stable=True)
        numbers = tf.gather(first, slots, batch_dims=1)
        chosen = {
            name: tf.gather(value, numbers, batch_dims=1)
            for name, value in texts.items()
        }
        return chosen, counts

    @tf.autograph.experimental.do_not_convert
    def batches(self, records, batch_size, num_parallel_calls=None):
        """Decodes a stream of records, several chunks at a time.

        Args:
            records: A `tf.data.Dataset` of (position, serialized record).
            batch_size: B.
            num_parallel_calls: Number of threads; None lets tf.data decide.

        Returns:
            A `tf.data.Dataset` of the dicts of `decode_chunk` for B records; a
            remainder is dropped.
        """
        chunk = max(
            n
            for n in range(1, min(CHUNK, batch_size) + 1)
            if batch_size % n == 0
        )
        chunks = records.batch(chunk, drop_remainder=True).map(
            lambda index, serialized: self.decode_chunk(serialized, index),
            num_parallel_calls=num_parallel_calls or tf.data.AUTOTUNE,
        )
        return chunks.batch(batch_size // chunk, drop_remainder=True).map(
            lambda batch: {
                k: tf.reshape(v, [batch_size, *v.shape[2:]])
                for k, v in batch.items()
            }
        )

    def _blank(self, number):
        return {
            "image": tf.zeros([*self.preprocessing.image_size, 3], tf.uint8),
            "captions": tf.constant([""]),
            "prompts": tf.zeros([0], tf.string),
            "label": tf.constant(-1, tf.int64),
            "number": tf.constant(number),
        }

    def diagnose(self, raw):
        """Finds out in Python why a record could not be decoded.

        Args:
            raw: The serialized record.

        Returns:
            (reason, name): a short reason to count by, and the record's key or
            whatever else identifies it.
        """
        if raw.startswith(shuffling.LOST):
            return "lost record", raw.removeprefix(shuffling.LOST).decode()
        try:
            example = self.records.deserialize(raw)
        except image_files.UnusableError as error:
            return error.reason, error.name
        except ValueError as error:
            return "not a record of this schema", str(error)
        name = example.key or "a record without key"
        if self.num_captions and not any(c.strip() for c in example.captions):
            return "no caption", name
        if self.num_captions and self.prompts is not None:
            problem = self.prompts.problem(example)
            if problem is not None:
                return problem, name
        max_pixels = self.preprocessing.max_pixels
        if _is_too_large(example.image, max_pixels):
            return f"more than {max_pixels} pixels", name
        reason = image_files.why_unusable(
            example.image, self._min_side, max_pixels
        )
        return reason, name


def _is_too_large(encoded, max_pixels):
    if max_pixels is None:
        return False
    try:
        return from_python.pixels_to_decode(encoded) > max_pixels
    except tf.errors.OpError:
        return False


def _are_short(captions, real, max_words):
    """Which captions have few words, or the fewest of a row if none has.

    Args:
        captions: string [C, M].
        real: bool [C, M], False for captions to ignore.
        max_words: Maximum number of words of a short caption.

    Returns:
        bool [C, M].
    """
    words = tf.strings.split(tf.reshape(captions, [-1])).row_lengths()
    words = tf.reshape(words, tf.shape(captions))
    fewest = tf.reduce_min(
        tf.where(real, words, words.dtype.max), axis=1, keepdims=True
    )
    return words <= tf.maximum(fewest, max_words)


def choose_slots(seed, index, counts, num_captions):
    """Chooses K captions for each example.

    Captions are not repeated unless there are fewer than K; then all of them
    are repeated in turn.

    Args:
        seed: Scalar integer, or None for the first K in order.
        index: int64 [B], positions in the stream.
        counts: int32 [B] or scalar, number of captions of each example (at
            least 1).
        num_captions: K.

    Returns:
        int32 [B, K], indices of the chosen captions.
    """
    counts = tf.broadcast_to(counts, tf.shape(index))[:, tf.newaxis]  # [B, 1]
    turns = tf.range(num_captions)[tf.newaxis] % counts  # [B, K]
    if seed is None:
        return turns
    most = tf.reduce_max(counts)
    keys = stateless_random.uniform(
        seed, stateless_random.CAPTION, index, most
    )  # [B, most]
    absent = tf.range(most)[tf.newaxis] >= counts
    shuffled = tf.argsort(tf.where(absent, 2.0, keys), stable=True)
    return tf.gather(shuffled, turns, batch_dims=1)


def replace_bad(batch):
    """Replaces bad records by good ones of the same batch.

    Each position that `decode_chunk` marked as not ok gets image and captions
    of the nearest good one before it (cyclically), and keeps its own index. A
    batch without any good record is left unchanged.

    Args:
        batch: Dict of tensors with a leading static [B]; "ok" bool [B].

    Returns:
        The dict with the bad records replaced.
    """
    good = batch["ok"]
    batch_size = good.shape[0]
    numbers = tf.range(batch_size)
    # Distance from each position back to each other one.
    distance = (numbers[:, tf.newaxis] - numbers[tf.newaxis]) % batch_size
    distance += tf.where(good, 0, batch_size)[tf.newaxis]  # [B, B]
    nearest = tf.argmin(distance, axis=1)  # [B]
    content = {k: v for k, v in batch.items() if k != "index"}
    content = tf.cond(
        tf.reduce_all(good),
        lambda: content,
        lambda: {k: tf.gather(v, nearest) for k, v in content.items()},
    )
    return {**content, "index": batch["index"]}
