"""JPEG files: size, EXIF data, and the colours of CMYK, in graphs.

Abbreviations for dimensions:
    h, w: height and width of an image as it is stored.
"""

import functools

import tensorflow as tf

from cappa_tf.data.images import exif, raw_bytes

# Where there is no comment, colour profile or EXIF data, the tables follow the
# JFIF segment at once.
_MAGIC = b"\xff\xd8\xff"
_JFIF = b"\xff\xd8\xff\xe0\0\x10"
_TABLES_AT, _TABLES = 20, b"\xff\xdb"
_RATIOS = (1, 2, 4, 8)
# Any scale: nothing is as large as this.
FULL_SIZE = 2**31 - 1
# An Adobe segment that says: no transform, that is CMYK.
_ADOBE = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0"


def is_jpeg(encoded):
    """Scalar bool: whether a file begins like a JPEG."""
    return tf.strings.substr(encoded, 0, len(_MAGIC)) == _MAGIC


def is_plain(encoded):
    """Scalar bool: whether a JPEG is one without any segment to look at.

    Most of the files that programs write are: the price of all checks for
    these is this comparison.
    """
    begins = tf.strings.substr(encoded, 0, len(_JFIF)) == _JFIF
    # A JPEG whose header could be read is longer than that.
    tables = tf.strings.substr(encoded, _TABLES_AT, len(_TABLES)) == _TABLES
    return begins & tables


def shape(encoded):
    """int64 [3]: h, w and number of channels, from the header."""
    return tf.io.extract_jpeg_shape(encoded, tf.int64)


def size(encoded):
    """int64 [2]: h, w."""
    return shape(encoded)[:2]


def exif_data(encoded):
    """Scalar string: the EXIF data, "" where there are none."""
    return _segments(encoded)[0]


def decode(encoded, at_least):
    """Decodes with the top up, whatever is stored.

    Args:
        encoded: Scalar string.
        at_least: int32 [2], least height and width of the image as it is
            after turning; FULL_SIZE for all there is.

    Returns:
        uint8 [h, w, 3], or [w, h, 3] of a photo that lies on its side.
    """
    found_exif, has_adobe = _segments(encoded)
    turned = exif.read(found_exif)
    found = shape(encoded)
    # What Pillow writes: inverted like Adobe's, but without saying so.
    marked = tf.strings.join(
        [
            tf.strings.substr(encoded, 0, 2),
            _ADOBE,
            tf.strings.substr(encoded, 2, -1),
        ]
    )
    encoded = tf.where((found[2] == 4) & ~has_adobe, marked, encoded)
    # The decoder sees the photo as it lies.
    at_least = tf.where(turned >= 5, at_least[::-1], at_least)
    image = decode_scaled(encoded, found[:2], at_least)
    return exif.turn(image, turned)


def decode_scaled(encoded, size, at_least, instead=None):
    """Decodes at one of the scales 1, 1/2, 1/4 and 1/8.

    Args:
        encoded: Scalar string.
        size: int64 [2], its h, w.
        at_least: Least (height, width), two integers or int32 [2].
        instead: Optional (scalar bool, function): what is called instead of
            decoding where it is true.

    Returns:
        uint8 [ceil(h / r), ceil(w / r), 3].
    """
    # How often the image holds what is wanted, in the direction it does so
    # less often; the scale is an attribute of the operation, not an input.
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
    """What the segments before the tables say.

    Returns:
        seen: Scalar string.
        has_adobe: Scalar bool, whether there is an Adobe segment.
    """
    length = tf.strings.length(encoded)

    def is_application(marker):
        return ((marker >= 0xFFE0) & (marker <= 0xFFEF)) | (marker == 0xFFFE)

    def go_on(position, marker, size, seen, has_adobe):
        del size, seen, has_adobe
        padding = marker == 0xFFFF
        return (is_application(marker) | padding) & (position < length)

    def head(position):
        data = raw_bytes.raw(encoded, position, 4)
        marker = raw_bytes.unsigned(data, 0, 2, big_endian=True)
        size = raw_bytes.unsigned(data, 2, 2, big_endian=True)
        return position, marker, tf.cast(size, tf.int32)

    def step(position, marker, size, seen, has_adobe):
        # Between segments any number of bytes 0xFF may stand.
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
        go_on,
        step,
        (*head(tf.constant(2)), tf.constant(b""), tf.constant(False)),
    )
    return found, has_adobe
