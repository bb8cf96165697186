"""Every kind of image file yields the same pixels in every tool and source.

The pixels are those of Pillow if it reads a kind correctly, and numbers that
the test itself has written to the file otherwise.
"""

import io
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from cappa_tf.data.images import decode_resize, formats, image_files
from cappa_tf.data.preprocessing import ImagePreprocessing
from cappa_tf.data.stream.decoding import RecordDecoder
from cappa_tf.export import request_images

H, W = 9, 13
RANDOM = np.random.RandomState(0)
RGB = RANDOM.randint(256, size=(H, W, 3)).astype("uint8")
GREY = RGB[..., 0]
ALPHA = RANDOM.randint(256, size=(H, W)).astype("uint8")
ALPHA[0] = 0
NUMBERS = RANDOM.randint(16, size=(H, W)).astype("uint8")
PALETTE = RANDOM.randint(256, size=(16, 3)).astype("uint8")
GREY16 = RANDOM.randint(1 << 16, size=(H, W)).astype("uint16")
END = b"\0\0\0\0IEND\xaeB`\x82"


def save(image, file_format, **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def grey(values):
    return np.repeat(values[..., None], 3, -1)


def on_white(pixels, alpha):
    alpha = alpha[..., None] / 255
    return np.round(pixels * alpha + 255 * (1 - alpha)).astype("uint8")


def indexed(colours=16):
    image = Image.fromarray(NUMBERS % colours, "L").convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette(PALETTE[:colours].tobytes())
    return image


def exif(number, endian="<"):
    found = Image.Exif()
    found.endian = endian
    found[0x010F] = "a maker's name, which lies outside the directory"
    found[0x0112] = number
    return found


# BMP: what Pillow does not write.


def rows_of(pixels, bits):
    """Rows of whole 32-bit words, the lowest first."""
    rows = []
    for row in pixels[::-1]:
        if bits < 8:
            flags = np.unpackbits(row[:, None], axis=1)[:, -bits:]
            data = np.packbits(flags.reshape(-1)).tobytes()
        else:
            data = row.tobytes()
        rows.append(data + b"\0" * (-len(data) % 4))
    return b"".join(rows)


def bmp(pixels, bits, palette=b"", size=40, masks=(), compression=0, flip=1):
    """A BMP with a header of 12, 40, 56 or 124 bytes."""
    if size == 12:
        header = struct.pack("<IHHHH", 12, W, H, 1, bits)
    else:
        header = struct.pack(
            "<IiiHHIIiiII", size, W, flip * H, 1, bits, compression, *[0] * 5
        )
        fields = struct.pack(f"<{len(masks)}I", *masks)
        # Old headers have the masks behind them.
        header += fields.ljust(size - 40, b"\0")
    offset = 14 + len(header) + len(palette)
    return (
        struct.pack("<2sIII", b"BM", 0, 0, offset)
        + header
        + palette
        + rows_of(pixels, bits)
    )


def table(entry, colours=16):
    return b"".join(
        bytes(c[::-1]).ljust(entry, b"\0") for c in PALETTE[:colours]
    )


def bmp16(widths):
    """Pixels of bit fields and their values."""
    red, green, blue = widths
    values = [
        RANDOM.randint(1 << n, size=(H, W)).astype("uint32") for n in widths
    ]
    pixels = (values[0] << (green + blue)) | (values[1] << blue) | values[2]
    expected = [v * 255 // ((1 << n) - 1) for v, n in zip(values, widths)]
    return pixels.astype("<u2"), np.stack(expected, -1).astype("uint8")


RGBA = np.dstack([RGB, ALPHA])
P555, RGB555 = bmp16((5, 5, 5))
P565, RGB565 = bmp16((5, 6, 5))
BGRX = np.dstack([RGB[..., ::-1], ALPHA])
COLOURS = PALETTE[NUMBERS]
MASKS_565 = (0xF800, 0x7E0, 0x1F)
MASKS_RGBA = (0xFF, 0xFF00, 0xFF0000, 0xFF000000)
BMPS = {
    "1 bit": (bmp(NUMBERS % 2, 1, table(4, 2)), PALETTE[NUMBERS % 2]),
    "4 bits": (bmp(NUMBERS, 4, table(4)), COLOURS),
    "8 bits": (bmp(NUMBERS, 8, table(4) + bytes(960)), COLOURS),
    "8 bits, grey": (
        bmp(GREY, 8, bytes(np.repeat(range(256), 4).astype("uint8"))),
        grey(GREY),
    ),
    "OS/2, 4 bits": (bmp(NUMBERS, 4, table(3), size=12), COLOURS),
    "OS/2, 24 bits": (bmp(RGB[..., ::-1], 24, size=12), RGB),
    "555": (bmp(P555, 16), RGB555),
    "565": (
        bmp(P565, 16, struct.pack("<3I", *MASKS_565), compression=3),
        RGB565,
    ),
    "565, long header": (
        bmp(P565, 16, size=124, masks=MASKS_565, compression=3),
        RGB565,
    ),
    "24 bits": (save(Image.fromarray(RGB), "BMP"), RGB),
    "24 bits, top first": (bmp(RGB[::-1, :, ::-1], 24, flip=-1), RGB),
    "32 bits": (bmp(BGRX, 32), RGB),
    "32 bits, alpha": (
        bmp(RGBA, 32, size=56, masks=MASKS_RGBA, compression=3),
        on_white(RGB, ALPHA),
    ),
    "32 bits of Pillow": (save(Image.fromarray(RGBA), "BMP"), None),
    "last row cut": (bmp(RGB[..., ::-1], 24)[:-1], RGB),
}


# PNG: chunks by hand.


def chunk(name, content):
    checksum = zlib.crc32(name + content)
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", checksum)
    )


def png(pixels, bits, colour_type, *chunks, behind=b""):
    """A PNG of big-endian pixels [h, w] or [h, w, channels]."""
    lines = []
    for row in pixels:
        if bits < 8:
            flags = np.unpackbits(row[:, None], axis=1)[:, -bits:]
            row = np.packbits(flags.reshape(-1))
        lines.append(b"\0" + row.tobytes())
    header = struct.pack(">IIBBBBB", W, H, bits, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(lines))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + b"".join(chunks)
        + chunk(b"IDAT", pixels[:20])
        + chunk(b"IDAT", pixels[20:])
        + behind
        + END
    )


