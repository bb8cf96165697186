"""Decoding and resizing of image files to the input of a model.

`formats.py` describes how each kind of file is handled.

Dimensions:
    h, w: height and width of an image as it is stored.
    H, W: height and width the model takes.
"""

import functools

import tensorflow as tf

from cappa_tf.data.images import bmp, exif, formats, gif, jpeg, png, webp

# The modules of the formats, in the order of `formats.kind`.
_MODULES = (jpeg, png, gif, bmp, webp)
_ANY = -1


def header_size(encoded):
    """Reads height and width from the header, without decoding.

    Args:
        encoded: Scalar string tensor, a JPEG, PNG, GIF, BMP or WebP file.

    Returns:
        int64 [2]: h, w. An unknown format raises
        `tf.errors.InvalidArgumentError`.
    """
    return _header_functions()["size"](encoded)


def pixels_to_decode(encoded):
    """Number of pixels that `decode` holds in memory, without decoding.

    Args:
        encoded: Scalar string tensor, a file as in `header_size`.

    Returns:
        Scalar int64, h * w; of a WebP times the number of its frames, all of
        which TensorFlow decodes.
    """
    return _header_functions()["pixels"](encoded)


def read_orientation(encoded):
    """Reads the EXIF orientation, by which `decode` rotates an image.

    Args:
        encoded: Scalar string tensor, a file as in `header_size`.

    Returns:
        Scalar int32, 1 to 8.
    """
    return _header_functions()["orientation"](encoded)


def decode(encoded, max_pixels=None, at_least=None, others=None):
    """Decodes an image to upright RGB.

    With `at_least` a JPEG is decoded at the smallest of 1, 1/2, 1/4 and 1/8 of
    its size that is not smaller. The decoder drops the high frequencies, so
    that each pixel is the mean of those it replaces. This takes less work than
    a full decode and reduces aliasing after `resize`, which interpolates only
    four neighbors.

    Args:
        encoded: Scalar string tensor, a file of a kind in `formats.py`.
        max_pixels: Maximum of `pixels_to_decode`; a larger image is refused
            before it takes memory. None for no limit.
        at_least: Minimum (height, width) of a larger JPEG after rotation, two
            integers or a tensor of them; None for its full size.
        others: Function that decodes files other than JPEG and PNG, from the
            scalar string and `max_pixels` (int64, -1 for no limit) to uint8
            [h, w, 3], such as `image_files.decode_other`. None if Python is
            not available: then GIF, BMP and WebP are decoded in the graph,
            which makes it several times as large, and other formats fail.

    Returns:
        uint8 [h, w, 3], or [w, h, 3] of a photo that is stored sideways; for a
        JPEG decoded at 1 / r, h and w are ceil(h / r) and ceil(w / r). An
        image that cannot be decoded raises `tf.errors.InvalidArgumentError`.
    """
    # JPEG comes first and separately, as most photos are JPEGs and every
    # operation before it costs time for each image.
    limit = tf.convert_to_tensor(
        _ANY if max_pixels is None else max_pixels, tf.int64
    )
    wanted = [jpeg.FULL_SIZE] * 2 if at_least is None else at_least
    wanted = tf.cast(wanted, tf.int32)
    functions = _decoders()

    def decode_png():
        file = _check_pixels(encoded, png.size, limit)
        return functions[png](file)

    def decode_other():
        if others is not None:
            return others(encoded, limit)
        return functions["others"](encoded, limit)

    image = tf.cond(
        jpeg.is_jpeg(encoded),
        lambda: _decode_jpeg(encoded, limit, wanted, functions[jpeg]),
        lambda: tf.cond(png.is_png(encoded), decode_png, decode_other),
    )
    return tf.ensure_shape(image, [None, None, 3])


def resize(image, size, antialias=False):
    """Resizes an image bilinearly, without keeping its aspect ratio.

    Done as in the recipe (paper 2306.07915, appendix; big_vision
    pp/ops_image.py `resize`), but rounds where big_vision truncates.

    Args:
        image: uint8 [h, w, 3].
        size: (H, W).
        antialias: Whether to average over all pixels when downsizing.

    Returns:
        uint8 [H, W, 3].
    """
    image = tf.image.resize(image, size, antialias=antialias)
    return _rounded(tf.ensure_shape(image, [*size, 3]))


