"""Numbers in the bytes of an image file, and pixels laid on white, in graphs.

Abbreviations for dimensions:
    h, w: height and width of an image.
"""

import tensorflow as tf


def part(encoded, start, length):
    """Bytes of a file, fewer behind its end.

    `tf.strings.substr` refuses to begin behind it, with the whole file in its
    message: Python cannot decode that one.

    Args:
        encoded: Scalar string.
        start: Where they begin, scalar integer, not negative.
        length: How many, a scalar of the same type.

    Returns:
        Scalar string.
    """
    start = tf.convert_to_tensor(start)
    end = tf.strings.length(encoded)
    start = tf.minimum(start, tf.cast(end, start.dtype))
    return tf.strings.substr(encoded, start, tf.maximum(length, 0))


def raw(encoded, start, length):
    """Bytes of a file, zeros behind its end.

    Args:
        encoded: Scalar string.
        start: Where they begin, scalar int32.
        length: How many, a Python integer.

    Returns:
        int64 [length].
    """
    padded = part(encoded, start, length) + b"\0" * length
    data = tf.io.decode_raw(tf.strings.substr(padded, 0, length), tf.uint8)
    return tf.cast(tf.ensure_shape(data, [length]), tf.int64)


def unsigned(data, start, length, big_endian=False):
    """An unsigned integer.

    Args:
        data: int64 [any], bytes.
        start: Its first byte, a Python integer.
        length: Its bytes, a Python integer.
        big_endian: Whether the highest byte comes first.

    Returns:
        Scalar int64.
    """
    powers = [256**i for i in range(length)]
    weights = tf.constant(powers[::-1] if big_endian else powers, tf.int64)
    return tf.reduce_sum(data[start : start + length] * weights)


def on_white(image):
    """uint8 [h, w, 4] to [h, w, 3]: transparent pixels laid on white."""
    colour = tf.cast(image[..., :3], tf.float32)
    alpha = tf.cast(image[..., 3:4], tf.float32) / 255.0
    return tf.cast(tf.round(colour * alpha + 255.0 * (1.0 - alpha)), tf.uint8)