RGB16 = RANDOM.randint(1 << 16, size=(H, W, 3)).astype("uint16")
RGBA16 = np.dstack([RGB16, GREY16])
PLTE = chunk(b"PLTE", PALETTE.tobytes())
PALETTE_ALPHA = np.array([0, 128] + [255] * 14, "uint8")
BIG = save(Image.fromarray(RGB), "PNG")


def big_endian(values):
    return values.astype(">u2")


def keyed(pixels, found):
    """Pixels of the transparent color become white."""
    return np.where(found[..., None], np.uint8(255), pixels)


PNGS = {
    "1 bit": (png(NUMBERS % 2, 1, 0), grey(NUMBERS % 2 * 255)),
    "2 bits": (png(NUMBERS % 4, 2, 0), grey(NUMBERS % 4 * 85)),
    "4 bits": (png(NUMBERS, 4, 0), grey(NUMBERS * 17)),
    "8 bits": (png(GREY, 8, 0), grey(GREY)),
    "16 bits": (png(big_endian(GREY16), 16, 0), grey(GREY16 >> 8)),
    "16 bits, colour": (png(big_endian(RGB16), 16, 2), RGB16 >> 8),
    "16 bits, alpha": (
        png(big_endian(RGBA16), 16, 6),
        on_white(RGB16 >> 8, GREY16 >> 8),
    ),
    "grey, alpha": (
        png(np.dstack([GREY, ALPHA]), 8, 4),
        on_white(grey(GREY), ALPHA),
    ),
    "alpha": (save(Image.fromarray(RGBA), "PNG"), on_white(RGB, ALPHA)),
    "palette, 4 bits": (png(NUMBERS, 4, 3, PLTE), COLOURS),
    "palette, 8 bits": (png(NUMBERS, 8, 3, PLTE), COLOURS),
    "palette, tRNS": (
        png(NUMBERS, 8, 3, PLTE, chunk(b"tRNS", b"\0\x80")),
        on_white(COLOURS, PALETTE_ALPHA[NUMBERS]),
    ),
    "grey, tRNS": (
        png(NUMBERS, 4, 0, chunk(b"tRNS", b"\0\7")),
        keyed(grey(NUMBERS * 17), NUMBERS == 7),
    ),
    "colour, tRNS": (
        png(
            RGB,
            8,
            2,
            chunk(
                b"tRNS",
                bytes([0, RGB[2, 3, 0], 0, RGB[2, 3, 1], 0, RGB[2, 3, 2]]),
            ),
        ),
        keyed(RGB, (RGB[2, 3] == RGB).all(-1)),
    ),
    "16 bits, tRNS": (
        png(
            big_endian(GREY16),
            16,
            0,
            chunk(b"tRNS", big_endian(GREY16[1, :1]).tobytes()),
        ),
        keyed(grey(GREY16 >> 8), GREY16[1, 0] == GREY16),
    ),
    "no end mark": (BIG[:-12], RGB),
    "half an end mark": (BIG[:-7], RGB),
    "bytes behind the end": (BIG + b"more", RGB),
    "turned": (
        png(RGB, 8, 2, chunk(b"eXIf", exif(6).tobytes()[6:])),
        np.rot90(RGB, 3),
    ),
    "turned, behind the pixels": (
        png(RGB, 8, 2, behind=chunk(b"eXIf", exif(8, ">").tobytes()[6:])),
        np.rot90(RGB),
    ),
}


