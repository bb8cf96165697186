"""Image files to pixels of the size and range that a model takes.

Dimensions:
    h, w: height and width of a picture as it is.
    H, W: height and width the model takes.
"""

import functools

import tensorflow as tf

from cappa_tf.data import animation


def is_known_format(encoded):
    """Whether files begin like one of the formats that `decode` reads.

    Args:
        encoded: String tensor of any shape.

    Returns:
        Bool, of the same shape.
    """
    return _format(encoded) != _OTHER


def header_size(encoded):
    """Reads height and width from the header, without decoding.

    Args:
        encoded: Scalar string tensor, a JPEG, PNG, GIF, BMP or WebP file.

    Returns:
        int64 [2]: h, w. In a graph an unknown format raises
        `tf.errors.InvalidArgumentError`.
    """
    return tf.switch_case(
        _format(encoded),
        {
            kind: functools.partial(size, encoded)
            for kind, (size, _) in _formats().items()
        },
        default=lambda: _unknown_format(encoded, tf.int64),
    )


def pixels_to_decode(encoded):
    """How many pixels `decode` takes memory for, without decoding.

    Args:
        encoded: Scalar string tensor, see `header_size`.

    Returns:
        Scalar int64: h * w, times the frames of a WebP, which TensorFlow
        decodes all.
    """
    frames = tf.cond(
        _format(encoded) == _WEBP,
        lambda: animation.num_webp_frames(encoded),
        lambda: tf.constant(1, tf.int64),
    )
    return tf.reduce_prod(header_size(encoded)) * frames


def decode(encoded, max_pixels=None, at_least=None):
    """Decodes a picture of any supported format to RGB.

    Grey, palette, CMYK and 16-bit pictures become 8-bit RGB; transparent
    pixels of PNG and WebP are laid on white; of an animation the first frame
    is taken.

    With `at_least` a JPEG is decoded at the smallest of 1, 1/2, 1/4 and 1/8 of
    its size that is not smaller. The decoder leaves out the high frequencies
    of the scale asked for, so that each pixel is the mean of those it stands
    for: less work than a full decode and less aliasing after `resize`, which
    looks at no more than four neighbours.

    Args:
        encoded: Scalar string tensor, a JPEG, PNG, GIF, BMP or WebP file.
        max_pixels: Most `pixels_to_decode`: a larger picture is refused
            before memory is taken for it. None for any.
        at_least: Least (height, width) wanted of a larger JPEG, two integers
            or a tensor of them; None for its full size.

    Returns:
        uint8 [h, w, 3]; of a JPEG decoded at 1 / r, ceil(h / r) and
        ceil(w / r). In a graph a picture that cannot be decoded raises
        `tf.errors.InvalidArgumentError`.
    """
    # JPEG first and apart: it is what data sets of photos hold, and every
    # operation before it is paid for each picture.
    image = tf.cond(
        tf.strings.substr(encoded, 0, 3) == _MAGIC[_JPEG][1],
        lambda: _decode_jpeg(encoded, max_pixels, at_least),
        lambda: _decode_other(encoded, max_pixels),
    )
    return tf.ensure_shape(image, [None, None, 3])


def resize(image, size, antialias=False):
    """Squashes a picture to a size, bilinearly.

    The recipe's way (paper 2306.07915, appendix; big_vision pp/ops_image.py
    `resize`), but rounding where big_vision truncates.

    Args:
        image: uint8 [h, w, 3].
        size: (H, W).
        antialias: Whether to average over all pixels when shrinking.

    Returns:
        uint8 [H, W, 3].
    """
    image = tf.image.resize(image, size, antialias=antialias)
    return _rounded(tf.ensure_shape(image, [*size, 3]))


