"""Caching of small data sets in memory.

Dimensions:
    B: batch size.
    K: captions per image.
    L: text length.
    N: records of the split.
    M: captions of the split.
    H, W: height and width of the images held.
"""

import numpy as np
import tensorflow as tf
from absl import logging

from cappa_tf.data.stream import decoding, shuffling
from cappa_tf.utils import cpu

# Maximum fraction of the machine's memory that a split may take.
MEMORY_FRACTION = 0.6


def load_records(shards, name="the data"):
    """Reads all records of a split.

    Args:
        shards: List of `description.Shard`.
        name: Name of the data in messages.

    Returns:
        string [N] on the host.

    Raises:
        ValueError: If they would fill the machine's memory.
    """
    # Twice the size, as the parts exist while they are concatenated.
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
        decoder: A `decoding.RecordDecoder` that returns all captions to choose
            from, in order.
        tokenizer: A `Tokenizer`, or None for no tokens.
        name: Name of the data in messages.

    Raises:
        ValueError: If they would fill the machine's memory.
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
        tokens, lengths = [], []
        done = 0
        for chunk in _chunks(shards, decoder):
            size = chunk["ok"].shape[0]
            self._pixels[done : done + size] = chunk["image"].numpy()
            done += size
            for key, values in parts.items():
                values.append(chunk[key])
            if tokenizer is None:
                continue
            captions = _existing(chunk, "captions")
            if "prompts" in chunk:
                ids, length = tokenizer.with_prompts(
                    _existing(chunk, "prompts"), captions
                )
                lengths.append(length)
            else:
                ids = tokenizer(captions)
            tokens.append(ids)
        with tf.device("CPU:0"):
            self._pixels = tf.constant(self._pixels)
            self._parts = {k: tf.concat(v, 0) for k, v in parts.items()}
            if tokenizer is not None:
                self._tokens = tf.concat(tokens, 0)  # [M, L]
                self._starts = tf.cumsum(self._parts["count"], exclusive=True)
            self._lengths = tf.concat(lengths, 0) if lengths else None  # [M]
        self._has_tokens = tokenizer is not None

    def batch(self, seed, index, numbers, num_captions):
        """Looks up a batch, in the form of `RecordDecoder.decode_chunk`.

        Args:
            seed: Seed of the choice of captions, or None for the first K.
            index: int64 [B], positions in the stream.
            numbers: int64 [B], record numbers.
            num_captions: K.

        Returns:
            Dict of "image" uint8 [B, H, W, 3], "tokens" int32 [B, K, L] (with
            prompts, of which "prompt_lengths" int32 [B, K] are the lengths),
            and "label", "count", "index", "ok" and "raw", each [B].
        """
        batch = {k: tf.gather(v, numbers) for k, v in self._parts.items()}
        batch["image"] = tf.gather(self._pixels, numbers)
        batch["index"] = index
        if self._has_tokens:
            # A bad record has no captions, so any other slot will do.
            counts = tf.maximum(batch["count"], 1)
            slots = decoding.choose_slots(seed, index, counts, num_captions)
            starts = tf.gather(self._starts, numbers)[:, tf.newaxis]
            rows = tf.minimum(starts + slots, tf.shape(self._tokens)[0] - 1)
            batch["tokens"] = tf.gather(self._tokens, rows)
            if self._lengths is not None:
                batch["prompt_lengths"] = tf.gather(self._lengths, rows)
        return batch


def _chunks(shards, decoder):
    """Yields decoded chunks of all records; the last may be smaller."""
    total = sum(shard.num_examples for shard in shards)
    rest = total % decoding.CHUNK
    records = shuffling.in_sequence(shards)
    if rest < total:
        yield from decoder.batches(records, decoding.CHUNK)
    if rest:
        yield from decoder.batches(records.skip(total - rest), rest)


def _existing(chunk, name):
    """The captions (or their prompts) of a chunk, concatenated over records."""
    values = chunk[name]  # [C, K], padded by repetition
    slots = tf.range(tf.shape(values)[1])[tf.newaxis]
    return tf.boolean_mask(values, slots < chunk["count"][:, tf.newaxis])


def _check_memory(cache, needed, name, instead):
    """Checks that the machine has memory for a number of bytes."""
    allowed = int(MEMORY_FRACTION * cpu.memory_bytes())
    if needed > allowed:
        raise ValueError(
            f'cache="{cache}" would take {needed / 1e9:.1f} GB of memory for '
            f"{name}, more than {MEMORY_FRACTION:.0%} of this machine's "
            f"({allowed / 1e9:.1f} GB). Use {instead}."
        )