def resize_small_central_crop(image, small, size, antialias=False):
    """Resizes the shorter side to a length, then crops the center.

    Args:
        image: uint8 [h, w, 3].
        small: Length of the shorter side, at least max(H, W).
        size: (H, W).
        antialias: Whether to average over all pixels when downsizing.

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
    """Rounds float32 in 0..255 to the nearest uint8."""
    # Both filters take means, so no value is outside of 0..255. A saturating
    # cast would check that in two more passes.
    return tf.cast(image + 0.5, tf.uint8)


def to_model_range(image):
    """Scales pixels in 0..255, uint8 or float32, to float32 in [-1, 1]."""
    if image.dtype == tf.uint8:
        # The same numbers in one pass over the memory instead of three.
        quantized = tf.bitcast(image, tf.quint8)
        return tf.quantization.dequantize(quantized, -1.0, 1.0)
    return tf.cast(image, tf.float32) / 127.5 - 1.0


def _decode_jpeg(encoded, limit, at_least, decode_with_segments):
    """Decodes a JPEG; the function decodes CMYK or those with segments."""
    found = jpeg.shape(encoded)
    encoded = _check_pixels(encoded, lambda _: found[:2], limit)
    is_plain = jpeg.is_plain(encoded) & (found[2] != 4)
    return jpeg.decode_scaled(
        encoded,
        found[:2],
        at_least,
        (
            ~is_plain,
            lambda: decode_with_segments(encoded, limit, at_least),
        ),
    )


def _check_pixels(encoded, measure, limit):
    """Returns `encoded` if the product of its `measure` is within the limit."""
    pixels = tf.reduce_prod(measure(encoded))
    check = tf.debugging.Assert(
        (pixels <= limit) | (limit == _ANY), ["more than", limit, "pixels"]
    )
    with tf.control_dependencies([check] if check is not None else []):
        return tf.identity(encoded)


def _apart(*signature):
    """Makes a graph function that is called, not inlined into its callers.

    It is traced only once, whatever graphs call it, which eager calls need.
    """
    return functools.partial(
        tf.function,
        input_signature=signature,
        autograph=False,
        experimental_attributes={"_noinline": True},
    )


_ENCODED = tf.TensorSpec([], tf.string)
_LIMIT = tf.TensorSpec([], tf.int64)
_SIZE = tf.TensorSpec([2], tf.int32)


def _by_kind(encoded, modules, function, default):
    """Calls a function with the module of a file's kind."""
    return tf.switch_case(
        formats.kind(encoded),
        {
            number: functools.partial(function, module)
            if module in modules
            else default
            for number, module in enumerate(_MODULES)
        },
        default=default,
    )


@functools.cache
def _header_functions():
    """Functions that read size, pixels to decode and orientation."""

    def fail(dtype, shape=()):
        return lambda encoded: _unknown_format(encoded, tf.zeros(shape, dtype))

    def apart(read, default):
        functions = {
            module: _apart(_ENCODED)(functools.partial(read, module))
            for module in _MODULES
        }
        return _apart(_ENCODED)(
            lambda encoded: _by_kind(
                encoded,
                _MODULES,
                lambda module: functions[module](encoded),
                lambda: default(encoded),
            )
        )

    def pixels(module, encoded):
        frames = webp.num_frames(encoded) if module is webp else 1
        return tf.reduce_prod(module.size(encoded)) * frames

    def turned(module, encoded):
        if not hasattr(module, "exif_data"):
            return tf.constant(1)
        return exif.read(module.exif_data(encoded))

    return {
        "size": apart(
            lambda module, encoded: module.size(encoded), fail(tf.int64, [2])
        ),
        "pixels": apart(pixels, fail(tf.int64)),
        "orientation": apart(turned, fail(tf.int32)),
    }


@functools.cache
def _decoders():
    """A decoder for each format, and one for those that Python may decode."""

    def decode_jpeg(encoded, limit, at_least):
        encoded = _check_pixels(encoded, jpeg.size, limit)
        return jpeg.decode(encoded, at_least)

    functions = {jpeg: _apart(_ENCODED, _LIMIT, _SIZE)(decode_jpeg)}
    for module in _MODULES[1:]:
        functions[module] = _apart(_ENCODED)(module.decode)

    def decode_others(encoded, limit):
        is_known = formats.kind(encoded) != formats.OTHER
        encoded = tf.cond(
            is_known & (limit != _ANY),
            lambda: _check_pixels(encoded, pixels_to_decode, limit),
            lambda: encoded,
        )
        return _by_kind(
            encoded,
            _MODULES[2:],
            lambda module: functions[module](encoded),
            lambda: _unknown_format(encoded, tf.zeros([1, 1, 3], tf.uint8)),
        )

    functions["others"] = _apart(_ENCODED, _LIMIT)(decode_others)
    return functions


def _unknown_format(encoded, value):
    """Fails; returns a tensor of the same type as the other branches."""
    # The message omits the bytes, which Python could not decode.
    name = formats.other_name(encoded)
    check = tf.debugging.Assert(
        False, ["neither JPEG, PNG, GIF, BMP nor WebP", name]
    )
    with tf.control_dependencies([check] if check is not None else []):
        return tf.identity(value)
