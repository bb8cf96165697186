"""Image files: finding them, checking them, and the bytes to store.

`formats.py` describes how each kind of file is handled. Files that
`decode_resize.decode` reads are checked with it, except for ordinary JPEGs,
which Pillow checks as well and downsizes faster. Pillow reads all other files,
here and in training.
"""

import importlib
import io
import os

import numpy as np
import tensorflow as tf
from PIL import Image, ImageOps, UnidentifiedImageError

from cappa_tf.data.images import formats, from_python
from cappa_tf.data.sources import folder_listing
from cappa_tf.utils import files

JPEG_QUALITY = 95
# The only limit of images that are downsized, the same as Pillow's, as they are
# in memory only briefly.
_MOST_PIXELS = 2 * Image.MAX_IMAGE_PIXELS
# Formats that are lossy themselves, so that JPEG does no further harm.
_LOSSY = ("AVIF", "HEIC")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# TIFF tags.
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
_WHITE_IS_ZERO = 0


class UnusableError(ValueError):
    """An image cannot be used.

    Attributes:
        reason: The reason, in words to count by.
        name: Name of the image, if it is known.
    """

    def __init__(self, reason, name=""):
        super().__init__(reason)
        self.reason = reason
        self.name = name


def find_pictures(paths):
    """Lists files as given, and the images below folders, sorted.

    Args:
        paths: Paths of files and folders.

    Returns:
        A list of paths. A given file is included whatever its name; if it is
        missing or not an image, reading it will fail.
    """
    found = []
    for path in paths:
        if not files.isdir(path):
            found.append(path)
            continue
        below = []
        for folder, names in folder_listing.walk(path):
            below += [
                os.path.join(folder, name)
                for name in names
                if folder_listing.is_image(name)
            ]
        found += sorted(below)
    return found


def read(path, resize=None, min_side=1, max_pixels=None):
    """Reads an image file and checks that it can be decoded.

    A file that `decode_resize.decode` reads is stored as it is, unless it must
    be downsized or rotated according to its EXIF data. Downsized images,
    rotated JPEGs and files of other lossy formats become JPEGs of quality 95.
    Any other file that is rotated, or that TensorFlow does not decode, becomes
    a PNG with the same pixels.

    Args:
        path: Path of the file, local or in a bucket.
        resize: Length of the shorter side to which larger images are
            downsized, or None.
        min_side: Minimum length of the shorter side.
        max_pixels: Maximum number of pixels; None for no limit. With `resize`
            only Pillow's own limit holds (179 million), since the stored image
            is small.

    Returns:
        The bytes to store.

    Raises:
        UnusableError: If the image cannot be used.
    """
    return check(read_bytes(path), resize, min_side, max_pixels)


def read_bytes(path):
    """Reads the bytes of a file without checking them.

    Args:
        path: Path of the file, local or in a bucket.

    Raises:
        UnusableError: If the file is missing or cannot be read.
    """
    try:
        return files.read_bytes(os.fspath(path))
    except FileNotFoundError:
        raise UnusableError("image missing") from None
    except OSError:
        raise UnusableError("image unreadable") from None


def check(content, resize=None, min_side=1, max_pixels=None):
    """Checks that the bytes of an image file can be decoded.

    Args:
        content: The bytes.
        resize: Length of the shorter side to downsize to, as in `read`.
        min_side: Minimum length of the shorter side.
        max_pixels: Maximum number of pixels, as in `read`.

    Returns:
        The bytes to store.

    Raises:
        UnusableError: If the image cannot be used.
    """
    kind, name = formats.kind_of_bytes(content)
    if kind == formats.OTHER:
        image = _decode_other(content, name, resize, min_side, max_pixels)
        lossy = name in _LOSSY
    elif kind == formats.JPEG and _is_ordinary(content):
        image = _check_jpeg(content, resize, min_side, max_pixels)
        lossy = True
    else:
        image = _decode_in_graph(content, resize, min_side, max_pixels)
        lossy = kind == formats.JPEG
    if image is None:
        return content
    if resize is not None and min(image.size) > resize:
        scale = resize / min(image.size)
        size = [max(1, round(side * scale)) for side in image.size]
        image = image.resize(size, Image.Resampling.BICUBIC)
        lossy = True
    stored = io.BytesIO()
    if lossy:
        image.save(stored, "JPEG", quality=JPEG_QUALITY)
    else:
        image.save(stored, "PNG")
    return stored.getvalue()


