"""The image sheet: complete, readable and marked, for any image and text."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from cappa_tf.evaluation import sheet
from cappa_tf.inference.captions import CaptionRow


def _png(size=(64, 64), mode="RGB", color=None):
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[..., 2] = 200
    image = Image.new(mode, size, color) if color else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def _row(caption="a red ring", references=("a red ring",), **kwargs):
    pieces = [f" {word}" for word in caption.split()] + ["<eos>"]
    defaults = {
        "key": "k",
        "caption": caption,
        "log_likelihood": -1.0,
        "pieces": pieces,
        "probabilities": [0.9] * len(pieces),
        "references": list(references),
        "image": _png(),
    }
    return CaptionRow(**(defaults | kwargs))


def _pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def _count(path, color):
    return int((_pixels(path) == color).all(-1).sum())


def test_green_where_right_red_where_wrong(tmp_path):
    right, wrong = tmp_path / "right.png", tmp_path / "wrong.png"
    sheet.write_sheet(right, [_row()])
    sheet.write_sheet(wrong, [_row(references=["another"])])
    assert _count(right, sheet._RIGHT) and not _count(right, sheet._WRONG)
    assert _count(wrong, sheet._WRONG) and not _count(wrong, sheet._RIGHT)
    sheet.write_sheet(wrong, [_row(references=["another"])], marks=False)
    assert not _count(wrong, sheet._WRONG)
    sheet.write_sheet(wrong, [_row(references=[])])
    assert not _count(wrong, sheet._WRONG)


def test_drawn_images_are_enlarged_by_whole_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    picture = np.asarray(sheet._image(buffer.getvalue()))
    assert picture.shape == (sheet._TILE, sheet._TILE, 3)
    edge = (sheet._TILE - 256) // 2
    inner = picture[edge : edge + 256, edge : edge + 256]
    np.testing.assert_array_equal(inner[::4, ::4], pixels)
    np.testing.assert_array_equal(inner[3::4, 3::4], pixels)


@pytest.mark.parametrize("size", [(500, 333), (300, 900), (1, 1), (900, 2)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_any_image_fits_its_square(size, mode):
    square = sheet._image(_png(size, mode))
    assert (square.size, square.mode) == ((sheet._TILE,) * 2, "RGB")


@pytest.mark.parametrize(
    "text",
    [
        "a small red circle left of a large blue square and so on and so on",
        "x" * 300,
        "",
        "short " + "y" * 90 + " end",
    ],
)
def test_wrapped_lines_fit_and_lose_nothing(text):
    font = sheet._font(16)
    lines = sheet._wrap(text, font, 200)
    assert all(font.getlength(line) <= 200 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_grid_is_as_wide_as_its_columns_and_as_high_as_its_highest(tmp_path):
    path = tmp_path / "new" / "folder" / "sheet.png"
    tall = _row(caption="long " * 60)
    sheet.write_sheet(path, [_row()] * 4 + [tall], title="Title", columns=3)
    width = Image.open(path).width
    assert width == 3 * (sheet._TILE + sheet._MARGIN) + sheet._MARGIN
    tallest = sheet._tile(tall, True).height + sheet._tile(_row(), True).height
    assert Image.open(path).height > tallest
    sheet.write_sheet(path, [_row()], columns=3)
    assert Image.open(path).width == sheet._TILE + 2 * sheet._MARGIN
    assert os.listdir(path.parent) == ["sheet.png"]


def test_odd_rows_are_drawn(tmp_path):
    rows = [
        _row(caption="", pieces=["<eos>"], probabilities=[1.0]),
        _row(references=[]),
        _row(pieces=[], probabilities=[]),
        _row(pieces=[" " + "z" * 200], probabilities=[0.0]),
        _row(caption="ein größerer 猫", pieces=[" "], probabilities=[1e-9]),
    ]
    sheet.write_sheet(tmp_path / "sheet.png", rows)
    assert _pixels(tmp_path / "sheet.png").size


def test_probability_colours():
    assert sheet.probability_color(0.0) == sheet._COLORS[0]
    assert sheet.probability_color(0.5) == sheet._COLORS[1]
    assert sheet.probability_color(1.0) == sheet._COLORS[2]
    assert sheet.probability_color(1.0 + 1e-6) == sheet._COLORS[2]
    greens = [sheet.probability_color(p)[0] for p in (0.5, 0.7, 0.9)]
    assert greens == sorted(greens, reverse=True)


def test_bad_arguments_are_named(tmp_path):
    path = tmp_path / "sheet.png"
    with pytest.raises(ValueError, match="Received: 0 rows"):
        sheet.write_sheet(path, [])
    with pytest.raises(ValueError, match="columns=0"):
        sheet.write_sheet(path, [_row()], columns=0)
    with pytest.raises(ValueError, match="key='k'"):
        sheet.write_sheet(path, [_row(image=None)])
    assert not path.exists()
