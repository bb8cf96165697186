"""BMP files: size and pixels, in graphs.

TensorFlow's own operation returns the indices of a palette as gray levels and
misreads or refuses most kinds other than 24 and 32 bits. This module reads all
kinds without compression, with the headers of Windows and of OS/2.

Abbreviations for dimensions:
    h, w: height and width of the image.
    s: bytes of a row, a multiple of 4.
"""

import tensorflow as tf

from cappa_tf.data.images import raw_bytes

_FILE_HEADER = 14
_OLD_HEADER = 12
_OS2_HEADER = 64
_BITFIELDS = (3, 6)
_BITS = (1, 2, 4, 8, 16, 24, 32)
_COLORS = 256
# Masks of red, green, blue and alpha, by the bits of a pixel.
_MASKS = {
    16: (0x7C00, 0x03E0, 0x001F, 0),
    32: (0x00FF0000, 0x0000FF00, 0x000000FF, 0),
}


def size(encoded):
    """Size (h, w) from the header, int64 [2]."""
    header = _Header(encoded)
    return tf.stack([header.height, header.width])


def decode(encoded):
    """Decodes a BMP without compression.

    The highest value of a bit field becomes 255. An alpha mask is used only if
    the header has bit fields. Indices beyond the palette are black.

    Returns:
        uint8 [h, w, 3].
    """
    header = _Header(encoded)
    check = tf.debugging.Assert(header.is_known, ["a BMP of an unknown kind"])
    with tf.control_dependencies([check] if check is not None else []):
        stride = (header.width * header.bits + 31) // 32 * 4
    # The last row may lack its padding bytes.
    data = raw_bytes.part(
        encoded + b"\0\0\0", header.first_pixel, header.height * stride
    )
    rows = tf.reshape(tf.io.decode_raw(data, tf.uint8), [header.height, stride])
    rows = tf.cond(header.is_top_down, lambda: rows, lambda: rows[::-1])
    image = tf.case(
        [
            (header.bits <= 8, lambda: _from_palette(encoded, header, rows)),
            (header.bits == 24, lambda: _pixels(rows, header.width, 3)),
            (
                (header.bits == 32) & ~header.has_masks,
                lambda: _pixels(rows, header.width, 4),
            ),
        ],
        default=lambda: _from_masks(header, rows),
    )
    return tf.ensure_shape(image, [None, None, 3])


class _Header:
    """The parsed header; all scalars are int64 or bool."""

    def __init__(self, encoded):
        data = raw_bytes.raw(encoded, 0, 70)

        def number(start, length=4):
            return raw_bytes.unsigned(data, start, length)

        none = tf.constant(0, tf.int64)
        size = number(14)
        old = size == _OLD_HEADER
        height = tf.where(old, number(20, 2), _signed(number(22)))
        self.height = tf.abs(height)
        self.width = tf.where(old, number(18, 2), tf.abs(_signed(number(18))))
        # A negative height means that the top row is stored first.
        self.is_top_down = height < 0
        self.bits = tf.where(old, number(24, 2), number(28, 2))
        compression = tf.where(old, none, number(30))
        self.has_masks = tf.reduce_any(compression == _BITFIELDS)
        self.is_known = (
            tf.reduce_any(self.bits == _BITS)
            & (size >= _OLD_HEADER)
            & (
                (compression == 0)
                | (self.has_masks & (self.bits >= 16) & (size != _OS2_HEADER))
            )
        )
        behind = tf.where(size == 40, tf.where(compression == 6, 16, 12), 0)
        behind = tf.cast(tf.where(self.has_masks, behind, 0), tf.int64)
        self.palette = _FILE_HEADER + size + behind
        self.color_size = tf.where(old, tf.constant(3, tf.int64), 4)
        colors = tf.where(old, none, number(46))
        most = tf.bitwise.left_shift(tf.ones([], tf.int64), self.bits % 32)
        colors = tf.where(colors == 0, most, colors)
        self.colors = tf.where(
            self.bits <= 8, tf.minimum(colors, _COLORS), none
        )
        # Some writers omit the palette from the offset of the pixels.
        forgotten = self.palette + self.colors * self.color_size
        first = number(10)
        self.first_pixel = tf.where(
            (first == 0) | (first == self.palette), forgotten, first
        )
        self.masks = self._read_masks(number, size, compression)

    def _read_masks(self, number, size, compression):
        """Masks of red, green, blue and alpha, int64 [4]."""
        has_alpha = (compression == 6) | (size >= 56)
        stored = tf.stack(
            [
                *(number(54 + 4 * i) for i in range(3)),
                number(66) * tf.cast(has_alpha, tf.int64),
            ]
        )
        usual = tf.where(
            self.bits == 16,
            tf.constant(_MASKS[16], tf.int64),
            tf.constant(_MASKS[32], tf.int64),
        )
        return tf.where(self.has_masks, stored, usual)


