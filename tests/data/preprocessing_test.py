"""Image preprocessing: from a file to pixels, and to JSON and back."""

import dataclasses
import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from cappa_tf.data.images import decode_resize, image_files
from cappa_tf.data.preprocessing import ImagePreprocessing


@pytest.fixture(scope="module")
def encoded():
    """A PNG of 30 x 50 pixels of noise."""
    pixels = np.random.RandomState(0).randint(256, size=(30, 50, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.astype("uint8")).save(file, "PNG")
    return file.getvalue()


def test_json_of_a_run():
    """The keys of runs of version 0.1.0, no more and no fewer."""
    saved = {
        "image_size": [32, 24],
        "resize": "squash",
        "resize_small": 37,
        "antialias": False,
        "reduced_decode": True,
        "max_pixels": None,
    }
    read = ImagePreprocessing.from_json(saved)
    assert read.image_size == (32, 24) and read.to_json() == saved
    assert read == ImagePreprocessing((32, 24), max_pixels=None)
    # Older than the option: trained on full decodes.
    del saved["reduced_decode"]
    assert not ImagePreprocessing.from_json(saved).reduced_decode
    margin = read.with_margin(256 / 224)
    assert margin.squash_size == (36, 27)
    assert ImagePreprocessing.from_json(margin.to_json()) == margin


@pytest.mark.parametrize(
    "values, message",
    [
        (None, "must be an object"),
        ({}, "with `image_size`"),
        ({"image_size": 8, "crop": 1}, "some of .*Received: .*crop"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": 8, "resize": "fit"}, "resize.*Received: resize='fit'"),
        ({"image_size": 8, "resize_small": 0}, "resize_small"),
        ({"image_size": 8, "max_pixels": 1.5}, "max_pixels"),
        ({"image_size": 8, "squash_size": 7}, "squash_size=.7, 7."),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        ImagePreprocessing.from_json(values)


@pytest.mark.parametrize("resize", ["squash", "resize_small_central_crop"])
def test_margin_is_cut_off(encoded, resize):
    one = ImagePreprocessing(16, resize, reduced_decode=False)
    image = decode_resize.decode(encoded)
    if resize == "squash":
        expected = decode_resize.resize(image, (24, 24))[4:20, 4:20]
    else:
        expected = decode_resize.resize_small_central_crop(image, 24, (16, 16))
    pixels = one.with_margin(1.5).decode(encoded)
    np.testing.assert_array_equal(pixels, expected)
    assert one.scaled((32, 32)).resize_small == 2 * one.resize_small


def test_a_small_side_is_refused(encoded):
    """The minimum side is that of the file, not of a reduced decode."""
    one = ImagePreprocessing(4)
    file = io.BytesIO()
    Image.open(io.BytesIO(encoded)).save(file, "JPEG")
    for content in (encoded, file.getvalue()):
        assert one.decode(content, min_side=30).shape == (4, 4, 3)
        with pytest.raises(tf.errors.InvalidArgumentError):
            one.decode(content, min_side=31)


def test_what_is_wrong_with_a_file_is_said(encoded, tmp_path):
    one = ImagePreprocessing(8)
    with pytest.raises(image_files.UnusableError, match="image missing"):
        one.read(tmp_path / "none.png")
    with pytest.raises(image_files.UnusableError, match="cannot be decoded"):
        one.read_bytes(encoded[:200])
    limited = dataclasses.replace(one, max_pixels=1499)
    for box in (None, (0, 0, 9, 9)):
        with pytest.raises(image_files.UnusableError, match="more than 1499"):
            limited.read_bytes(encoded, box)
    with pytest.raises(image_files.UnusableError, match="box outside"):
        one.read_bytes(encoded, (50, 0, 9, 9))
