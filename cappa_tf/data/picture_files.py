"""Image files: which there are, is one usable, and the bytes to store."""

import io
import os

import tensorflow as tf
from PIL import Image, ImageOps

from cappa_tf.data import folder_listing, text

# What `images.decode` reads; anything else is stored as JPEG.
STORED_FORMATS = frozenset(("JPEG", "MPO", "PNG", "GIF", "BMP", "WEBP"))
EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")
JPEG_QUALITY = 95
_ORIENTATION_TAG = 0x0112


class UnusableError(Exception):
    """An image that is left out.

    Attributes:
        reason: Why, in words to count by.
    """

    def __init__(self, reason):
        super().__init__(reason)
        self.reason = reason


def find_pictures(paths):
    """Files as given, and the pictures below folders, sorted.

    Args:
        paths: Files and folders.

    Returns:
        A list of paths. A file is taken whatever its name: that it is no
        picture, or not there, is found when it is read.
    """
    found = []
    for path in paths:
        if not os.path.isdir(path):
            found.append(path)
            continue
        below = []
        for folder, names in folder_listing.walk(path):
            below += [
                os.path.join(folder, name)
                for name in names
                if name.lower().endswith(EXTENSIONS)
            ]
        found += sorted(below)
    return found


def read(path, resize=None, min_side=1, max_pixels=None):
    """Reads an image file and makes sure that it can be decoded.

    The file is stored as it is, unless it must be shrunk, its EXIF data turn
    it (TensorFlow does not look at them), or TensorFlow cannot read its
    format: then it becomes a JPEG.

    Args:
        path: The file, local or in a bucket.
        resize: Length of the shorter side that larger pictures are shrunk to,
            or None.
        min_side: Least length of the shorter side.
        max_pixels: Most pixels; None for any. With `resize` any number is
            fine, since what is stored is small.

    Returns:
        The bytes to store.

    Raises:
        UnusableError: The picture is to be left out.
    """
    if not text.is_text(os.fspath(path)):
        # TensorFlow cannot open such a file.
        raise UnusableError("name is not valid Unicode")
    try:
        with tf.io.gfile.GFile(os.fspath(path), "rb") as file:
            content = file.read()
    except tf.errors.NotFoundError:
        raise UnusableError("image missing") from None
    except tf.errors.OpError:
        raise UnusableError("image unreadable") from None
    return check(content, resize, min_side, max_pixels)


def check(content, resize=None, min_side=1, max_pixels=None):
    """As `read`, of the bytes of a file."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return _checked(image, content, resize, min_side, max_pixels)
    except UnusableError:
        raise
    # Pillow raises OSError, ValueError, SyntaxError, struct.error, ... for
    # files that are not what they say.
    except Exception:
        raise UnusableError("image cannot be decoded") from None


def cut(content, box):
    """Cuts a part out of an image.

    Args:
        content: Bytes that `read` gave.
        box: (left, top, width, height) in pixels; what lies outside of the
            image is left out.

    Returns:
        Bytes of a PNG.

    Raises:
        UnusableError: Nothing of the box lies on the image.
    """
    left, top, width, height = box
    with Image.open(io.BytesIO(content)) as image:
        right = min(left + width, image.width)
        bottom = min(top + height, image.height)
        left, top = max(left, 0), max(top, 0)
        if left >= right or top >= bottom:
            raise UnusableError("box outside of the image")
        part = _to_rgb(image).crop((left, top, right, bottom))
    stored = io.BytesIO()
    part.save(stored, "PNG")
    return stored.getvalue()


def _checked(image, content, resize, min_side, max_pixels):
    """Decodes an opened image; returns the bytes to store."""
    width, height = image.size
    if min(width, height) < min_side:
        raise UnusableError(f"image with a side below {min_side} pixels")
    shrink = resize is not None and min(width, height) > resize
    if not shrink and max_pixels is not None and width * height > max_pixels:
        raise UnusableError(f"image of more than {max_pixels} pixels")
    if shrink:
        # JPEG decoders can leave out detail that is not wanted.
        image.draft("RGB", (2 * resize, 2 * resize))
    turned = image.getexif().get(_ORIENTATION_TAG, 1) != 1
    image.load()
    if not shrink and not turned and image.format in STORED_FORMATS:
        return content
    image = _to_rgb(ImageOps.exif_transpose(image))
    if shrink:
        scale = resize / min(image.size)
        size = [max(1, round(side * scale)) for side in image.size]
        image = image.resize(size, Image.Resampling.BICUBIC)
    stored = io.BytesIO()
    image.save(stored, "JPEG", quality=JPEG_QUALITY)
    return stored.getvalue()


def _to_rgb(image):
    """RGB, transparency laid on white as `images.decode` does."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
