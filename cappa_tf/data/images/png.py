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
    """Scalar bool: whether a file begins like a PNG."""
    return tf.strings.substr(encoded, 0, len(_MAGIC)) == _MAGIC


def size(encoded):
    """int64 [2]: h, w from the header."""
    data = raw_bytes.raw(encoded, 16, 8)
    return tf.stack(
        [
            raw_bytes.unsigned(data, start, 4, big_endian=True)
            for start in (4, 0)
        ]
    )


def exif_data(encoded):
    """Scalar string: the EXIF data, "" where there are none."""
    return _chunks(encoded)[1]


def decode(encoded):
    """Decodes with the top up; of 16 bits the high byte is taken.

    Returns:
        uint8 [h, w, 3], or [w, h, 3] of an image that lies on its side.
    """
    has_key, found_exif, end = _chunks(encoded)
    # A file that lacks the end mark is whole all the same, if its pixels are.
    whole = tf.strings.substr(encoded, 0, end) + _END
    colour_type = raw_bytes.raw(encoded, 25, 1)[0]
    image = tf.cond(
        (colour_type == 4) | (colour_type == 6) | has_key,
        lambda: raw_bytes.on_white(tf.io.decode_png(whole, channels=4)),
        lambda: tf.io.decode_png(whole, channels=3),
    )
    return exif.turn(image, exif.read(found_exif))


def _chunks(encoded):
    """What the chunks say.

    Returns:
        has_key: Scalar bool, whether some colours are transparent.
        seen: Scalar string.
        end: Scalar int32, where the last complete chunk but the end mark ends.
    """
    length = tf.strings.length(encoded)

    def head(position):
        data = raw_bytes.raw(encoded, position, 4)
        size = raw_bytes.unsigned(data, 0, 4, big_endian=True)
        name = raw_bytes.part(encoded, position + 4, 4)
        # Length, name and checksum are 12 bytes more.
        size = tf.cast(tf.minimum(size, 1 << 30), tf.int32)
        return position, size, name

    def go_on(position, size, name, has_key, seen):
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
        go_on,
        step,
        (
            *head(tf.constant(_FIRST_CHUNK)),
            tf.constant(False),
            tf.constant(b""),
        ),
    )
    return has_key, found, tf.minimum(end, length)
