"""GIF files: the first frame, at its position on the screen, in graphs.

TensorFlow decodes every frame before one can be selected, makes transparent
pixels black, and truncates a frame that does not begin at the corner. So this
module finds the first frame and decodes it as a GIF of its own. Pixels that it
does not cover, and transparent ones, are white.

Reference: GIF89a specification, sections 17 to 27.

Abbreviations for dimensions:
    h, w: height and width of the screen.
    f, g: height and width of the frame.
"""

import tensorflow as tf

from cappa_tf.data.images import raw_bytes

# Padding past the end of a file, which ends any structure in it.
_PADDING = b"\0" * 1024
_EXTENSION, _FRAME, _CONTROL = 0x21, 0x2C, 0xF9
# First bytes of a frame: the mark and its position.
_AT_THE_CORNER = b"\x2c\0\0\0\0"
_TRAILER = b"\0\x3b"
_LARGEST_TABLE = 3 * 256


def size(encoded):
    """Size (h, w) of the screen, or more if the frame exceeds it, int64 [2]."""
    return tf.cast(_first_frame(encoded)["size"], tf.int64)


def decode(encoded):
    """Decodes the first frame on white, uint8 [h, w, 3]."""
    found = _first_frame(encoded)
    check = tf.debugging.Assert(found["is_whole"], ["no whole frame"])
    with tf.control_dependencies([check] if check is not None else []):
        pieces = [tf.identity(piece) for piece in found["pieces"]]
    image = tf.io.decode_gif(tf.strings.join(pieces))[0]  # [f, g, 3]
    image = tf.cond(
        found["is_transparent"],
        # A transparent pixel is decoded as 0 whatever its color is. So
        # decoding with all colors white shows which pixels are transparent.
        lambda: image + (255 - tf.io.decode_gif(_whitened(pieces))[0]),
        lambda: image,
    )
    before = found["place"]
    behind = found["size"] - before - tf.shape(image)[:2]
    paddings = tf.concat(
        [tf.stack([before, behind], axis=1), tf.zeros([1, 2], tf.int32)], axis=0
    )
    return tf.pad(image, paddings, constant_values=255)


def _first_frame(encoded):
    """Finds the first frame of a GIF.

    Args:
        encoded: Scalar string, a GIF file, possibly truncated.

    Returns:
        Dict of "size" int32 [2], h and w; "place" int32 [2], top and left of
        the frame; "is_transparent" and "is_whole", scalar bools; "pieces", a
        list of scalar strings which joined are a GIF of only this frame, at
        the corner. The second and the fifth are color tables.
    """
    data = tf.io.decode_raw(encoded + _PADDING, tf.uint8)
    last = tf.strings.length(encoded)

    def byte(position):
        return tf.cast(data[tf.minimum(position, last)], tf.int32)

    def two(position):
        return byte(position) + 256 * byte(position + 1)

    def table_size(flags):
        """Size of the color table that flags announce."""
        size = 3 * tf.bitwise.left_shift(2, flags & 7)
        return tf.where(flags >= 0x80, size, 0)

    def behind_blocks(position):
        """Position after blocks of up to 255 bytes, preceded by lengths."""
        (position,) = tf.while_loop(
            lambda p: (byte(p) > 0) & (p < last),
            lambda p: (p + 1 + byte(p),),
            (position,),
        )
        return position + 1

    colors = table_size(byte(10))
    extensions = 13 + colors
    start, is_transparent = tf.while_loop(
        lambda p, _: (byte(p) == _EXTENSION) & (p < last),
        lambda p, flag: (
            behind_blocks(p + 2),
            flag | ((byte(p + 1) == _CONTROL) & (byte(p + 3) % 2 == 1)),
        ),
        (extensions, tf.constant(False)),
    )
    own_colors = table_size(byte(start + 9))
    pixels = start + 10 + own_colors
    end = behind_blocks(pixels + 1)
    place = tf.stack([two(start + 3), two(start + 1)])
    frame_size = tf.stack([two(start + 7), two(start + 5)])
    is_frame = byte(start) == _FRAME
    size = tf.maximum(
        tf.stack([two(8), two(6)]), tf.where(is_frame, place + frame_size, 0)
    )

    def part(start, end):
        return raw_bytes.part(encoded, start, end - start)

    return {
        "size": size,
        "place": place,
        "is_transparent": is_transparent,
        # The end mark of the pixels may be missing.
        "is_whole": is_frame & (end <= last + 1),
        "pieces": [
            part(0, 13),
            part(13, extensions),
            part(extensions, start) + _AT_THE_CORNER,
            part(start + 5, start + 10),
            part(start + 10, pixels),
            part(pixels, end - 1) + _TRAILER,
        ],
    }


def _whitened(pieces):
    """The same GIF with tables that contain only white."""
    pieces = list(pieces)
    for number in (1, 4):
        pieces[number] = tf.strings.substr(
            b"\xff" * _LARGEST_TABLE, 0, tf.strings.length(pieces[number])
        )
    return tf.strings.join(pieces)
