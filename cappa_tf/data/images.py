"""Image files to pixels, and what may be done to pixels in training.

Dimensions:
    B: batch size.
    h, w: height and width of a picture as it is.
    H, W: height and width the model takes.
"""

import tensorflow as tf

from cappa_tf.data import animation, draws


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
            _JPEG: lambda: tf.io.extract_jpeg_shape(encoded, tf.int64)[:2],
            _PNG: lambda: _fields(encoded, [20, 16], 4, little=False),
            _GIF: lambda: animation.first_gif_frame(encoded)[0],
            # A BMP stored top row first has a negative height.
            _BMP: lambda: _signed_32(_fields(encoded, [22, 18], 4)),
            _WEBP: lambda: _webp_size(encoded),
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


def decode(encoded, max_pixels=None):
    """Decodes a picture of any supported format to RGB.

    Grey, palette, CMYK and 16-bit pictures become 8-bit RGB; transparent
    pixels of PNG and WebP are laid on white; of an animation the first frame
    is taken.

    Args:
        encoded: Scalar string tensor, a JPEG, PNG, GIF, BMP or WebP file.
        max_pixels: Most `pixels_to_decode`: a larger picture is refused
            before memory is taken for it. None for any.

    Returns:
        uint8 [h, w, 3]. In a graph a picture that cannot be decoded raises
        `tf.errors.InvalidArgumentError`.
    """
    if max_pixels is not None:
        check = tf.debugging.assert_less_equal(
            pixels_to_decode(encoded),
            tf.cast(max_pixels, tf.int64),
            message=f"more than {max_pixels} pixels",
        )
        with tf.control_dependencies([check] if check is not None else []):
            encoded = tf.identity(encoded)
    image = tf.switch_case(
        _format(encoded),
        {
            _JPEG: lambda: tf.io.decode_jpeg(encoded, channels=3),
            _PNG: lambda: _decode_png(encoded),
            _GIF: lambda: tf.io.decode_image(
                animation.first_gif_frame(encoded)[1],
                channels=3,
                expand_animations=False,
            ),
            _BMP: lambda: _decode_bmp(encoded),
            _WEBP: lambda: _decode_webp(encoded),
        },
        default=lambda: _unknown_format(encoded, tf.uint8),
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
    image = tf.ensure_shape(image, [*size, 3])
    return tf.saturate_cast(tf.round(image), tf.uint8)


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
    image = tf.ensure_shape(image, [*size, 3])
    return tf.saturate_cast(tf.round(image), tf.uint8)


def to_model_range(image):
    """Pixels 0..255 to float32 in [-1, 1]."""
    return tf.cast(image, tf.float32) / 127.5 - 1.0


def augment(
    images,
    size,
    seed,
    index,
    flip=False,
    crop_scale=None,
    crop_aspect=(0.75, 4 / 3),
    shift=0,
):
    """Random crop, shift and flip of a batch, each example by its own draws.

    All three choose a box of the picture, and one bilinear operation cuts the
    boxes out: the cost does not grow with what is switched on.

    Args:
        images: uint8 [B, h, w, 3].
        size: (H, W) of the result.
        seed: Scalar integer.
        index: int64 [B], position of each example in the training stream.
        flip: Whether to mirror every second example, on average.
        crop_scale: (least, most) fraction of the area to cut out, or None.
        crop_aspect: (least, most) width / height of the cut, where 1 is the
            picture's own.
        shift: Most pixels to move the picture in either direction; what
            comes in at the border is mirrored. Not together with crop_scale.

    Returns:
        float32 [B, H, W, 3] in 0..255.
    """
    batch = tf.shape(index)[0]
    top, left = tf.zeros([batch]), tf.zeros([batch])
    bottom, right = tf.ones([batch]), tf.ones([batch])
    if crop_scale is not None:
        top, left, bottom, right = _random_boxes(
            seed, index, crop_scale, crop_aspect
        )
    elif shift:
        images, top, left, bottom, right = _random_shift(
            images, seed, index, shift
        )
    if flip:
        flips = draws.uniform(seed, draws.FLIP, index, 1)[:, 0] < 0.5
        left, right = (
            tf.where(flips, right, left),
            tf.where(flips, left, right),
        )
    # The hair's breadth keeps rounding from putting a border pixel outside
    # the picture, where the operation would fill in a constant.
    boxes = tf.stack([top, left, bottom, right], axis=1) * (1 - 1e-6)  # [B, 4]
    return tf.image.crop_and_resize(images, boxes, tf.range(batch), size)


def _random_boxes(seed, index, scale, aspect):
    """Top, left, bottom and right in 0..1 of a random cut, each [B]."""
    u = draws.uniform(seed, draws.CROP, index, 4)
    area = scale[0] + u[:, 0] * (scale[1] - scale[0])
    low, high = tf.math.log(float(aspect[0])), tf.math.log(float(aspect[1]))
    ratio = tf.exp(low + u[:, 1] * (high - low))
    height = tf.minimum(tf.sqrt(area / ratio), 1.0)
    width = tf.minimum(tf.sqrt(area * ratio), 1.0)
    top = u[:, 2] * (1.0 - height)
    left = u[:, 3] * (1.0 - width)
    return top, left, top + height, left + width


def _random_shift(images, seed, index, shift):
    """Mirrors a margin around the pictures and draws whole-pixel boxes."""
    pad = [[0, 0], [shift, shift], [shift, shift], [0, 0]]
    height, width = images.shape[1], images.shape[2]
    images = tf.pad(images, pad, mode="REFLECT")
    u = draws.uniform(seed, draws.SHIFT, index, 2)
    start = tf.floor(u * (2 * shift + 1))  # [B, 2] in 0..2 * shift
    # `crop_and_resize` counts from the first pixel's centre to the last's.
    rows, columns = height + 2 * shift - 1, width + 2 * shift - 1
    top, left = start[:, 0] / rows, start[:, 1] / columns
    bottom = (start[:, 0] + height - 1) / rows
    right = (start[:, 1] + width - 1) / columns
    return images, top, left, bottom, right


_JPEG, _PNG, _GIF, _BMP, _WEBP, _OTHER = range(6)
_MAGIC = (
    (_JPEG, 0, b"\xff\xd8\xff"),
    (_PNG, 0, b"\x89PNG\r\n\x1a\n"),
    (_GIF, 0, b"GIF8"),
    (_BMP, 0, b"BM"),
    (_WEBP, 8, b"WEBP"),
)


def _format(encoded):
    """int32: which of the formats the first bytes announce."""
    # `substr` fails on a string shorter than the offset.
    head = tf.strings.substr(encoded + b"\0" * 16, 0, 16)
    result = tf.constant(_OTHER)
    for number, start, magic in _MAGIC:
        found = tf.strings.substr(head, start, len(magic)) == magic
        result = tf.where(found, number, result)
    return result


def _unknown_format(encoded, dtype):
    """Fails, with a tensor of the type the other branches give."""
    tf.debugging.Assert(
        False, ["neither JPEG, PNG, GIF, BMP nor WebP:", _head(encoded)]
    )
    shape = [2] if dtype == tf.int64 else [1, 1, 3]
    return tf.zeros(shape, dtype)


def _head(encoded):
    return tf.strings.substr(encoded + b" " * 8, 0, 8)


def _fields(encoded, offsets, length, little=True):
    """int64 [len(offsets)]: unsigned integers at byte offsets."""
    # A file cut before its header ends reads as zeros and then fails to decode.
    raw = tf.io.decode_raw(
        tf.strings.substr(encoded + b"\0" * 32, 0, 32), tf.uint8
    )
    raw = tf.cast(raw, tf.int64)
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
    kind = tf.strings.substr(encoded + b"\0" * 32, 12, 4)

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
