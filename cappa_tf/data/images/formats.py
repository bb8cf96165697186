"""Image formats: their suffixes, and the first bytes of their files.

Each kind is handled in the same way by `tools/prepare_data.py`, in training
from every source, by `tools/caption.py` and in the SavedModel:

    JPEG    gray, color, CMYK and YCCK, baseline and progressive, MPO's first
            image; CMYK as Adobe stores it, inverted, with its marker or
            without. Other codings (arithmetic, lossless, 12 bits) are refused.
    PNG     every kind; of 16 bits the high byte is taken; of an animation the
            image that plain decoders show. The end mark may be missing.
    GIF     the first frame, at its place on the screen.
    BMP     1 to 32 bits, palettes, bit fields, the header of OS/2, either row
            first.
    WebP    every kind; the first frame of an animation.
    TIFF, JPEG 2000, AVIF, HEIC, BMP compressed by run lengths
            TensorFlow does not decode them. Where Python runs, Pillow does
            (HEIC: with the package pillow-heif); a SavedModel says so in
            `error`. Of 16 bits the high byte is taken; 32-bit integers and
            floating point numbers, whose range is undefined, are refused.

For every kind, transparent pixels are blended with white, and a photo is
rotated according to its EXIF data. Refused images are counted by reason.
"""

import tensorflow as tf

# Suffixes of image files in folders and in tar files.
EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".jfif",
    ".jpe",
    ".mpo",
    ".png",
    ".gif",
    ".webp",
    ".bmp",
    ".tif",
    ".tiff",
    ".avif",
    ".jp2",
    ".heic",
    ".heif",
)
JPEG, PNG, GIF, BMP, WEBP, OTHER = range(6)
# Formats that `decode_resize.decode` reads, in this order: (position, bytes).
_DECODED = (
    (0, b"\xff\xd8\xff"),
    (0, b"\x89PNG\r\n\x1a\n"),
    (0, b"GIF8"),
    (0, b"BM"),
    (8, b"WEBP"),
)
_OTHERS = {
    "TIFF": (
        (0, b"II*\0"),
        (0, b"MM\0*"),
        (0, b"II+\0"),
        (0, b"MM\0+"),
    ),
    "JPEG 2000": ((0, b"\0\0\0\x0cjP  "), (0, b"\xff\x4f\xff\x51")),
    "AVIF": ((4, b"ftypavif"), (4, b"ftypavis")),
    "HEIC": tuple(
        (4, b"ftyp" + brand)
        for brand in (b"heic", b"heix", b"hevc", b"heim", b"heis")
    )
    + ((4, b"ftypmif1"), (4, b"ftypmsf1")),
}
COMPRESSED_BMP = "compressed BMP"
_HEAD = 34


def kind(encoded):
    """Kind of image files, among those that `decode_resize.decode` reads.

    Args:
        encoded: String tensor of any shape.

    Returns:
        int32 of that shape, one of JPEG, PNG, ... in this module.
    """
    head = _head(encoded)
    result = tf.fill(tf.shape(head), OTHER)
    for number, place in enumerate(_DECODED):
        result = tf.where(_begins(head, *place), number, result)
    return tf.where(_is_compressed_bmp(head), OTHER, result)


def other_name(encoded):
    """Name of a format that TensorFlow does not decode but Pillow may.

    Args:
        encoded: String tensor of any shape.

    Returns:
        String tensor of that shape, such as "TIFF"; "" for anything else.
    """
    head = _head(encoded)
    result = tf.where(_is_compressed_bmp(head), COMPRESSED_BMP, "")
    for name, places in _OTHERS.items():
        for place in places:
            result = tf.where(_begins(head, *place), name, result)
    return result


def kind_of_bytes(content):
    """`kind` of a file, and `other_name`, without TensorFlow.

    Args:
        content: Bytes of the file.

    Returns:
        (kind, name).
    """
    if content[:2] == b"BM" and _has_compression(content[:_HEAD]):
        return OTHER, COMPRESSED_BMP
    for number, (start, magic) in enumerate(_DECODED):
        if content[start : start + len(magic)] == magic:
            return number, ""
    for name, places in _OTHERS.items():
        for start, magic in places:
            if content[start : start + len(magic)] == magic:
                return OTHER, name
    return OTHER, ""


def _head(encoded):
    """The first bytes of files, padded with zeros."""
    head = tf.strings.substr(encoded, 0, _HEAD)
    return tf.strings.substr(head + b"\0" * _HEAD, 0, _HEAD)


def _begins(head, start, magic):
    return tf.strings.substr(head, start, len(magic)) == magic


# Size of the header of a BMP, which is 12 in the old one without compression,
# and the compressions: run lengths of 8 and 4 bits, JPEG, PNG.
_OLD_HEADER = (14, b"\x0c\0\0\0")
_COMPRESSIONS = (b"\1", b"\2", b"\4", b"\5")


def _is_compressed_bmp(head):
    compression = tf.strings.substr(head, 30, 1)
    compressed = tf.reduce_any([compression == c for c in _COMPRESSIONS], 0)
    return _begins(head, 0, b"BM") & compressed & ~_begins(head, *_OLD_HEADER)


def _has_compression(head):
    start, magic = _OLD_HEADER
    return (
        head[30:31] in _COMPRESSIONS
        and head[start : start + len(magic)] != magic
    )
