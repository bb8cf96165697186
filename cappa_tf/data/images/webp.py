"""WebP files: size, EXIF data and pixels, in graphs.

TensorFlow decodes every frame of an animation before one can be selected, so
the frames are counted before they take memory.

Reference: RFC 9649, section 2.7.

Abbreviations for dimensions:
    h, w: height and width of an image as it is stored.
"""

import tensorflow as tf

from cappa_tf.data.images import exif, raw_bytes

# RIFF, its size, WEBP.
_FIRST_CHUNK = 12
_ALPHA = 0x10


def size(encoded):
    """Size (h, w) of a lossy, lossless or extended WebP, int64 [2]."""
    kind = tf.strings.substr(_padded(encoded), _FIRST_CHUNK, 4)
    data = raw_bytes.raw(encoded, 0, 30)

    def lossless():
        packed = raw_bytes.unsigned(data, 21, 4)
        width = tf.bitwise.bitwise_and(packed, 0x3FFF) + 1
        height = tf.bitwise.bitwise_and(packed // (1 << 14), 0x3FFF) + 1
        return tf.stack([height, width])

    def extended():
        return 1 + tf.stack(
            [raw_bytes.unsigned(data, start, 3) for start in (27, 24)]
        )

    def lossy():
        sides = [raw_bytes.unsigned(data, start, 2) for start in (28, 26)]
        return tf.stack(sides) % (1 << 14)

    return tf.case(
        [(kind == b"VP8X", extended), (kind == b"VP8L", lossless)],
        default=lossy,
    )


def num_frames(encoded):
    """Number of frames of a WebP, at least 1, scalar int64."""
    return tf.maximum(_chunks(encoded)[0], 1)


def exif_data(encoded):
    """The EXIF data, scalar string, "" if there are none."""
    return _chunks(encoded)[1]


def decode(encoded):
    """Decodes the first frame to upright RGB.

    Returns:
        uint8 [h, w, 3], or [w, h, 3] of an image that is stored sideways.
    """
    frames = tf.io.decode_webp(_with_alpha(encoded))
    image = tf.cond(
        tf.shape(frames)[-1] == 4,
        lambda: raw_bytes.on_white(frames[0]),
        lambda: frames[0],
    )
    return exif.turn(image, exif.read(exif_data(encoded)))


def _padded(encoded):
    return encoded + b"\0" * 32


def _chunks(encoded):
    """Reads the chunks.

    Returns:
        frames: Scalar int64, number of frames of an animation.
        exif: Scalar string, the EXIF data.
    """
    length = tf.strings.length(encoded)

    def unfinished(position, frames, seen):
        del frames, seen
        return position + 8 <= length

    def step(position, frames, seen):
        name = tf.strings.substr(encoded, position, 4)
        data = raw_bytes.raw(encoded, position + 4, 4)
        size = tf.minimum(raw_bytes.unsigned(data, 0, 4), 1 << 30)
        size = tf.cast(size, tf.int32)
        content = tf.strings.substr(
            encoded, position + 8, tf.where(name == b"EXIF", size, 0)
        )
        # Chunks of odd size are padded by one byte.
        size = tf.minimum(size + size % 2, length - position)
        return (
            position + 8 + size,
            frames + tf.cast(name == b"ANMF", tf.int64),
            tf.where(name == b"EXIF", content, seen),
        )

    _, frames, found = tf.while_loop(
        unfinished,
        step,
        (
            tf.constant(_FIRST_CHUNK),
            tf.constant(0, tf.int64),
            tf.constant(b""),
        ),
    )
    return frames, found


def _with_alpha(encoded):
    """Sets the alpha flag of an extended WebP.

    Without the flag, TensorFlow (2.20, 2.21) allocates three channels for an
    animation but lets libwebp write four, which overwrites memory and crashes
    the process. Opaque pixels remain opaque. Other WebP files are unchanged.

    Args:
        encoded: Scalar string, a WebP file.

    Returns:
        Scalar string.
    """
    length = tf.strings.length(encoded)
    padded = _padded(encoded)
    flags = tf.io.decode_raw(tf.strings.substr(padded, 20, 1), tf.uint8)[0]
    all_bytes = tf.constant([bytes([number]) for number in range(256)])
    flagged = tf.strings.join(
        [
            tf.strings.substr(padded, 0, 20),
            tf.gather(all_bytes, tf.cast(flags | _ALPHA, tf.int32)),
            tf.strings.substr(padded, 21, tf.maximum(length - 21, 0)),
        ]
    )
    is_extended = (tf.strings.substr(padded, 12, 4) == b"VP8X") & (length > 21)
    return tf.where(is_extended, flagged, encoded)