def resize_small_central_crop(image, small, size, antialias=False):
    """Scales the shorter side to a length, then cuts the middle out.

    Args:
        image: uint8 [h, w, 3].
        small: Length of the shorter side, at least max(H, W).
        size: (H, W).
        antialias: Whether to average over all pixels when shrinking.

    Returns:
        uint8 [H, W, 3].
    """
    shape = tf.cast(tf.shape(image)[:2], tf.float32)
    scale = small / tf.reduce_min(shape)
    scaled = tf.maximum(
        tf.cast(tf.round(shape * scale), tf.int32), [size[0], size[1]]
    )
    image = tf.image.resize(image, scaled, antialias=antialias)
    top = (scaled[0] - size[0]) // 2
    left = (scaled[1] - size[1]) // 2
    image = image[top : top + size[0], left : left + size[1]]
    return _rounded(tf.ensure_shape(image, [*size, 3]))


def _rounded(image):
    """float32 in 0..255 to the nearest uint8."""
    # Both filters take means: nothing leaves 0..255, which a saturating cast
    # would look for in two more passes.
    return tf.cast(image + 0.5, tf.uint8)


def to_model_range(image):
    """Pixels 0..255, uint8 or float32, to float32 in [-1, 1]."""
    if image.dtype == tf.uint8:
        # The same numbers in one pass over the memory instead of three.
        quantized = tf.bitcast(image, tf.quint8)
        return tf.quantization.dequantize(quantized, -1.0, 1.0)
    return tf.cast(image, tf.float32) / 127.5 - 1.0


