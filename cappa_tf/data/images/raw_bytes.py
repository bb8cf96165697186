"""Numbers in the bytes of an image file, and alpha blending, in graphs.

Abbreviations for dimensions:
    h, w: height and width of an image.
"""

import tensorflow as tf


def part(encoded, start, length):
    """Bytes of a file, fewer at its end.

    `tf.strings.substr` fails if it would begin past the end, with a message
    that contains the whole file and that Python cannot decode.

    Args:
        encoded: Scalar string.
        start: Position of the first byte, scalar integer, not negative.
        length: Number of bytes, a scalar of the same type.

    Returns:
        Scalar string.
    """
    start = tf.convert_to_tensor(start)
    end = tf.strings.length(encoded)
    start = tf.minimum(start, tf.cast(end, start.dtype))
    return tf.strings.substr(encoded, start, tf.maximum(length, 0))


def raw(encoded, start, length):
    """Bytes of a file, padded with zeros at its end.

    Args:
        encoded: Scalar string.
        start: Position of the first byte, scalar int32.
        length: Number of bytes, a Python integer.

    Returns:
        int64 [length].
    """
    padded = part(encoded, start, length) + b"\0" * length
    data = tf.io.decode_raw(tf.strings.substr(padded, 0, length), tf.uint8)
    return tf.cast(tf.ensure_shape(data, [length]), tf.int64)


def unsigned(data, start, length, big_endian=False):
    """Reads an unsigned integer.

    Args:
        data: int64 [any], bytes.
        start: Position of its first byte, a Python integer.
        length: Number of its bytes, a Python integer.
        big_endian: Whether the highest byte comes first.

    Returns:
        Scalar int64.
    """
    powers = [256**i for i in range(length)]
    weights = tf.constant(powers[::-1] if big_endian else powers, tf.int64)
    return tf.reduce_sum(data[start : start + length] * weights)


def on_white(image):
    """Blends an image with alpha, uint8 [h, w, 4], with white: [h, w, 3]."""
    color = tf.cast(image[..., :3], tf.float32)
    alpha = tf.cast(image[..., 3:4], tf.float32) / 255.0
    return tf.cast(tf.round(color * alpha + 255.0 * (1.0 - alpha)), tf.uint8)
