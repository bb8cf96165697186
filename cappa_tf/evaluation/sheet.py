"""Image sheet: a grid of images with their captions and probabilities.

Every tile has the image; the prompt, if any, in gray; the caption, marked by a
green bar if it is one of the references and by a red one if not; the first
reference in gray; and the caption's tokens, each on a color from red
(improbable) to green with its probability in percent below.

All lengths are in pixels.
"""

import io
import math

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

from cappa_tf.utils import files

_TILE = 260  # width of a tile and height of its image
_MARGIN = 14
_GAP = 6  # between the parts of a tile
_CHIP_PAD = 3
_ENLARGED_WITHOUT_SMOOTHING = 130  # up to this size, images are not photos

_INK = (28, 28, 28)
_GREY = (96, 96, 96)
_PAPER = (255, 255, 255)
_FRAME = (244, 244, 244)
_RIGHT = (36, 160, 72)
_WRONG = (212, 52, 44)
# A token's probability: 0, 0.5 and 1.
_COLORS = ((244, 150, 140), (250, 226, 140), (158, 218, 160))
# Of attention maps.
_SMALL_TILE = 112
_HEAT = (226, 30, 30)
_HEAT_OPACITY = 0.75  # where a map is largest


def write_sheet(path, rows, title=None, columns=4, marks=True):
    """Writes captioned images to one PNG file.

    Args:
        path: Path of the file; its folder is created if missing.
        rows: `captions.CaptionRow`s with images, at least one.
        title: Text at the top, or None.
        columns: Number of tiles in a row.
        marks: Whether to mark captions that are exactly a reference. On photos
            hardly any caption is.

    Raises:
        ValueError: If there are no rows, or one has no image.
    """
    rows = list(rows)
    if not rows or columns < 1:
        raise ValueError(
            "A sheet needs at least one row and column. Received: "
            f"{len(rows)} rows, columns={columns}"
        )
    columns = min(columns, len(rows))
    tiles = [_tile(row, marks) for row in rows]
    lines = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    below = ["a reference"] if any(row.references for row in rows) else []
    if any(row.pieces for row in rows):
        below.append("its tokens' probabilities in %")
    legend = f"Under each caption: {'; '.join(below)}." if below else None
    sheet = _assemble(lines, columns, title, legend)
    with files.replacing(path) as unfinished:
        sheet.save(unfinished, "PNG", optimize=True)


def write_attention_sheet(path, rows, images, maps, title=None):
    """Writes a line for each image: where a model looked for each word.

    Args:
        path: Path of the PNG file; its folder is created if missing.
        rows: `captions.CaptionRow`s, at least one.
        images: float [N, H, W, 3] in [-1, 1], as the model saw them.
        maps: Lists of (word, float [rows, columns]), of
            `attention_maps.attention_maps`.
        title: Text at the top, or None.
    """
    sheet = attention_sheet(rows, images, maps, title)
    with files.replacing(path) as unfinished:
        sheet.save(unfinished, "PNG", optimize=True)


def attention_sheet(rows, images, maps, title=None):
    """The sheet of `write_attention_sheet` as an RGB image of Pillow."""
    lines = [
        [
            _titled(image, None, row.caption),
            *(_titled(image, *m[::-1]) for m in some),
        ]
        for row, image, some in zip(rows, images, maps, strict=True)
    ]
    columns = max(len(line) for line in lines)
    legend = "Red: where the decoder attended while it predicted the word."
    return _assemble(lines, columns, title, legend, _SMALL_TILE)


