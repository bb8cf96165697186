"""EXIF orientation of photos, and their rotation by it.

TensorFlow decodes a photo as the sensor saw it. The modules of the formats
(jpeg.py, png.py, webp.py) find the EXIF data in a file.

Abbreviations for dimensions:
    h, w: height and width of an image as it is stored.
    N: bytes of the EXIF data.
"""

import tensorflow as tf

_TAG = 0x0112
# Prefix of the data in JPEG, and in other formats by some writers.
PREFIX = b"Exif\0\0"
# Far more entries than cameras write; limits the memory for a wrong count.
_MAX_ENTRIES = 512


def read(exif):
    """Reads the orientation.

    Args:
        exif: Scalar string, EXIF data; "" for none.

    Returns:
        Scalar int32, 1 to 8 as EXIF numbers them; 1 (upright) if the data do
        not tell.
    """
    has_prefix = tf.strings.substr(exif, 0, len(PREFIX)) == PREFIX
    padded = exif + b"\0" * 16
    data = tf.strings.substr(padded, tf.where(has_prefix, len(PREFIX), 0), -1)
    data = tf.cast(tf.io.decode_raw(data, tf.uint8), tf.int32)  # [N]
    order = tf.strings.substr(padded, tf.where(has_prefix, len(PREFIX), 0), 2)
    is_tiff = (order == b"MM") | (order == b"II")
    return tf.cond(is_tiff, lambda: _in_directory(data), lambda: tf.constant(1))


def _in_directory(data):
    """The tag's value in the first directory of TIFF data."""
    big_endian = data[0] == ord("M")

    def number(position, length):
        # Positions past the end read as the last byte, which fits no tag.
        places = tf.reshape(position, [-1, 1]) + tf.range(length)  # [., length]
        places = tf.clip_by_value(places, 0, tf.size(data) - 1)
        digits = tf.gather(data, places)
        digits = tf.where(big_endian, digits, digits[:, ::-1])
        return tf.reduce_sum(digits * 256 ** tf.range(length)[::-1], axis=1)

    directory = number(4, 4)[0]
    count = tf.minimum(number(directory, 2)[0], _MAX_ENTRIES)
    entries = directory + 2 + 12 * tf.range(count)
    values = tf.boolean_mask(number(entries + 8, 2), number(entries, 2) == _TAG)
    value = tf.concat([values, [1]], axis=0)[0]
    return tf.where((value >= 1) & (value <= 8), value, 1)


def turn(image, orientation):
    """Rotates and mirrors an image so that it is upright.

    Args:
        image: [h, w, 3].
        orientation: Scalar int32, 1 to 8.

    Returns:
        [h, w, 3] or [w, h, 3].
    """

    def apply_if(numbers, function, image):
        wanted = tf.reduce_any(orientation == tf.constant(numbers))
        return tf.cond(wanted, lambda: function(image), lambda: image)

    image = apply_if([5, 6, 7, 8], lambda x: tf.transpose(x, [1, 0, 2]), image)
    image = apply_if([2, 3, 6, 7], lambda x: x[:, ::-1], image)
    return apply_if([3, 4, 7, 8], lambda x: x[::-1], image)
