"""Reads what is left of a shard after a damaged record.

TensorFlow's reader gives a file up at the first record whose checksum is
wrong: one flipped bit would cost all records behind it. But each record is
preceded by its length, so the next one can be found all the same.
"""

import struct

import numpy as np
import tensorflow as tf

# Before each record its length (8 bytes) and that one's checksum (4), behind
# it its own checksum (4).
_HEAD_BYTES = 12
_TAIL_BYTES = 4
_BUFFER_BYTES = 1 << 16


def records_from_damage_on(path, skip, lost):
    """The records of a shard from the first damaged one on.

    Slow, one opening of the file for each record: for damaged shards only.

    Args:
        path: Scalar string, a TFRecord file.
        skip: Scalar int64: records before this one are not given.
        lost: Scalar string that stands for a damaged record.

    Returns:
        A tf.data.Dataset of serialized records. It ends where the file does,
        or where a length makes no sense.
    """

    def read(number, offset):
        variant = tf.raw_ops.TFRecordDatasetV2(
            filenames=[path],
            compression_type="",
            buffer_size=_BUFFER_BYTES,
            byte_offsets=[offset],
        )
        record = tf.data.experimental.from_variant(
            variant, tf.TensorSpec([], tf.string)
        ).take(1)
        record = record.ignore_errors().concatenate(
            tf.data.Dataset.from_tensors(lost)
        )
        return record.take(1).map(lambda serialized: (number, serialized))

    def behind(damaged, record):
        number, serialized = record
        damaged |= serialized == lost
        return damaged, (damaged & (number >= skip), serialized)

    offsets = tf.numpy_function(_record_offsets, [path], tf.int64)
    offsets = tf.ensure_shape(offsets, [None])
    return (
        tf.data.Dataset.from_tensor_slices(offsets)
        .enumerate()
        .flat_map(read)
        .scan(tf.constant(False), behind)
        .filter(lambda wanted, serialized: wanted)
        .map(lambda wanted, serialized: serialized)
    )


def _record_offsets(path):
    """Where the records of a file begin, by their lengths, as int64 [n]."""
    offsets = []
    try:
        # A zero-dimensional array of bytes, where the string is in a graph.
        path = tf.compat.as_str_any(np.asarray(path).item())
        size = tf.io.gfile.stat(path).length
        with tf.io.gfile.GFile(path, "rb") as file:
            position = 0
            while position + _HEAD_BYTES + _TAIL_BYTES <= size:
                file.seek(position)
                length = struct.unpack("<Q", file.read(8))[0]
                end = position + _HEAD_BYTES + length + _TAIL_BYTES
                if end > size:
                    break
                offsets.append(position)
                position = end
    except tf.errors.OpError:  # It vanished in the meantime.
        pass
    return np.array(offsets, np.int64)
