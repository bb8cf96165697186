"""Photos are rotated as by Pillow."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from cappa_tf.data.images import decode_resize, image_files


def _jpeg(pixels, exif=b""):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", exif=exif)
    return file.getvalue()


@pytest.fixture(scope="module")
def pixels():
    random = np.random.RandomState(0)
    small = random.randint(256, size=(3, 5, 3)).astype("uint8")
    return np.asarray(Image.fromarray(small).resize((25, 15)))


@pytest.fixture(scope="module")
def upright():
    """Runs the function in a graph."""
    return tf.function(
        decode_resize.decode,
        input_signature=[tf.TensorSpec([], tf.string)],
        autograph=False,
    )


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("number", range(1, 9))
def test_it_is_as_pillow_has_it(pixels, upright, number, order):
    exif = Image.Exif()
    exif.endian = order
    exif[0x010F] = "a maker's name, which lies outside the directory"
    exif[0x0112] = number
    encoded = _jpeg(pixels, exif)
    assert (b"MM\0*" in encoded[:40]) == (order == ">")
    assert decode_resize.read_orientation(encoded).numpy() == number
    decoded = Image.fromarray(tf.io.decode_jpeg(encoded).numpy())
    decoded.getexif()[0x0112] = number
    expected = np.asarray(ImageOps.exif_transpose(decoded))
    np.testing.assert_array_equal(upright(encoded), expected)


def test_what_does_not_say_stays_as_it_is(pixels, upright):
    plain = _jpeg(pixels)
    other = Image.Exif()
    other[0x010F] = "a maker"
    wrong = Image.Exif()
    wrong[0x0112] = 9
    for encoded in (plain, _jpeg(pixels, other), _jpeg(pixels, wrong)):
        np.testing.assert_array_equal(
            upright(encoded), tf.io.decode_jpeg(encoded)
        )


COMMENT = b"\xff\xfe\0\x09comment"
PROFILE = b"\xff\xe2\xff\xf0" + bytes(0xFFEE)


@pytest.mark.parametrize(
    "before", [b"", COMMENT, b"\xff\xff" + COMMENT, PROFILE * 3]
)
def test_segments_may_stand_before_the_exif_data(pixels, upright, before):
    """A comment, padding bytes, a color profile of 196 KB."""
    encoded = _jpeg(pixels, _exif(6))
    encoded = encoded[:2] + before + encoded[2:]
    expected = np.rot90(tf.io.decode_jpeg(encoded), 3)
    np.testing.assert_array_equal(upright(encoded), expected)
    stored = image_files.check(encoded)
    difference = upright(stored).numpy().astype(int) - expected
    assert np.abs(difference).mean() < 8


@pytest.mark.parametrize(
    "number, size", [(1, (32, 64)), (4, (32, 64)), (5, (128, 64))]
)
def test_scale_covers_what_a_photo_is_after_turning(number, size):
    """64 x 128 stored sideways: 128 x 64 then holds 30 x 60 only once."""
    encoded = _jpeg(np.zeros((64, 128, 3), "uint8"), _exif(number))
    decode = tf.function(lambda e: decode_resize.decode(e, at_least=(30, 60)))
    assert decode(encoded).shape[:2] == size
    found = decode_resize.decode(tf.constant(encoded), at_least=(30, 60))
    assert found.shape[:2] == size


def _exif(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def test_exif_data_may_end_anywhere(pixels):
    """Truncated or meaningless EXIF data do not make an image bad."""
    encoded = _jpeg(pixels, _exif(6))
    start = encoded.index(b"Exif")
    for length in range(3, len(encoded[: start + 40]) + 1, 3):
        assert decode_resize.read_orientation(
            encoded[:length]
        ).numpy() in range(1, 9)
    random = np.random.RandomState(0)
    for _ in range(50):
        noise = random.bytes(40)
        broken = encoded[: start + 6] + noise + encoded[start + 46 :]
        assert decode_resize.read_orientation(broken).numpy() in range(1, 9)
