"""Serialized records to pixels and captions, with bad ones set apart.

An exception in a tf.data function ends the whole stream, and TensorFlow has
no try. But `ignore_errors` drops the elements of a data set that fail: so a
chunk of records is decoded by a small data set inside the function, and the
records that did not come out are the bad ones. They keep their place in the
chunk (a step is always the same number of positions) and travel on as raw
bytes, for Python to find out what was wrong. Against decoding one record per
call of the function this costs nothing measurable.

Dimensions:
    C: records of a chunk.
    K: captions an image.
    M: most captions of a record of the chunk.
    H, W: height and width after resizing.
"""

import tensorflow as tf

from cappa_tf.data import schema
from cappa_tf.data.images import decode_resize, image_files
from cappa_tf.data.stream import shuffling, stateless_random

# Most records decoded one after the other; chunks are decoded in parallel.
CHUNK = 16


class RecordDecoder:
    """Decodes chunks of serialized records in a tf.data graph.

    Args:
        preprocessing: The `ImagePreprocessing`.
        num_captions: K; 0 where captions are not wanted, and then a record
            without any is a good one.
        seed: Seed of the choice of captions, or None for the first K.
        max_words: Captions of more words are not chosen, but where a record
            has none else its shortest ones are; None for no such limit.
        records: The `base.Records` to be decoded, which know how to parse
            one; by default those of `schema.py`.
    """

    def __init__(
        self,
        preprocessing,
        num_captions,
        seed,
        max_words=None,
        records=schema,
    ):
        self.preprocessing = preprocessing
        self.num_captions = num_captions
        self.seed = seed
        self.max_words = max_words
        self.records = records
        self._min_side = getattr(records, "min_side", 1)

    def decode_one(self, serialized):
        """Decodes one record; fails where it is a bad one.

        Args:
            serialized: Scalar string.

        Returns:
            A dict: "image" uint8 [H, W, 3], "captions" string [any number],
            "label" int64 (-1 for none).
        """
        record = self.records.parse(serialized)
        return {
            "image": self.preprocessing.decode(
                record["image/encoded"], min_side=self._min_side
            ),
            "captions": record["captions"],
            "label": record["label"],
        }

    def decode_chunk(self, serialized, index):
        """Decodes C records.

        Args:
            serialized: string [C], with a static C.
            index: int64 [C].

        Returns:
            A dict: "image" uint8 [C, H, W, 3], "captions" string [C, K],
            "count" int32 [C] (captions to choose from), "label" and "index"
            int64 [C], "ok" bool [C], "raw" string [C]: the record where it is
            bad (the other entries then mean nothing), "" elsewhere.
        """
        count = serialized.shape[0]
        good = tf.data.Dataset.from_tensor_slices(
            (serialized, tf.range(count))
        ).map(lambda s, n: {**self.decode_one(s), "number": n})
        # The blank keeps the data set from being empty and is what the bad
        # records' places are filled with.
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
        ok = row > 0
        captions, chunk["count"] = self._choose(chunk["captions"], index)
        if self.num_captions:
            ok &= chunk["count"] > 0
        return {
            **chunk,
            "captions": captions,
            "index": index,
            "ok": ok,
            "raw": tf.where(ok, "", serialized),
        }

    def _choose(self, captions, index):
        """Chooses among the captions that are neither blank nor too long.

        For a whole chunk at once: many small operations, which would cost a
        tenth of the decoding if each record went through them.

        Args:
            captions: string [C, M], filled up with "".
            index: int64 [C].

        Returns:
            string [C, K], and int32 [C], how many each record has to choose
            from: 0 only where all are blank.
        """
        captions = tf.strings.strip(captions)
        usable = tf.strings.length(captions) > 0
        if self.max_words is not None:
            usable &= _are_short(captions, usable, self.max_words)
        counts = tf.reduce_sum(tf.cast(usable, tf.int32), axis=1)
        slots = choose_slots(
            self.seed, index, tf.maximum(counts, 1), self.num_captions
        )
        first = tf.argsort(tf.cast(~usable, tf.int32), axis=1, stable=True)
        numbers = tf.gather(first, slots, batch_dims=1)
        return tf.gather(captions, numbers, batch_dims=1), counts

    @tf.autograph.experimental.do_not_convert
    def batches(self, records, batch_size, num_parallel_calls=None):
        """Decodes a stream of records, several chunks at a time.

        Args:
            records: A tf.data.Dataset of (position, serialized record).
            batch_size: B.
            num_parallel_calls: Threads; None lets tf.data decide.

        Returns:
            A tf.data.Dataset of the dicts of `decode_chunk` for B records; a
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
            "label": tf.constant(-1, tf.int64),
            "number": tf.constant(number),
        }

    def diagnose(self, raw):
        """Says in Python what is wrong with a record that failed.

        Args:
            raw: The serialized record.

        Returns:
            (reason, name): a short reason to count by, and the record's key
            or whatever else is known of it.
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
        with tf.device("CPU:0"):
            return int(decode_resize.pixels_to_decode(encoded)) > max_pixels
    except tf.errors.OpError:
        return False


def _are_short(captions, real, max_words):
    """Which captions have few words, or the fewest where none of a row has.

    Args:
        captions: string [C, M].
        real: bool [C, M], False for those that do not count.
        max_words: Most words of a short caption.

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

    Without repetition where there are K; otherwise all of them, over again.

    Args:
        seed: Scalar integer, or None for the first K in order.
        index: int64 [B], positions in the stream.
        counts: int32 [B] or scalar, captions each example has (at least 1).
        num_captions: K.

    Returns:
        int32 [B, K], numbers of the chosen captions.
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
    """Gives the positions of bad records to good ones of the batch.

    Each position that `decode_chunk` marked as not ok takes image and
    captions of the nearest good one before it (counting around), and keeps
    its own index. A batch without any good one is left as it is.

    Args:
        batch: Dict of tensors with a leading static [B]; "ok" bool [B].

    Returns:
        The same dict.
    """
    good = batch["ok"]
    batch_size = good.shape[0]
    numbers = tf.range(batch_size)
    # How far each position would have to look back for each other one.
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
