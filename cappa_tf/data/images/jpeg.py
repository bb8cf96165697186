"""JPEG files: size, EXIF data and decoding including CMYK, in graphs.

Abbreviations for dimensions:
    h, w: height and width of an image as it is stored.
"""

import functools

import tensorflow as tf

from cappa_tf.data.images import exif, raw_bytes

# Without a comment, color profile or EXIF data, the tables directly follow the
# JFIF segment.
_MAGIC = b"\xff\xd8\xff"
_JFIF = b"\xff\xd8\xff\xe0\0\x10"
_TABLES_AT, _TABLES = 20, b"\xff\xdb"
_RATIOS = (1, 2, 4, 8)
# Larger than any image, so that none is scaled down.
FULL_SIZE = 2**31 - 1
# An Adobe segment without a transform, which means CMYK.
_ADOBE = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0"


def is_jpeg(encoded):
    """Whether a file begins like a JPEG, scalar bool."""
    return tf.strings.substr(encoded, 0, len(_MAGIC)) == _MAGIC


def is_plain(encoded):
    """Whether a JPEG has no segments that must be inspected, scalar bool.

    This is true of most files that programs write, and makes all further
    checks of these unnecessary.
    """
    begins = tf.strings.substr(encoded, 0, len(_JFIF)) == _JFIF
    # A JPEG whose header could be read is longer than that.
    tables = tf.strings.substr(encoded, _TABLES_AT, len(_TABLES)) == _TABLES
    return begins & tables


def shape(encoded):
    """Shape (h, w, channels) from the header, int64 [3]."""
    return tf.io.extract_jpeg_shape(encoded, tf.int64)


def size(encoded):
    """Size (h, w) from the header, int64 [2]."""
    return shape(encoded)[:2]


def exif_data(encoded):
    """The EXIF data, scalar string, "" if there are none."""
    return _segments(encoded)[0]


def decode(encoded, at_least):
    """Decodes a JPEG to an upright RGB image.

    Args:
        encoded: Scalar string.
        at_least: int32 [2], minimum height and width of the upright image;
            FULL_SIZE to decode at full size.

    Returns:
        uint8 [h, w, 3], or [w, h, 3] of a photo that is stored sideways.
    """
    found_exif, has_adobe = _segments(encoded)
    turned = exif.read(found_exif)
    found = shape(encoded)
    # Pillow writes inverted CMYK as Adobe does, but without the segment.
    marked = tf.strings.join(
        [
            tf.strings.substr(encoded, 0, 2),
            _ADOBE,
            tf.strings.substr(encoded, 2, -1),
        ]
    )
    encoded = tf.where((found[2] == 4) & ~has_adobe, marked, encoded)
    # The decoder sees the photo before rotation.
    at_least = tf.where(turned >= 5, at_least[::-1], at_least)
    image = decode_scaled(encoded, found[:2], at_least)
    return exif.turn(image, turned)


def decode_scaled(encoded, size, at_least, instead=None):
    """Decodes at one of the scales 1, 1/2, 1/4 and 1/8.

    Args:
        encoded: Scalar string.
        size: int64 [2], its h and w.
        at_least: Minimum (height, width), two integers or int32 [2].
        instead: Optional (scalar bool, function): the function is called
            instead of decoding if the bool is true.

    Returns:
        uint8 [ceil(h / r), ceil(w / r), 3].
    """
    # Smaller ratio of the image's sides to the minimum. Scales are branches, as
    # the ratio is an attribute of the operation, not an input.
    times = tf.reduce_min(size // tf.cast(at_least, tf.int64))
    smaller = tf.cast(times >= tf.constant(_RATIOS[1:], tf.int64), tf.int32)
    branch = tf.reduce_sum(smaller)
    branches = [
        functools.partial(tf.io.decode_jpeg, encoded, channels=3, ratio=ratio)
        for ratio in _RATIOS
    ]
    if instead is not None:
        branch = tf.where(instead[0], len(_RATIOS), branch)
        branches.append(instead[1])
    return tf.switch_case(branch, branches)


def _segments(encoded):
    """Reads the segments before the tables.

    Returns:
        exif: Scalar string, the EXIF data.
        has_adobe: Scalar bool, whether there is an Adobe segment.
    """
    length = tf.strings.length(encoded)

    def is_application(marker):
        return ((marker >= 0xFFE0) & (marker <= 0xFFEF)) | (marker == 0xFFFE)

    def unfinished(position, marker, size, seen, has_adobe):
        del size, seen, has_adobe
        padding = marker == 0xFFFF
        return (is_application(marker) | padding) & (position < length)

    def head(position):
        data = raw_bytes.raw(encoded, position, 4)
        marker = raw_bytes.unsigned(data, 0, 2, big_endian=True)
        size = raw_bytes.unsigned(data, 2, 2, big_endian=True)
        return position, marker, tf.cast(size, tf.int32)

    def step(position, marker, size, seen, has_adobe):
        # There may be any number of bytes 0xFF between segments.
        size = tf.where(marker == 0xFFFF, -1, size)
        content = raw_bytes.part(encoded, position + 4, size - 2)
        name = tf.strings.substr(content, 0, len(exif.PREFIX))
        is_exif = (marker == 0xFFE1) & (name == exif.PREFIX)
        is_adobe = (marker == 0xFFEE) & (
            tf.strings.substr(content, 0, 5) == b"Adobe"
        )
        return (
            *head(position + 2 + size),
            tf.where(is_exif & (seen == b""), content, seen),
            has_adobe | is_adobe,
        )

    *_, found, has_adobe = tf.while_loop(
        unfinished,
        step,
        (*head(tf.constant(2)), tf.constant(b""), tf.constant(False)),
    )
    return found, has_adobe