def frame(numbers, left=0, top=0, transparent=None, own=True, interlaced=False):
    """A GIF with one frame at a place of a screen W x H."""
    image = Image.frombytes("P", numbers.shape[::-1], numbers.tobytes())
    image.putpalette(PALETTE.tobytes())
    options = {} if transparent is None else {"transparency": transparent}
    content = bytearray(
        save(image, "GIF", optimize=False, interlace=interlaced, **options)
    )
    place = content.index(b"\x2c\0\0\0\0")
    content[6:10] = struct.pack("<HH", W, H)
    content[place + 1 : place + 5] = struct.pack("<HH", left, top)
    return bytes(content)


def placed(pixels, left, top):
    screen = np.full((H, W, 3), 255, "uint8")
    screen[top : top + len(pixels), left : left + pixels.shape[1]] = pixels
    return screen


PART = NUMBERS[:5, :6]
BLACK = PALETTE.copy()
GIFS = {
    "whole": (frame(NUMBERS), COLOURS),
    "interlaced": (frame(NUMBERS, interlaced=True), COLOURS),
    "transparent": (
        frame(NUMBERS, transparent=5),
        keyed(COLOURS, NUMBERS == 5),
    ),
    "a part": (frame(PART, 4, 3), placed(PALETTE[PART], 4, 3)),
    "a transparent part": (
        frame(PART, 4, 3, transparent=int(PART[0, 0])),
        placed(keyed(PALETTE[PART], PART[0, 0] == PART), 4, 3),
    ),
    "no mark at the end": (frame(NUMBERS)[:-1], COLOURS),
}

SMOOTH = np.asarray(
    Image.fromarray(RGB[:3, :3]).resize((W, H), Image.Resampling.BILINEAR)
)


def webp(pixels, **options):
    image = Image.fromarray(pixels)
    return save(image, "WEBP", lossless=True, exact=True, **options)


WEBPS = {
    "lossless": (webp(RGB), RGB),
    "alpha": (webp(RGBA), on_white(RGB, ALPHA)),
    "turned": (webp(RGB, exif=exif(6)), np.rot90(RGB, 3)),
    "turned, alpha": (
        webp(RGBA, exif=exif(3)),
        on_white(RGB, ALPHA)[::-1, ::-1],
    ),
}
IN_GRAPH = {
    f"{kind}: {name}": case
    for kind, cases in (
        ("BMP", BMPS),
        ("PNG", PNGS),
        ("GIF", GIFS),
        ("WebP", WEBPS),
    )
    for name, case in cases.items()
}


def tiff(image, **options):
    return save(image, "TIFF", **options)


def tiff_grey(values, bits, photometric=1):
    """A TIFF of gray values of more than 8 bits, little-endian."""
    if bits == 12:
        flags = np.unpackbits(
            values.astype(">u2").view("uint8").reshape(*values.shape, 2), axis=2
        )[:, :, 4:].reshape(len(values), -1)
        data = np.packbits(flags, axis=1).tobytes()
    else:
        data = values.astype("<u2").tobytes()
    entries = [
        (256, W), (257, H), (258, bits), (259, 1), (262, photometric),
        (273, 8), (277, 1), (278, H), (279, len(data)),
    ]  # fmt: skip
    directory = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries
    )
    return (
        struct.pack("<2sHI", b"II", 42, 8 + len(data))
        + data
        + directory
        + bytes(4)
    )


def rle_bmp():
    """A BMP of run lengths, each of one pixel."""
    data = b"".join(
        b"".join(b"\1" + bytes([n]) for n in row) + b"\0\0"
        for row in NUMBERS[::-1]
    )
    plain = bmp(NUMBERS, 8, table(4) + bytes(960), compression=1)
    return plain[: 54 + 1024] + data + b"\0\1"


