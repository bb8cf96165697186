"""PNG files: size, EXIF data and pixels, in graphs.

Reference: PNG specification, third edition, sections 5 and 11.

Abbreviations for dimensions:
    h, w: height and width of an image as it is stored.
"""

import tensorflow as tf

from cappa_tf.data.images import exif, raw_bytes

_MAGIC = b"\x89PNG\r\n\x1a\n"
_FIRST_CHUNK = len(_MAGIC)
_END = b"\0\0\0\0IEND\xaeB`\x82"


def is_png(encoded):
    """Whether a file begins like a PNG, scalar bool."""
    return tf.strings.substr(encoded, 0, len(_MAGIC)) == _MAGIC


def size(encoded):
    """Size (h, w) from the header, int64 [2]."""
    data = raw_bytes.raw(encoded, 16, 8)
    return tf.stack(
        [
            raw_bytes.unsigned(data, start, 4, big_endian=True)
            for start in (4, 0)
        ]
    )


def exif_data(encoded):
    """The EXIF data, scalar string, "" if there are none."""
    return _chunks(encoded)[1]


def decode(encoded):
    """Decodes a PNG to upright RGB; uses the high byte of 16 bits.

    Returns:
        uint8 [h, w, 3], or [w, h, 3] of an image that is stored sideways.
    """
    has_key, found_exif, end = _chunks(encoded)
    # A file without the end mark is accepted if its pixels are complete.
    whole = tf.strings.substr(encoded, 0, end) + _END
    color_type = raw_bytes.raw(encoded, 25, 1)[0]
    image = tf.cond(
        (color_type == 4) | (color_type == 6) | has_key,
        lambda: raw_bytes.on_white(tf.io.decode_png(whole, channels=4)),
        lambda: tf.io.decode_png(whole, channels=3),
    )
    return exif.turn(image, exif.read(found_exif))


def _chunks(encoded):
    """Reads the chunks.

    Returns:
        has_key: Scalar bool, whether some colors are transparent.
        exif: Scalar string, the EXIF data.
        end: Scalar int32, end of the last complete chunk before the end mark.
    """
    length = tf.strings.length(encoded)

    def head(position):
        data = raw_bytes.raw(encoded, position, 4)
        size = raw_bytes.unsigned(data, 0, 4, big_endian=True)
        name = raw_bytes.part(encoded, position + 4, 4)
        # Length, name and checksum are 12 bytes more.
        size = tf.cast(tf.minimum(size, 1 << 30), tf.int32)
        return position, size, name

    def unfinished(position, size, name, has_key, seen):
        del has_key, seen
        return (name != b"IEND") & (position + 12 <= length - size)

    def step(position, size, name, has_key, seen):
        content = tf.strings.substr(
            encoded, position + 8, tf.where(name == b"eXIf", size, 0)
        )
        return (
            *head(position + 12 + size),
            has_key | (name == b"tRNS"),
            tf.where(name == b"eXIf", content, seen),
        )

    end, _, _, has_key, found = tf.while_loop(
        unfinished,
        step,
        (
            *head(tf.constant(_FIRST_CHUNK)),
            tf.constant(False),
            tf.constant(b""),
        ),
    )
    return has_key, found, tf.minimum(end, length)