def _signed(value):
    """Converts an unsigned 32-bit integer to a signed one."""
    return tf.where(value >= 1 << 31, value - (1 << 32), value)


def _pixels(rows, width, num_bytes):
    """uint8 [h, w, 3] of rows [h, s] that hold blue, green, red, ..."""
    rows = rows[:, : width * num_bytes]
    pixels = tf.reshape(rows, [tf.shape(rows)[0], -1, num_bytes])
    return pixels[..., 2::-1]


def _from_palette(encoded, header, rows):
    """uint8 [h, w, 3] of rows [h, s] of numbers of 1, 2, 4 or 8 bits."""
    table = raw_bytes.part(
        encoded, header.palette, header.colors * header.color_size
    )
    table = tf.io.decode_raw(table + b"\0" * 4 * _COLORS, tf.uint8)
    table = tf.reshape(
        table[: _COLORS * header.color_size], [_COLORS, header.color_size]
    )[:, 2::-1]
    bits = tf.cast(header.bits, tf.int32)
    shifts = tf.cast(tf.range(8 - bits, -1, -bits), tf.uint8)
    numbers = tf.bitwise.right_shift(rows[..., tf.newaxis], shifts)
    numbers = tf.bitwise.bitwise_and(
        numbers, tf.cast(tf.bitwise.left_shift(1, bits) - 1, tf.uint8)
    )
    numbers = tf.reshape(numbers, [header.height, -1])[:, : header.width]
    return tf.gather(table, tf.cast(numbers, tf.int32))


def _from_masks(header, rows):
    """uint8 [h, w, 3] of rows [h, s] of bit fields in 16 or 32 bits."""
    num_bytes = header.bits // 8
    rows = tf.reshape(
        rows[:, : header.width * num_bytes],
        [header.height, header.width, num_bytes],
    )
    values = tf.cond(
        num_bytes == 2,
        lambda: tf.cast(tf.bitcast(_last(rows, 2), tf.uint16), tf.uint32),
        lambda: tf.bitcast(_last(rows, 4), tf.uint32),
    )

    def field(mask):
        count = tf.raw_ops.PopulationCount
        lowest = tf.cast(
            count(x=tf.bitwise.bitwise_and(mask, -mask) - 1), tf.int32
        )
        # The highest 8 bits of longer fields are used.
        more = tf.maximum(tf.cast(count(x=mask), tf.int32) - 8, 0)
        shift = tf.where(mask == 0, 0, lowest + more)
        most = tf.cast(
            tf.bitwise.right_shift(mask, tf.cast(shift, mask.dtype)), tf.int32
        )
        value = tf.bitwise.right_shift(
            tf.bitwise.bitwise_and(values, tf.cast(mask, tf.uint32)),
            tf.cast(shift, tf.uint32),
        )
        scaled = tf.range(_COLORS) * 255 // tf.clip_by_value(most, 1, 255)
        return tf.gather(tf.cast(scaled, tf.uint8), tf.cast(value, tf.int32))

    # With no mask at all, 32 bits are blue, green, red and alpha.
    unset = tf.reduce_all(header.masks == 0)
    masks = tf.where(
        unset,
        tf.constant((*_MASKS[32][:3], 0xFF000000), tf.int64),
        header.masks,
    )
    image = tf.stack([field(masks[i]) for i in range(4)], axis=-1)
    return tf.cond(
        masks[3] == 0,
        lambda: image[..., :3],
        lambda: raw_bytes.on_white(image),
    )


def _last(values, size):
    """Sets a static last dimension, which a bit cast requires."""
    return tf.reshape(values, [tf.shape(values)[0], -1, size])