def _decode_jpeg(encoded, max_pixels, at_least):
    """JPEG at full size, or at the scale that `decode` describes."""
    size = _jpeg_size(encoded)
    encoded = _check(encoded, tf.reduce_prod(size), max_pixels)
    if at_least is None:
        return tf.io.decode_jpeg(encoded, channels=3)
    # How often the picture holds what is wanted, in the direction it does so
    # less often; the scale is an attribute of the operation, not an input.
    times = tf.reduce_min(size // tf.cast(at_least, tf.int64))
    smaller = tf.cast(times >= tf.constant(_RATIOS[1:], tf.int64), tf.int32)
    return tf.switch_case(
        tf.reduce_sum(smaller),
        [
            functools.partial(
                tf.io.decode_jpeg, encoded, channels=3, ratio=ratio
            )
            for ratio in _RATIOS
        ],
    )


def _decode_other(encoded, max_pixels):
    """Any format but JPEG."""

    def decode_any(encoded):
        if max_pixels is not None:
            pixels = pixels_to_decode(encoded)
            encoded = _check(encoded, pixels, max_pixels)
        return tf.switch_case(
            _format(encoded),
            {
                kind: functools.partial(decode_format, encoded)
                for kind, (_, decode_format) in _formats().items()
            },
            default=lambda: _unknown_format(encoded, tf.uint8),
        )

    # A branch of a graph is passed through, operation by operation, also when
    # it is not taken: these would add half a JPEG's time to each one. A data
    # set of one element keeps them in a function of their own.
    one = tf.data.Dataset.from_tensors(encoded).map(decode_any)
    return one.get_single_element()


def _check(encoded, pixels, max_pixels):
    """`encoded`, if it has not too many pixels."""
    if max_pixels is None:
        return encoded
    check = tf.debugging.Assert(
        pixels <= max_pixels, [f"more than {max_pixels} pixels"]
    )
    with tf.control_dependencies([check] if check is not None else []):
        return tf.identity(encoded)


_RATIOS = (1, 2, 4, 8)
_JPEG, _PNG, _GIF, _BMP, _WEBP, _OTHER = range(6)
_MAGIC = (
    (0, b"\xff\xd8\xff"),
    (0, b"\x89PNG\r\n\x1a\n"),
    (0, b"GIF8"),
    (0, b"BM"),
    (8, b"WEBP"),
)


def _formats():
    """How to read size and pixels of each format."""
    return {
        _JPEG: (_jpeg_size, functools.partial(tf.io.decode_jpeg, channels=3)),
        _PNG: (
            lambda encoded: _fields(encoded, [20, 16], 4, little=False),
            _decode_png,
        ),
        _GIF: (
            lambda encoded: animation.first_gif_frame(encoded)[0],
            _decode_gif,
        ),
        # A BMP stored top row first has a negative height.
        _BMP: (
            lambda encoded: _signed_32(_fields(encoded, [22, 18], 4)),
            _decode_bmp,
        ),
        _WEBP: (_webp_size, _decode_webp),
    }


def _format(encoded):
    """int32: which of the formats the first bytes announce."""
    head = _first_bytes(encoded)
    result = tf.constant(_OTHER)
    for number, (start, magic) in enumerate(_MAGIC):
        found = tf.strings.substr(head, start, len(magic)) == magic
        result = tf.where(found, number, result)
    return result


def _first_bytes(encoded):
    """The first 32 bytes, with zeros where a file is shorter."""
    # A file cut before its header ends reads as zeros and then fails to decode.
    head = tf.strings.substr(encoded, 0, 32)
    return tf.strings.substr(head + b"\0" * 32, 0, 32)


def _jpeg_size(encoded):
    return tf.io.extract_jpeg_shape(encoded, tf.int64)[:2]


def _unknown_format(encoded, dtype):
    """Fails, with a tensor of the type the other branches give."""
    tf.debugging.Assert(
        False, ["neither JPEG, PNG, GIF, BMP nor WebP:", _first_bytes(encoded)]
    )
    shape = [2] if dtype == tf.int64 else [1, 1, 3]
    return tf.zeros(shape, dtype)


def _fields(encoded, offsets, length, little=True):
    """int64 [len(offsets)]: unsigned integers at byte offsets."""
    raw = tf.cast(tf.io.decode_raw(_first_bytes(encoded), tf.uint8), tf.int64)
    powers = [256**i for i in range(length)]
    weights = tf.constant(powers if little else powers[::-1], tf.int64)
    return tf.stack(
        [
            tf.reduce_sum(raw[start : start + length] * weights)
            for start in offsets
        ]
    )


def _signed_32(values):
    """The magnitude of 32-bit integers read as unsigned ones."""
    return tf.where(values >= 1 << 31, (1 << 32) - values, values)


def _webp_size(encoded):
    """h, w of the three kinds of WebP (lossy, lossless, extended)."""
    kind = tf.strings.substr(_first_bytes(encoded), 12, 4)

    def lossless():
        packed = _fields(encoded, [21], 4)[0]
        width = tf.bitwise.bitwise_and(packed, 0x3FFF) + 1
        height = tf.bitwise.bitwise_and(packed // (1 << 14), 0x3FFF) + 1
        return tf.stack([height, width])

    return tf.case(
        [
            (kind == b"VP8X", lambda: _fields(encoded, [27, 24], 3) + 1),
            (kind == b"VP8L", lossless),
        ],
        default=lambda: _fields(encoded, [28, 26], 2) % (1 << 14),
    )


def _decode_png(encoded):
    """PNG; its header's colour type says whether there is transparency."""
    colour_type = _fields(encoded, [25], 1)[0]
    return tf.cond(
        (colour_type == 4) | (colour_type == 6),
        lambda: _on_white(tf.io.decode_png(encoded, channels=4)),
        lambda: tf.io.decode_png(encoded, channels=3),
    )


def _decode_gif(encoded):
    """First frame of a GIF."""
    return tf.io.decode_image(
        animation.first_gif_frame(encoded)[1],
        channels=3,
        expand_animations=False,
    )


def _decode_bmp(encoded):
    """BMP of 1, 3 or 4 channels; what the fourth means is not settled."""
    image = tf.io.decode_bmp(encoded)
    last = tf.shape(image)[-1] - 1
    return tf.gather(image, tf.minimum([0, 1, 2], last), axis=-1)


def _decode_webp(encoded):
    """First frame of a WebP, which has 4 channels if it is transparent."""
    image = tf.io.decode_webp(animation.with_alpha(encoded))[0]
    return tf.cond(
        tf.shape(image)[-1] == 4, lambda: _on_white(image), lambda: image
    )


def _on_white(image):
    """uint8 [h, w, 4] to [h, w, 3]: transparent pixels laid on white."""
    colour = tf.cast(image[..., :3], tf.float32)
    alpha = tf.cast(image[..., 3:4], tf.float32) / 255.0
    return tf.cast(tf.round(colour * alpha + 255.0 * (1.0 - alpha)), tf.uint8)
