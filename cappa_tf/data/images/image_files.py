"""Image files: which there are, is one usable, and the bytes to store.

What becomes of each kind of file, `formats.py` says. What
`decode_resize.decode` reads is judged by it, except for ordinary JPEGs, which
Pillow checks as well and shrinks faster; the rest is Pillow's, here and in
training.
"""

import importlib
import io
import os

import numpy as np
import tensorflow as tf
from PIL import Image, ImageOps, UnidentifiedImageError

from cappa_tf.data.images import decode_resize, formats
from cappa_tf.data.sources import folder_listing
from cappa_tf.utils import files

JPEG_QUALITY = 95
# Images that are shrunk have no limit but this one, of Pillow as well: they
# are in memory for a moment.
_MOST_PIXELS = 2 * Image.MAX_IMAGE_PIXELS
# Where the format itself loses detail, JPEG does no harm to what is left.
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
# Tags of TIFF.
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
_WHITE_IS_ZERO = 0


class UnusableError(ValueError):
    """An image that is left out.

    Attributes:
        reason: Why, in words to count by.
        name: Which, where that is known.
    """

    def __init__(self, reason, name=""):
        super().__init__(reason)
        self.reason = reason
        self.name = name


def find_pictures(paths):
    """Files as given, and the images below folders, sorted.

    Args:
        paths: Files and folders.

    Returns:
        A list of paths. A file is taken whatever its name: that it is no
        image, or not there, is found when it is read.
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
    """Reads an image file and makes sure that it can be decoded.

    The file is stored as it is where `decode_resize.decode` reads it, unless it
    must be shrunk or EXIF data turn it. What is shrunk becomes a JPEG of
    quality 95, and so do JPEGs that are turned and files of formats that lose
    detail themselves; everything else that is turned, or that TensorFlow does
    not decode, becomes a PNG with the same pixels.

    Args:
        path: The file, local or in a bucket.
        resize: Length of the shorter side that larger images are shrunk to,
            or None.
        min_side: Least length of the shorter side.
        max_pixels: Most pixels; None for any. With `resize` any number is
            fine that Pillow takes for no attack (179 million), since what is
            stored is small.

    Returns:
        The bytes to store.

    Raises:
        UnusableError: The image is to be left out.
    """
    return check(read_bytes(path), resize, min_side, max_pixels)


def read_bytes(path):
    """The bytes of a file, whatever they are.

    Args:
        path: The file, local or in a bucket.

    Raises:
        UnusableError: It is not there or cannot be read.
    """
    try:
        return files.read_bytes(os.fspath(path))
    except FileNotFoundError:
        raise UnusableError("image missing") from None
    except OSError:
        raise UnusableError("image unreadable") from None


def check(content, resize=None, min_side=1, max_pixels=None):
    """Makes sure that the bytes of an image file can be decoded.

    Args:
        content: The bytes.
        resize: As `read`, and the others, too.
        min_side: As there.
        max_pixels: As there.

    Returns:
        The bytes to store.

    Raises:
        UnusableError: The image is to be left out.
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
    """Decodes in a graph, by Python, what is neither JPEG nor PNG.

    GIF, BMP and WebP as `decode_resize.decode` does without Python; the graph
    of an input pipeline would be several times as large with their decoders in
    it, and is instantiated for every chunk of records.

    Args:
        encoded: Scalar string tensor, an image file.
        max_pixels: Scalar int64 tensor; -1 for any.

    Returns:
        uint8 [h, w, 3], as it is to be seen. A file that is not understood
        raises `tf.errors.InvalidArgumentError`.
    """

    def decode(encoded, max_pixels):
        kind, name = formats.kind_of_bytes(encoded)
        limit = None if max_pixels < 0 else int(max_pixels)
        try:
            if kind != formats.OTHER:
                with tf.device("CPU:0"):
                    return decode_resize.decode(encoded, limit).numpy()
            return np.array(_decode_other(encoded, name, None, 1, limit))
        except UnusableError as error:
            raise ValueError(error.reason) from None
        except tf.errors.OpError as error:
            raise ValueError(error.message) from None

    image = tf.numpy_function(decode, [encoded, max_pixels], tf.uint8)
    return tf.ensure_shape(image, [None, None, 3])