def _titled(image, heat, text):
    """A small image, red where a map is large, with a text below."""
    pixels = np.clip((np.asarray(image) + 1.0) * 127.5, 0, 255).astype("uint8")
    tile = ImageOps.contain(
        Image.fromarray(pixels),
        (_SMALL_TILE, _SMALL_TILE),
        Image.Resampling.BILINEAR,
    )
    if heat is not None:
        # Pale where nothing was read, so that red stands out on any photo.
        tile = ImageEnhance.Color(tile).enhance(0.45).convert("RGBA")
        tile.alpha_composite(heat_layer(heat, tile.size))
    square = Image.new("RGB", (_SMALL_TILE, tile.height), _FRAME)
    square.paste(tile, ((_SMALL_TILE - tile.width) // 2, 0))
    text = text or "(empty caption)"
    return _stack(
        [square, _paragraph(text, _font(13), _SMALL_TILE)], _SMALL_TILE
    )


def heat_layer(heat, size):
    """An attention map as a layer over an image, red where it is large.

    Args:
        heat: float [rows, columns].
        size: (width, height) of the image.

    Returns:
        An RGBA image of Pillow.
    """
    share = np.asarray(heat, np.float32)
    share = Image.fromarray(share / max(float(share.max()), 1e-12))
    share = np.asarray(share.resize(size, Image.Resampling.BICUBIC))
    layer = Image.new("RGB", size, _HEAT)
    opacity = np.clip(share, 0, 1) * (255 * _HEAT_OPACITY)
    layer.putalpha(Image.fromarray(opacity.astype("uint8")))
    return layer


def _assemble(lines, columns, title, legend, tile_width=_TILE):
    """Arranges tiles in a grid, each line as high as its highest tile."""
    width = columns * (tile_width + _MARGIN) + _MARGIN
    header = _header(title, legend, width - 2 * _MARGIN)
    heights = [max(tile.height for tile in line) + _MARGIN for line in lines]
    top = _MARGIN + header.height + _GAP
    sheet = Image.new("RGB", (width, top + sum(heights)), _PAPER)
    sheet.paste(header, (_MARGIN, _MARGIN))
    for line, height in zip(lines, heights):
        for column, tile in enumerate(line):
            left = _MARGIN + column * (tile_width + _MARGIN)
            sheet.paste(tile, (left, top))
        top += height
    return sheet


def _header(title, legend, width):
    """The title and the legend, if there are any."""
    texts = [_paragraph(title, _font(20), width)] if title else []
    if legend:
        texts.append(_paragraph(legend, _font(13), width, _GREY))
    return _stack(texts, width)


def _tile(row, marks):
    """One image with the texts below it."""
    if row.image is None:
        raise ValueError(
            "Rows of a sheet need their images. Received: none for "
            f"key={row.key!r}"
        )
    parts = [_image(row.image), _caption(row, marks)]
    if row.prompt:
        parts.insert(1, _paragraph(row.prompt, _font(13), _TILE, _GREY))
    if row.references:
        parts.append(_paragraph(row.references[0], _font(13), _TILE, _GREY))
    if row.pieces:
        parts.append(_chips(row.pieces, row.probabilities))
    return _stack(parts, _TILE)


def _stack(parts, width):
    """Stacks images vertically, with gaps."""
    height = sum(part.height + _GAP for part in parts)
    stack = Image.new("RGB", (width, height), _PAPER)
    top = 0
    for part in parts:
        stack.paste(part, (0, top))
        top += part.height + _GAP
    return stack


def _image(encoded):
    """The image, scaled to fit a square of the tile's width."""
    image = Image.open(io.BytesIO(encoded))
    image = ImageOps.exif_transpose(image).convert("RGB")
    size = max(image.size)
    if size <= _ENLARGED_WITHOUT_SMOOTHING:
        scale = max(_TILE // size, 1)  # an integer keeps pixels equal in size
        image = image.resize(
            (image.width * scale, image.height * scale),
            Image.Resampling.NEAREST,
        )
    else:
        image = ImageOps.contain(image, (_TILE, _TILE))
    square = Image.new("RGB", (_TILE, _TILE), _FRAME)
    free = (_TILE - image.width, _TILE - image.height)
    square.paste(image, (free[0] // 2, free[1] // 2))
    return square


def _caption(row, marks):
    """The caption, marked as right or wrong if there are references."""
    indent = 10 if marks and row.references else 0
    text = row.caption or "(empty caption)"
    block = _paragraph(text, _font(16), _TILE - indent)
    part = Image.new("RGB", (_TILE, block.height), _PAPER)
    part.paste(block, (indent, 0))
    if indent:
        color = _RIGHT if row.exact_match else _WRONG
        ImageDraw.Draw(part).rectangle((0, 0, 4, part.height - 1), color)
    return part


def _paragraph(text, font, width, color=_INK):
    """Renders text in lines of at most `width`."""
    lines = _wrap(text, font, width)
    spacing = _line_height(font)
    block = Image.new("RGB", (width, spacing * len(lines)), _PAPER)
    pen = ImageDraw.Draw(block)
    for i, line in enumerate(lines):
        pen.text((0, i * spacing), line, color, font)
    return block


def _wrap(text, font, width):
    """Breaks text into lines at spaces, and long words anywhere."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def _chips(pieces, probabilities):
    """Tokens in lines, each with its probability below."""
    font, small = _font(13), _font(10)
    height = _line_height(font) + _line_height(small) + 2
    placed, x, line = [], 0, 0
    for piece, probability in zip(pieces, probabilities):
        text = _shorten(piece.strip() or "\u00b7", font)
        percent = f"{100 * probability:.0f}"
        wide = max(font.getlength(text), small.getlength(percent))
        wide = math.ceil(wide) + 2 * _CHIP_PAD
        # A word's later pieces touch its first one.
        gap = 3 if piece.startswith(" ") or piece == "<eos>" else 1
        if x and x + gap + wide > _TILE:
            x, line = 0, line + 1
        left = x + gap if x else 0
        placed.append((left, line, wide, text, percent, probability))
        x = left + wide
    block = Image.new("RGB", (_TILE, (line + 1) * (height + 3)), _PAPER)
    pen = ImageDraw.Draw(block)
    for left, line, wide, text, percent, probability in placed:
        top = line * (height + 3)
        box = (left, top, left + wide - 1, top + height - 1)
        pen.rectangle(box, probability_color(probability))
        middle = left + wide / 2
        pen.text((middle, top), text, _INK, font, anchor="ma")
        baseline = top + _line_height(font)
        pen.text((middle, baseline), percent, _GREY, small, anchor="ma")
    return block


def _shorten(text, font):
    """Shortens a piece until it fits a tile."""
    while font.getlength(text) > _TILE - 2 * _CHIP_PAD:
        text = text[:-2] + "\u2026"
    return text


def probability_color(probability):
    """RGB color of a probability: red (0), yellow (0.5), green (1)."""
    position = 2 * min(max(probability, 0.0), 1.0)
    low = min(int(position), 1)
    part = position - low
    return tuple(
        round(a + part * (b - a)) for a, b in zip(*_COLORS[low : low + 2])
    )


def _font(size):
    # Comes with Pillow, so it is the same on every machine.
    return ImageFont.load_default(size)


def _line_height(font):
    return sum(font.getmetrics())
