"""Which way up a photo is: the orientation in the EXIF data of a JPEG.

TensorFlow decodes a photo as the sensor saw it. Data sets are turned when
they are prepared (picture_files.py); this is for files that come as they are.

Abbreviations for dimensions:
    h, w: height and width of a picture as it is stored.
    N: bytes looked at.
"""

import tensorflow as tf

from cappa_tf.data import images

# EXIF data are one segment of at most 64 KB, the first or second of the file.
_HEAD = 1 << 17
_TAG = 0x0112
# An APP1 segment: two bytes of marker, two of length, then this.
_EXIF = b"Exif\0\0"
# Far more entries than cameras write; a wrong count must not take memory.
_MAX_ENTRIES = 512


def decode(encoded, max_pixels=None, at_least=None):
    """Decodes a picture with its top up.

    Args:
        encoded: As `images.decode`.
        max_pixels: As there.
        at_least: As there, of the picture as it is after turning.

    Returns:
        uint8 [h, w, 3], or [w, h, 3] of a photo that lies on its side.
    """
    orientation = read(encoded)
    if at_least is not None:
        # The decoder sees the photo as it lies.
        lies = orientation >= 5
        at_least = tf.where(lies, at_least[::-1], at_least)
    return turn(images.decode(encoded, max_pixels, at_least), orientation)


def read(encoded):
    """Reads the orientation of a JPEG.

    Args:
        encoded: Scalar string, an image file.

    Returns:
        Scalar int32, 1 to 8 as EXIF numbers them; 1, as it is, where the file
        does not say or is no JPEG.
    """
    head = tf.strings.substr(encoded + b"\0" * 16, 0, _HEAD)
    data = tf.cast(tf.io.decode_raw(head, tf.uint8), tf.int32)  # [N]
    is_start = data[: 1 - len(_EXIF)] == _EXIF[0]
    for offset, byte in enumerate(_EXIF[1:], 1):
        last = offset + 1 - len(_EXIF)
        is_start &= data[offset : last or None] == byte
    # The positions in the segment count from behind the word.
    start = tf.argmax(is_start, output_type=tf.int32) + len(_EXIF)
    is_jpeg = (data[0] == 0xFF) & (data[1] == 0xD8)
    return tf.cond(
        is_jpeg & tf.reduce_any(is_start),
        lambda: _in_directory(data, start),
        lambda: tf.constant(1),
    )


def _in_directory(data, start):
    """The tag's value in the first directory of the TIFF data at `start`."""
    big_endian = data[start] == ord("M")

    def number(position, length):
        # What lies behind the end reads as the last byte and fits no tag.
        places = tf.reshape(position, [-1, 1]) + tf.range(length)  # [., length]
        places = tf.clip_by_value(places, 0, tf.size(data) - 1)
        digits = tf.gather(data, places)
        digits = tf.where(big_endian, digits, digits[:, ::-1])
        return tf.reduce_sum(digits * 256 ** tf.range(length)[::-1], axis=1)

    directory = start + number(start + 4, 4)[0]
    count = tf.minimum(number(directory, 2)[0], _MAX_ENTRIES)
    entries = directory + 2 + 12 * tf.range(count)
    values = tf.boolean_mask(number(entries + 8, 2), number(entries, 2) == _TAG)
    value = tf.concat([values, [1]], axis=0)[0]
    return tf.where((value >= 1) & (value <= 8), value, 1)


def turn(image, orientation):
    """Turns and mirrors a picture so that its top is up.

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
