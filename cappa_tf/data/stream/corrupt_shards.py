"""Corrupt shards: reading the records after a damaged one.

TensorFlow's reader abandons a file at the first record whose checksum is wrong,
so one flipped bit would cost all records after it. But each record is preceded
by its length, so the next one can still be found.
"""

import struct

import numpy as np
import tensorflow as tf

# A record is preceded by its length (8 bytes) and the checksum of that (4), and
# followed by its own checksum (4).
_HEAD_BYTES = 12
_TAIL_BYTES = 4
_BUFFER_BYTES = 1 << 16


def records_from_damage_on(path, skip, lost):
    """The records of a shard from the first damaged one on.

    This is slow, as it opens the file for each record, and is meant for damaged
    shards only.

    Args:
        path: Scalar string, a TFRecord file.
        skip: Scalar int64, number of records to skip.
        lost: Scalar string that replaces a damaged record.

    Returns:
        A `tf.data.Dataset` of serialized records. It ends at the end of the
        file, or at an invalid length.
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
        )
        # A file that has vanished is asked for once, see `read_tfrecords`.
        once = tf.data.Dataset.zip(tf.data.Dataset.range(1), record)
        record = once.ignore_errors().map(lambda _, serialized: serialized)
        record = record.concatenate(tf.data.Dataset.from_tensors(lost))
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
    """Positions of the records of a file, from their lengths, int64 [n]."""
    offsets = []
    try:
        # In a graph the string is a zero-dimensional array of bytes.
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
    except tf.errors.OpError:  # It was deleted in the meantime.
        pass
    return np.array(offsets, np.int64)
