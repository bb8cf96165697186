"""What an animation holds, for decoders that read all of its frames.

TensorFlow decodes every frame of a GIF or a WebP before one can be taken, and
a GIF's frames may be larger than the picture its header announces: a hundred
kilobytes become gigabytes. Here the frames are found without decoding them.

Reference: GIF89a specification, sections 17 to 27; RFC 9649, section 2.7.
"""

import tensorflow as tf

# Behind the end of a file: an end of everything, and room to read it.
_PADDING = b"\0" * 1024
_EXTENSION, _FRAME = 0x21, 0x2C
_ALPHA = 0x10
_TRAILER = b"\x3b"


def first_gif_frame(encoded):
    """Finds the first frame of a GIF.

    Args:
        encoded: Scalar string, a GIF file; it may be cut.

    Returns:
        size: int64 [2], h and w of the frame or of the whole picture,
            whichever is larger.
        frame: Scalar string, a GIF of this frame alone.
    """
    data = tf.io.decode_raw(encoded + _PADDING, tf.uint8)
    last = tf.strings.length(encoded)

    def byte(position):
        return tf.cast(data[tf.minimum(position, last)], tf.int32)

    def two(position):
        return byte(position) + 256 * byte(position + 1)

    def behind_table(position, flags):
        """Behind the colour table that the flags before it announce."""
        size = 3 * tf.bitwise.left_shift(2, flags & 7)
        return position + tf.where(flags >= 0x80, size, 0)

    def behind_blocks(position):
        """Behind blocks of up to 255 bytes, each with its length in front."""
        (position,) = tf.while_loop(
            lambda p: (byte(p) > 0) & (p < last),
            lambda p: (p + 1 + byte(p),),
            (position,),
        )
        return position + 1

    start = behind_table(13, byte(10))
    (start,) = tf.while_loop(
        lambda p: (byte(p) == _EXTENSION) & (p < last),
        lambda p: (behind_blocks(p + 2),),
        (start,),
    )
    pixels = behind_table(start + 10, byte(start + 9))
    end = behind_blocks(pixels + 1)
    is_frame = (byte(start) == _FRAME) & (end <= last)
    frame_size = tf.stack([two(start + 7), two(start + 5)])
    size = tf.maximum(
        tf.stack([two(8), two(6)]), tf.where(is_frame, frame_size, 0)
    )
    frame = tf.strings.substr(encoded, 0, tf.minimum(end, last)) + _TRAILER
    return tf.cast(size, tf.int64), tf.where(is_frame, frame, encoded)


def num_webp_frames(encoded):
    """How many frames a WebP has; never too few.

    Args:
        encoded: Scalar string, a WebP file.

    Returns:
        Scalar int64, at least 1.
    """
    data = tf.io.decode_raw(encoded + _PADDING, tf.uint8)
    count = tf.size(data) - 3
    # The name may also stand in the compressed pixels, by chance.
    is_name = tf.reduce_all(
        [
            data[offset : offset + count] == letter
            for offset, letter in enumerate(b"ANMF")
        ],
        axis=0,
    )
    return tf.maximum(tf.math.count_nonzero(is_name), 1)


def with_alpha(encoded):
    """A WebP of the extended kind that says it may be transparent.

    TensorFlow (2.20, 2.21) makes room for three channels where an animation
    does not say so, and has libwebp write four: memory is overwritten and the
    process dies. Opaque pixels stay opaque. Other WebP files are as they were.

    Args:
        encoded: Scalar string, a WebP file.

    Returns:
        Scalar string.
    """
    length = tf.strings.length(encoded)
    padded = encoded + _PADDING
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