def decode_other(encoded, max_pixels):
    """Decodes files other than JPEG and PNG in a graph, with Python.

    GIF, BMP and WebP are decoded as `decode_resize.decode` does without Python.
    With their decoders in it, the graph of an input pipeline would be several
    times as large, and it is instantiated for every chunk of records.

    Args:
        encoded: Scalar string tensor, an image file.
        max_pixels: Scalar int64 tensor; -1 for no limit.

    Returns:
        uint8 [h, w, 3], upright. A file that cannot be decoded raises
        `tf.errors.InvalidArgumentError`.
    """

    def decode(encoded, max_pixels):
        kind, name = formats.kind_of_bytes(encoded)
        limit = None if max_pixels < 0 else int(max_pixels)
        try:
            if kind != formats.OTHER:
                return from_python.decode(encoded, limit)
            return np.array(_decode_other(encoded, name, None, 1, limit))
        except UnusableError as error:
            raise ValueError(error.reason) from None
        except tf.errors.OpError as error:
            raise ValueError(error.message) from None

    image = tf.numpy_function(decode, [encoded, max_pixels], tf.uint8)
    return tf.ensure_shape(image, [None, None, 3])


def check_side(content, min_side):
    """Checks the size of an image that TensorFlow reads, by its header.

    Args:
        content: Bytes of the file.
        min_side: Minimum length of the shorter side.

    Raises:
        UnusableError: If the image is smaller.
        tf.errors.OpError: If the header cannot be read.
    """
    size = from_python.header_size(content)
    _check_size(size, 0, None, min_side, None)


def decode_rare(content, max_pixels=None, min_side=1):
    """Decodes the bytes of a file of a format that only Pillow reads.

    Outside of any graph: an error in a Python function of a graph is logged
    with its traceback, which a bad file is not worth.

    Args:
        content: Bytes of the file.
        max_pixels: Maximum number of pixels, as in `read`.
        min_side: Minimum length of the shorter side.

    Returns:
        uint8 [h, w, 3], or None if TensorFlow reads the format.

    Raises:
        UnusableError: If the image cannot be used.
    """
    kind, name = formats.kind_of_bytes(content)
    if kind != formats.OTHER:
        return None
    return np.array(_decode_other(content, name, None, min_side, max_pixels))


def decode_pillow(image, max_pixels=None):
    """Pixels of a Pillow image, as they would be read from its file.

    Args:
        image: A Pillow image, which is not changed; of an animation the
            current frame is used.
        max_pixels: Maximum number of pixels, as in `read`.

    Returns:
        uint8 [h, w, 3], upright, blended with white where transparent.

    Raises:
        UnusableError: If the image cannot be used.
    """
    _check_size(image.size, image.width * image.height, None, 1, max_pixels)
    try:
        tags = getattr(image, "tag_v2", {})
        return np.array(_to_rgb(ImageOps.exif_transpose(image), tags))
    except UnusableError:
        raise
    except Exception:  # Files are decoded only now, and may be malformed.
        raise UnusableError("image cannot be decoded") from None


def why_unusable(content, min_side=1, max_pixels=None):
    """Reason why a file cannot be decoded, in words.

    Args:
        content: Bytes of the file.
        min_side: Minimum length of the shorter side.
        max_pixels: Maximum number of pixels, as in `read`.
    """
    try:
        check(content, min_side=min_side, max_pixels=max_pixels)
    except UnusableError as error:
        return error.reason
    return "image cannot be decoded"


def part(image, box):
    """Crops a part of a decoded image.

    Args:
        image: uint8 [h, w, 3].
        box: (left, top, width, height) in pixels; clipped to the image.

    Returns:
        uint8 [height, width, 3].

    Raises:
        UnusableError: If the box is outside of the image.
    """
    left, top, width, height = box
    image = image[
        max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)
    ]
    if 0 in image.shape:
        raise UnusableError("box outside of the image")
    return image


def _check_size(size, pixels, resize, min_side, max_pixels):
    """Checks the size of an image; returns whether to downsize it."""
    if min(size) < min_side:
        raise UnusableError(f"image with a side below {min_side} pixels")
    shrink = resize is not None and min(size) > resize
    if shrink or max_pixels is None:
        max_pixels = _MOST_PIXELS
    if pixels > max_pixels:
        raise UnusableError(f"image of more than {max_pixels} pixels")
    return shrink