def why_unusable(content, min_side=1, max_pixels=None):
    """What is wrong with a file that could not be decoded, in words.

    Args:
        content: Its bytes.
        min_side: As `read`.
        max_pixels: As there.
    """
    try:
        check(content, min_side=min_side, max_pixels=max_pixels)
    except UnusableError as error:
        return error.reason
    return "image cannot be decoded"


def part(image, box):
    """Cuts a part out of a decoded image.

    Args:
        image: uint8 [h, w, 3].
        box: (left, top, width, height) in pixels; what lies outside of the
            image is left out.

    Returns:
        uint8 [height, width, 3].

    Raises:
        UnusableError: Nothing of the box lies on the image.
    """
    left, top, width, height = box
    image = image[
        max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)
    ]
    if 0 in image.shape:
        raise UnusableError("box outside of the image")
    return image


def _check_size(size, pixels, resize, min_side, max_pixels):
    """Refuses what is too small or too large; returns whether to shrink."""
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
        An RGB image to be shrunk or stored, or None where the file will do.
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
                # JPEG decoders can leave out detail that is not wanted.
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
    # files that are not what they say.
    except Exception:
        raise UnusableError("image cannot be decoded") from None


def _orientation(content):
    """The number by which `decode_resize.decode` will turn an image."""
    if content[2:4] == b"\xff\xdb" or b"Exif" not in content:
        return 1
    with tf.device("CPU:0"):
        return int(decode_resize.read_orientation(content))


def _decode_in_graph(content, resize, min_side, max_pixels):
    """Decodes as training does.

    Returns:
        As `_check_jpeg`.
    """
    try:
        with tf.device("CPU:0"):
            size = decode_resize.header_size(content).numpy().tolist()
            pixels = int(decode_resize.pixels_to_decode(content))
            shrink = _check_size(size, pixels, resize, min_side, max_pixels)
            turned = int(decode_resize.read_orientation(content)) != 1
            image = decode_resize.decode(content).numpy()
    except tf.errors.OpError:
        raise UnusableError("image cannot be decoded") from None
    return Image.fromarray(image) if shrink or turned else None


def _decode_other(content, name, resize, min_side, max_pixels):
    """Decodes by Pillow what TensorFlow does not.

    Args:
        content: Bytes of the file.
        name: What it is, "" for nothing known.
        resize: As `read`, and the others, too.
        min_side: As there.
        max_pixels: As there.

    Returns:
        An RGB image, as it is to be seen.

    Raises:
        UnusableError: It cannot be decoded.
    """
    if name == "HEIC":
        _register_heif()
    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = image.width * image.height
            _check_size(image.size, pixels, resize, min_side, max_pixels)
            tags = getattr(image, "tag_v2", {})  # A copy has them no more.
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
    except Exception:  # As above.
        raise UnusableError("image cannot be decoded") from None


def _register_heif():
    """Lets Pillow read HEIC."""
    try:
        plugin = importlib.import_module("pillow_heif")
    except ModuleNotFoundError:
        raise UnusableError(
            "HEIC image, which needs the package pillow-heif"
        ) from None
    plugin.register_heif_opener()


def _to_rgb(image, tags):
    """8-bit RGB, transparency laid on white as `decode_resize.decode` does.

    Args:
        image: A Pillow image.
        tags: Those of a TIFF, empty for other formats.

    Returns:
        A Pillow image.
    """
    if image.mode.startswith("I;16"):
        image = _high_bits(image, tags)
    if image.mode in ("I", "F"):
        # Which numbers are black and white, no rule tells.
        raise UnusableError("image of 32-bit numbers")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _high_bits(image, tags):
    """The high byte of grey numbers of 9 to 16 bits."""
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    grey = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    return Image.fromarray(grey)


def _is_ordinary(content):
    """Whether a JPEG is baseline or progressive, of 8 bits, grey or colour.

    The others Pillow decodes, or colours, in another way than TensorFlow.
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
