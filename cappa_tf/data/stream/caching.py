"""Small data sets held in memory, and how the memory of records is reused.

Dimensions:
    B: batch size.
    K: captions an image.
    L: text length.
    N: records of the split.
    M: captions of the split.
    H, W: height and width of the images held.
"""

import ctypes
import os

import numpy as np
import tensorflow as tf
from absl import logging

from cappa_tf.data.stream import decoding, shuffling

# Of the machine's memory, at most this part may be taken by a split.
MEMORY_FRACTION = 0.6
# Of glibc's malloc.h; a threshold above 32 MB is refused there.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_TRIM_BYTES, _MMAP_BYTES = (1 << 31) - 1, 32 << 20


def keep_freed_memory():
    """Keeps the memory of records read for those to come, in this process.

    A record is a string of some 100 KB, which TensorFlow takes from the C
    library's `malloc`. By default that gives much of it back to the system as
    soon as it is free, and each next record is paid for in page faults: a
    fifth of the CPU time of the shuffled stream. Only glibc has these
    settings; other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)


def load_records(shards, name="the data"):
    """Reads all records of a split.

    Args:
        shards: List of `description.Shard`.
        name: What to call the data in messages.

    Returns:
        string [N] on the host.

    Raises:
        ValueError: They would fill the machine's memory.
    """
    # Twice: the parts are joined while they are still there.
    needed = 2 * sum(shard.num_bytes for shard in shards)
    _check_memory("records", needed, name, 'cache="stream"')
    with tf.device("CPU:0"):
        return tf.concat(
            [
                serialized
                for _, serialized in shuffling.in_sequence(shards).batch(1024)
            ],
            axis=0,
        )


class DecodedImages:
    """A split as uint8 pixels and token ids, decoded once.

    Args:
        shards: List of `description.Shard`.
        decoder: A `decoding.RecordDecoder` that gives all captions of a record
            that it may choose from, in order.
        tokenizer: A `Tokenizer`, or None for no tokens.
        name: What to call the data in messages.

    Raises:
        ValueError: They would fill the machine's memory.
    """

    def __init__(self, shards, decoder, tokenizer, name):
        num_examples = sum(shard.num_examples for shard in shards)
        height, width = decoder.preprocessing.image_size
        needed = num_examples * height * width * 3
        if tokenizer is not None:
            captions = num_examples * decoder.num_captions
            needed += captions * tokenizer.max_length * 4
        _check_memory("images", needed, name, 'cache="records" or "stream"')
        logging.info("%s: decoding %d images once", name, num_examples)
        shape = (num_examples, height, width, 3)
        self._pixels = np.empty(shape, np.uint8)
        parts = {"label": [], "count": [], "ok": [], "raw": []}
        tokens = []
        done = 0
        for chunk in _chunks(shards, decoder):
            size = chunk["ok"].shape[0]
            self._pixels[done : done + size] = chunk["image"].numpy()
            done += size
            for key, values in parts.items():
                values.append(chunk[key])
            if tokenizer is not None:
                tokens.append(tokenizer(_captions(chunk)))
        with tf.device("CPU:0"):
            self._pixels = tf.constant(self._pixels)
            self._parts = {k: tf.concat(v, 0) for k, v in parts.items()}
            if tokenizer is not None:
                self._tokens = tf.concat(tokens, 0)  # [M, L]
                self._starts = tf.cumsum(self._parts["count"], exclusive=True)
        self._has_tokens = tokenizer is not None

    def batch(self, seed, index, numbers, num_captions):
        """Looks up a batch, in the form `RecordDecoder.decode_chunk` has.

        Args:
            seed: Seed of the choice of captions, or None for the first K.
            index: int64 [B], positions in the stream.
            numbers: int64 [B], record numbers.
            num_captions: K.

        Returns:
            A dict: "image" uint8 [B, H, W, 3], "tokens" int32 [B, K, L],
            "label", "count", "index", "ok" and "raw", each [B].
        """
        batch = {k: tf.gather(v, numbers) for k, v in self._parts.items()}
        batch["image"] = tf.gather(self._pixels, numbers)
        batch["index"] = index
        if self._has_tokens:
            # A bad record has no captions: a slot of any other does for it.
            counts = tf.maximum(batch["count"], 1)
            slots = decoding.choose_slots(seed, index, counts, num_captions)
            starts = tf.gather(self._starts, numbers)[:, tf.newaxis]
            rows = tf.minimum(starts + slots, tf.shape(self._tokens)[0] - 1)
            batch["tokens"] = tf.gather(self._tokens, rows)
        return batch


def _chunks(shards, decoder):
    """Decoded chunks of all records in order; the last may be smaller."""
    total = sum(shard.num_examples for shard in shards)
    rest = total % decoding.CHUNK
    records = shuffling.in_sequence(shards)
    if rest < total:
        yield from decoder.batches(records, decoding.CHUNK)
    if rest:
        yield from decoder.batches(records.skip(total - rest), rest)


def _captions(chunk):
    """The captions to choose from of a chunk, one record after the other."""
    captions = chunk["captions"]  # [C, K], filled up by repetition
    slots = tf.range(tf.shape(captions)[1])[tf.newaxis]
    return tf.boolean_mask(captions, slots < chunk["count"][:, tf.newaxis])


def _check_memory(cache, needed, name, instead):
    """Refuses to hold more bytes than the machine has room for."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    allowed = int(MEMORY_FRACTION * pages)
    if needed > allowed:
        raise ValueError(
            f'cache="{cache}" would take {needed / 1e9:.1f} GB of memory for '
            f"{name}, more than {MEMORY_FRACTION:.0%} of this machine's "
            f"({allowed / 1e9:.1f} GB). Use {instead}."
        )