OTHERS = {
    "TIFF": (tiff(Image.fromarray(RGB)), RGB),
    "TIFF, LZW": (tiff(Image.fromarray(RGB), compression="tiff_lzw"), RGB),
    "TIFF, alpha": (tiff(Image.fromarray(RGBA)), on_white(RGB, ALPHA)),
    "TIFF, palette": (tiff(indexed()), COLOURS),
    "TIFF, two pages": (
        tiff(
            Image.fromarray(RGB),
            save_all=True,
            append_images=[Image.new("RGB", (W, H))],
        ),
        RGB,
    ),
    "TIFF, CMYK": (
        tiff(Image.fromarray(RGB).convert("CMYK")),
        np.asarray(Image.fromarray(RGB).convert("CMYK").convert("RGB")),
    ),
    "TIFF, 16 bits": (tiff_grey(GREY16, 16), grey(GREY16 >> 8)),
    "TIFF, 12 bits": (tiff_grey(GREY16 >> 4, 12), grey(GREY16 >> 8)),
    "TIFF, 16 bits, white is 0": (
        tiff_grey(GREY16, 16, photometric=0),
        grey(255 - (GREY16 >> 8)),
    ),
    "TIFF, turned": (
        tiff(Image.fromarray(RGB), exif=exif(6)),
        np.rot90(RGB, 3),
    ),
    "JPEG 2000": (save(Image.fromarray(RGB), "JPEG2000"), RGB),
    "run lengths": (rle_bmp(), COLOURS),
}


@pytest.fixture(scope="module")
def decode():
    """Decodes as in training."""
    return tf.function(
        lambda encoded: decode_resize.decode(
            encoded, 10_000, others=image_files.decode_other
        ),
        input_signature=[tf.TensorSpec([], tf.string)],
        autograph=False,
    )


@pytest.mark.parametrize("name", IN_GRAPH)
def test_decoded_right_in_the_graph_and_stored_so(decode, name):
    """Decodes as in training, and as prepared, with or without downsizing."""
    encoded, expected = IN_GRAPH[name]
    if expected is None:
        expected = _pillow(encoded)
    decoded = decode(encoded).numpy()
    np.testing.assert_allclose(decoded, expected, atol=name[:4] == "WebP")
    stored = image_files.check(encoded)
    if "turned" not in name:
        assert stored == encoded
    np.testing.assert_array_equal(decode(stored), decoded)
    small = Image.open(io.BytesIO(image_files.check(encoded, resize=6)))
    assert min(small.size) == 6 and small.format == "JPEG"
    shrunk = Image.fromarray(decoded).resize(
        small.size, Image.Resampling.BICUBIC
    )
    difference = np.asarray(small, int) - np.asarray(shrunk, int)
    assert np.abs(difference.mean((0, 1))).max() < 6


def _pillow(encoded):
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    image = np.asarray(image.convert("RGBA"))
    return on_white(image[..., :3], image[..., 3])


@pytest.mark.parametrize("name", OTHERS)
def test_pillow_decodes_the_others_and_they_are_stored_as_png(decode, name):
    encoded, expected = OTHERS[name]
    np.testing.assert_array_equal(decode(encoded), expected)
    stored = image_files.check(encoded)
    assert formats.kind_of_bytes(stored)[0] == formats.PNG
    np.testing.assert_array_equal(decode(stored), expected)
    with pytest.raises(tf.errors.InvalidArgumentError, match="neither"):
        decode_resize.decode(encoded)


def test_avif_is_read_like_a_photo(decode):
    pixels = np.asarray(Image.fromarray(SMOOTH).resize((64, 48)))
    try:
        encoded = save(Image.fromarray(pixels), "AVIF", exif=exif(6))
    except (KeyError, OSError):
        pytest.skip("needs a Pillow with AVIF")
    expected = np.rot90(pixels, 3)
    stored = image_files.check(encoded)
    assert formats.kind_of_bytes(stored)[0] == formats.JPEG
    for content in (encoded, stored):
        difference = decode(content).numpy().astype(int) - expected
        assert np.abs(difference).mean() < 5


@pytest.mark.parametrize("marker", [True, False])
def test_cmyk_is_inverted_with_adobes_marker_or_without(decode, marker):
    pixels = np.full((H, W, 3), (200, 120, 40), "uint8")
    encoded = save(Image.fromarray(pixels).convert("CMYK"), "JPEG")
    if marker:
        adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\0"
        encoded = encoded[:2] + adobe + encoded[2:]
    for content in (encoded, image_files.check(encoded)):
        np.testing.assert_allclose(decode(content)[0, 0], pixels[0, 0], atol=3)
    small = Image.open(io.BytesIO(image_files.check(encoded, resize=6)))
    np.testing.assert_allclose(small.getpixel((1, 1)), pixels[0, 0], atol=4)