def _check_jpeg(content, resize, min_side, max_pixels):
    """Decodes an ordinary JPEG.

    Returns:
        An RGB image to downsize or store, or None to store the file as it is.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            shrink = _check_size(
                image.size,
                image.width * image.height,
                resize,
                min_side,
                max_pixels,
            )
            if shrink:
                # JPEG decoders can skip unneeded detail.
                image.draft("RGB", (2 * resize, 2 * resize))
            image.load()
            turn = _TURNS.get(_orientation(content))
            if not shrink and turn is None:
                return None
            image = image.convert("RGB")
            return image if turn is None else image.transpose(turn)
    except UnusableError:
        raise
    # Pillow raises OSError, ValueError, SyntaxError, struct.error, ... for
    # malformed files.
    except Exception:
        raise UnusableError("image cannot be decoded") from None


def _orientation(content):
    """The orientation by which `decode_resize.decode` rotates an image."""
    if content[2:4] == b"\xff\xdb" or b"Exif" not in content:
        return 1
    return from_python.read_orientation(content)


def _decode_in_graph(content, resize, min_side, max_pixels):
    """Decodes a file as in training.

    Returns:
        An RGB image to downsize or store, or None to store the file as it is.
    """
    try:
        size = from_python.header_size(content)
        pixels = from_python.pixels_to_decode(content)
        shrink = _check_size(size, pixels, resize, min_side, max_pixels)
        turned = from_python.read_orientation(content) != 1
        image = from_python.decode(content)
    except tf.errors.OpError:
        raise UnusableError("image cannot be decoded") from None
    return Image.fromarray(image) if shrink or turned else None


def _decode_other(content, name, resize, min_side, max_pixels):
    """Decodes a format that TensorFlow does not support, with Pillow.

    Args:
        content: Bytes of the file.
        name: Name of the format, "" if unknown.
        resize: Length of the shorter side to downsize to, as in `read`.
        min_side: Minimum length of the shorter side.
        max_pixels: Maximum number of pixels, as in `read`.

    Returns:
        An upright RGB image.

    Raises:
        UnusableError: If the image cannot be decoded.
    """
    if name == "HEIC":
        _register_heif()
    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = image.width * image.height
            _check_size(image.size, pixels, resize, min_side, max_pixels)
            tags = getattr(image, "tag_v2", {})  # Copies lose them.
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image), tags)
    except UnusableError:
        raise
    except UnidentifiedImageError:
        raise UnusableError(
            f"{name} image that Pillow cannot read"
            if name
            else "image cannot be decoded"
        ) from None
    except Exception:  # for malformed files, as above
        raise UnusableError("image cannot be decoded") from None


def _register_heif():
    """Registers the HEIC format with Pillow."""
    try:
        plugin = importlib.import_module("pillow_heif")
    except ModuleNotFoundError:
        raise UnusableError(
            "HEIC image, which needs the package pillow-heif"
        ) from None
    plugin.register_heif_opener()


def _to_rgb(image, tags):
    """Converts to 8-bit RGB, blended with white like `decode_resize.decode`.

    Args:
        image: A Pillow image.
        tags: Tags of a TIFF; empty for other formats.

    Returns:
        A Pillow image.
    """
    if image.mode.startswith("I;16"):
        image = _high_bits(image, tags)
    if image.mode in ("I", "F"):
        # The values of black and white are undefined.
        raise UnusableError("image of 32-bit numbers")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _high_bits(image, tags):
    """The high byte of gray values of 9 to 16 bits."""
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    gray = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        gray = 255 - gray
    return Image.fromarray(gray)


def _is_ordinary(content):
    """Whether a JPEG is baseline or progressive, of 8 bits, gray or color.

    Pillow decodes other JPEGs differently from TensorFlow.
    """
    position = 2
    while position + 10 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            precision, channels = content[position + 4], content[position + 9]
            return marker <= 0xC2 and precision == 8 and channels in (1, 3)
        if marker == 0xFF:
            position += 1
        else:
            size = content[position + 2 : position + 4]
            position += 2 + int.from_bytes(size, "big")
    return False