REFUSED = {
    "float": (
        tiff(Image.fromarray(RGB[..., 0].astype("float32"))),
        "image of 32-bit numbers",
    ),
    "int": (
        tiff(Image.fromarray(RGB[..., 0].astype("int32"))),
        "image of 32-bit numbers",
    ),
    "no tiff": (b"II*\0" + bytes(40), "TIFF image that Pillow cannot read"),
    "no heic": (b"\0\0\0\x18ftypheic" + bytes(30), "HEIC image"),
    "cut tiff": (OTHERS["TIFF"][0][:-300], "image cannot be decoded"),
    "cut png": (BIG[: len(BIG) // 2], "image cannot be decoded"),
    "cut bmp": (BMPS["24 bits"][0][:-9], "image cannot be decoded"),
    "cut gif": (GIFS["whole"][0][:-30], "image cannot be decoded"),
    "cut webp": (WEBPS["lossless"][0][:-30], "image cannot be decoded"),
    "3 bits": (bmp(NUMBERS, 8)[:28] + b"\3" + bytes(99), "cannot be decoded"),
    "palette only": (bmp(NUMBERS, 8)[:60], "cannot be decoded"),
    "nothing": (b"", "cannot be decoded"),
    "junk": (b"\xff\xff\x00junk" * 9, "cannot be decoded"),
    "jpeg head": (b"\xff\xd8\xff", "cannot be decoded"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_everywhere(decode, name):
    encoded, reason = REFUSED[name]
    with pytest.raises(image_files.UnusableError, match=reason):
        image_files.check(encoded)
    with pytest.raises(image_files.UnusableError):
        image_files.check(encoded, resize=6)
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode(encoded)


def test_a_server_decodes_the_same_and_names_what_it_does_not():
    """Decodes all in one request, so that the graph is built once."""
    preprocessing = ImagePreprocessing(
        (H, W), reduced_decode=False, max_pixels=10_000
    )
    decode = tf.function(
        lambda contents: request_images.decode_request(contents, preprocessing),
        input_signature=[tf.TensorSpec([None], tf.string)],
        autograph=False,
    )
    cases = [*IN_GRAPH.items(), *OTHERS.items(), *REFUSED.items()]
    pixels, errors = decode([content for _, (content, _) in cases])
    for number, (name, (content, _)) in enumerate(cases):
        error = errors[number].numpy().decode()
        if name in IN_GRAPH:
            assert not error
            expected = preprocessing.fit(decode_resize.decode(content))
            np.testing.assert_array_equal(pixels[number], expected)
        elif name in OTHERS:
            kind = "compressed BMP" if "run" in name else name.split(",")[0]
            assert error.startswith(f"image_bytes: {kind} is not decoded here")
        else:
            assert error.startswith("image_bytes: ")
    names = [name for name, _ in cases]
    assert b"HEIC is not" in errors[names.index("no heic")].numpy()
    assert b"not a JPEG" in errors[names.index("nothing")].numpy()


def test_nothing_is_decoded_above_the_limit():
    """The header says it, of every kind; what it says is not believed twice."""
    limit = H * W - 1
    decode = tf.function(
        lambda encoded: decode_resize.decode(
            encoded, limit, others=image_files.decode_other
        ),
        input_signature=[tf.TensorSpec([], tf.string)],
    )
    reason = f"image of more than {limit} pixels"
    for encoded, _ in [*IN_GRAPH.values(), *OTHERS.values()]:
        with pytest.raises(image_files.UnusableError, match=reason):
            image_files.check(encoded, max_pixels=limit)
        with pytest.raises(tf.errors.InvalidArgumentError, match="more than"):
            decode(encoded)
    huge = bytearray(BMPS["24 bits"][0])
    huge[18:26] = struct.pack("<ii", 1 << 30, -(1 << 30))
    for resize in (None, 6):
        with pytest.raises(image_files.UnusableError, match="more than"):
            image_files.check(bytes(huge), resize=resize)


def test_a_bad_record_says_what_it_was():
    from cappa_tf.data import schema

    decoder = RecordDecoder(
        ImagePreprocessing(4, reduced_decode=False, max_pixels=10_000), 0, None
    )
    for name in ("float", "no tiff", "cut png"):
        content, reason = REFUSED[name]
        raw = schema.serialize(schema.Example("k", content, []))
        assert decoder.diagnose(raw) == (reason, "k")
