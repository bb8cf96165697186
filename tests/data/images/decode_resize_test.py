"""Decoding and resizing: formats, scales and limits."""

import functools
import io

import numpy as np
import pytest
import tensorflow as tf
from conftest import shared_data
from PIL import Image

from cappa_tf.data.images import decode_resize

H, W = 24, 36


def _picture(height=H, width=W):
    """A smooth color image, so that lossy formats remain close to it."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([y * 6, x * 4, 120 + y + x], axis=-1)
    return np.clip(rgb, 0, 255).astype(np.uint8)


def encode(pixels, file_format, mode="RGB", **options):
    """An image file of some format and mode."""
    image = Image.fromarray(pixels)
    file = io.BytesIO()
    image.convert(mode).save(file, file_format, **options)
    return file.getvalue()


def _grey16():
    ramp = np.arange(H * W, dtype=np.uint16).reshape(H, W) * 70
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "PNG")
    return file.getvalue(), np.repeat((ramp >> 8)[..., None], 3, -1)


def _grey(pixels):
    return np.repeat(
        np.asarray(Image.fromarray(pixels).convert("L"))[..., None], 3, -1
    )


@functools.cache
def in_graph(max_pixels):
    """`decode` as pipelines call it, traced once for all tests."""

    @functools.partial(tf.function, autograph=False)
    def decode(encoded, at_least=None):
        return decode_resize.decode(encoded, max_pixels, at_least)

    return decode


# format, mode, what decoding gives, tolerance in grey levels
CASES = [
    ("JPEG", "RGB", lambda p: p, 16),
    ("JPEG", "L", _grey, 4),
    ("JPEG", "CMYK", lambda p: p, 16),
    ("PNG", "RGB", lambda p: p, 0),
    ("PNG", "L", _grey, 0),
    ("PNG", "P", lambda p: p, 60),
    ("PNG", "RGBA", lambda p: p, 0),
    ("GIF", "L", _grey, 2),
    ("BMP", "RGB", lambda p: p, 0),
    ("BMP", "L", _grey, 0),
    ("WEBP", "RGB", lambda p: p, 32),
    ("WEBP", "RGBA", lambda p: p, 32),
]


@pytest.mark.parametrize("file_format, mode, expected, tolerance", CASES)
def test_every_format_becomes_rgb(file_format, mode, expected, tolerance):
    pixels = _picture()
    encoded = encode(pixels, file_format, mode)
    assert decode_resize.header_size(encoded).numpy().tolist() == [H, W]
    decoded = decode_resize.decode(encoded, max_pixels=H * W).numpy()
    assert decoded.dtype == np.uint8 and decoded.shape == (H, W, 3)
    difference = np.abs(decoded.astype(int) - expected(pixels))
    assert difference.max() <= tolerance


def test_sixteen_bits_become_eight():
    encoded, expected = _grey16()
    np.testing.assert_allclose(decode_resize.decode(encoded), expected, atol=1)


@pytest.mark.parametrize("options", [{"lossless": True}, {}])
def test_webp_header_of_each_kind(options):
    rgba = np.dstack([_picture(), np.full((H, W), 255, np.uint8)])
    for mode in ("RGB", "RGBA"):
        encoded = encode(rgba, "WEBP", mode, exact=True, **options)
        assert decode_resize.header_size(encoded).numpy().tolist() == [H, W]


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_transparent_pixels_become_white(file_format):
    rgba = np.dstack([_picture(), np.zeros((H, W), np.uint8)])
    rgba[: H // 2, :, 3] = 255
    options = {"lossless": True} if file_format == "WEBP" else {}
    decoded = decode_resize.decode(encode(rgba, file_format, "RGBA", **options))
    np.testing.assert_array_equal(decoded[: H // 2], rgba[: H // 2, :, :3])
    np.testing.assert_array_equal(decoded[H // 2 :], 255)


def _animation(file_format, count=2, mode="L"):
    """Frames of growing brightness, the first one 10."""
    frames = [
        Image.new("L", (W, H), 10 + 20 * i).convert(mode) for i in range(count)
    ]
    file = io.BytesIO()
    frames[0].save(
        file,
        file_format,
        save_all=True,
        append_images=frames[1:],
        comment=b"x" * 1000,
        lossless=True,
    )
    return file.getvalue()


@pytest.mark.parametrize("file_format", ["GIF", "WEBP"])
@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_animation_gives_its_first_frame(file_format, mode):
    """TensorFlow alone crashes at a WebP animation without transparency."""
    decoded = decode_resize.decode(_animation(file_format, mode=mode))
    np.testing.assert_array_equal(decoded, 10)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_an_extended_webp_is_like_a_simple_one(mode):
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    pixels = np.dstack([_picture(), np.full((H, W), 255, np.uint8)])
    simple = encode(pixels, "WEBP", mode)
    extended = encode(pixels, "WEBP", mode, exif=exif)
    assert extended[12:16] == b"VP8X"
    np.testing.assert_array_equal(
        decode_resize.decode(extended), decode_resize.decode(simple)
    )


def test_frames_of_an_animation_are_no_way_around_the_limit():
    """TensorFlow decodes all of a WebP; of a GIF it is given the first."""
    limit = 5 * H * W
    decode_resize.decode(_animation("WEBP", 5), limit)
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"(?s)more than.*4320"
    ):
        decode_resize.decode(_animation("WEBP", 6), limit)
    decode_resize.decode(_animation("GIF", 6), limit)


def test_a_gif_whose_frame_is_larger_than_announced():
    encoded = bytearray(encode(_picture(), "GIF"))
    encoded[6:10] = b"\1\0\1\0"
    assert decode_resize.header_size(bytes(encoded)).numpy().tolist() == [H, W]
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"(?s)more than.*863"
    ):
        in_graph(H * W - 1)(tf.constant(bytes(encoded)))


def test_a_gif_may_end_anywhere():
    encoded = _animation("GIF")
    decode = in_graph(None)
    whole = decode(tf.constant(encoded)).numpy()
    for length in range(6, len(encoded), 7):
        part = tf.constant(encoded[:length])
        try:
            np.testing.assert_array_equal(decode(part), whole)
        except tf.errors.InvalidArgumentError:
            continue


BAD = {
    "empty": b"",
    "text": b"this is not an image",
    "head only": b"\xff\xd8\xff",
    "truncated jpeg": encode(_picture(), "JPEG")[:-200],
    "truncated png": encode(_picture(), "PNG")[:-60],
    "header cut": encode(_picture(), "PNG")[:20],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_fail(name):
    with pytest.raises(tf.errors.InvalidArgumentError):
        in_graph(10_000)(tf.constant(BAD[name]))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_too_many_pixels_are_refused_from_the_header(file_format):
    encoded = encode(_picture(), file_format)
    # Without the pixels, only the header can have been read. (A
    # JPEG's size comes after its tables.)
    head = tf.constant(encoded if file_format == "JPEG" else encoded[:64])
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"(?s)more than.*863"
    ):
        in_graph(H * W - 1)(head)


def test_one_pixel_becomes_a_uniform_picture():
    encoded = encode(np.full((1, 1, 3), 7, np.uint8), "PNG")
    image = decode_resize.decode(encoded, 100)
    np.testing.assert_array_equal(decode_resize.resize(image, (5, 4)), 7)
    cropped = decode_resize.resize_small_central_crop(image, 6, (5, 4))
    np.testing.assert_array_equal(cropped, np.full((5, 4, 3), 7))


def test_squash_keeps_corners_and_loses_the_aspect_ratio():
    squashed = decode_resize.resize(_picture(48, 96), (24, 24)).numpy()
    assert squashed.shape == (24, 24, 3)
    np.testing.assert_allclose(squashed, _picture(48, 96)[::2, ::4], atol=12)


def test_central_crop_takes_the_middle():
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 200
    cropped = decode_resize.resize_small_central_crop(
        pixels, 10, (10, 10)
    ).numpy()
    assert cropped.shape == (10, 10, 3)
    np.testing.assert_array_equal(cropped[:, 1:-1], 200)
    tall = decode_resize.resize_small_central_crop(
        pixels.transpose(1, 0, 2), 10, (8, 8)
    )
    np.testing.assert_array_equal(tall, 200)


def test_model_range():
    """Of both types, to the last digits."""
    every = np.arange(256, dtype=np.float32)
    expected = every / np.float32(127.5) - np.float32(1)
    for dtype in (tf.uint8, tf.float32):
        x = decode_resize.to_model_range(tf.cast(every, dtype))
        np.testing.assert_allclose(x, expected, atol=1.2e-7)
    assert expected[0] == -1.0 and expected[-1] == 1.0


def _photo(height, width):
    """Detail at all scales, a JPEG of it, and the result of a good resize."""
    random = np.random.default_rng(0)
    rough = random.uniform(96, 160, (height // 8, width // 8, 3))
    pixels = Image.fromarray(rough.astype(np.uint8)).resize((width, height))
    fine = np.asarray(pixels) + random.normal(0, 6, (height, width, 3))
    pixels = np.clip(fine, 0, 255).astype(np.uint8)
    return encode(pixels, "JPEG", quality=90)


@pytest.mark.parametrize(
    "at_least, expected",
    [
        ((61, 60), (120, 320)),  # Half would be 60 high.
        ((60, 60), (60, 160)),
        ((30, 81), (60, 160)),  # The narrower direction decides.
        ((30, 80), (30, 80)),
        ((15, 40), (15, 40)),
        ((1, 1), (15, 40)),
        (None, (120, 320)),
    ],
)
def test_jpeg_is_decoded_at_the_smallest_scale_that_covers(at_least, expected):
    encoded = tf.constant(_photo(120, 320))
    assert (
        decode_resize.decode(encoded, at_least=at_least).shape[:2] == expected
    )
    wanted = None if at_least is None else tf.constant(at_least)
    decode = in_graph(120 * 320)
    assert decode(encoded, wanted).shape[:2] == expected
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"(?s)more than.*9.*pixels"
    ):
        decode_resize.decode(encoded, 9, at_least)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "GIF", "BMP"])
def test_other_formats_are_decoded_at_full_size(file_format):
    encoded = encode(_picture(), file_format)
    assert decode_resize.decode(encoded, at_least=(2, 2)).shape == (H, W, 3)


def test_sides_that_no_scale_divides_are_rounded_up():
    encoded = encode(_picture(43, 87), "JPEG")
    assert decode_resize.decode(encoded, at_least=(20, 20)).shape == (22, 44, 3)


def _mean_difference_to_antialiased(encoded, size, at_least):
    """Difference in gray levels from a full, antialiased decode."""
    exact = decode_resize.resize(
        decode_resize.decode(encoded), size, antialias=True
    )
    image = decode_resize.resize(
        decode_resize.decode(encoded, at_least=at_least), size
    )
    return np.abs(np.array(image, int) - np.array(exact, int)).mean()


@pytest.mark.parametrize("side, better", [(56, 0.7), (80, 1.1), (112, 1.1)])
def test_reduced_decoding_is_close_to_an_antialiased_shrink(side, better):
    # At a factor of 2 the four neighbors are all pixels; beyond it, they
    # miss pixels that a reduced scale includes.
    encoded, size = _photo(224, 448), (side, side)
    reduced = _mean_difference_to_antialiased(encoded, size, size)
    plain = _mean_difference_to_antialiased(encoded, size, None)
    assert reduced < 4
    assert reduced < better * plain


def test_reduced_decoding_of_real_photos():
    paths = sorted(shared_data("flickr8k_originals").glob("*.jpg"))[:8]
    size = (224, 224)
    for path in paths:
        photo = Image.open(path).convert("RGB").resize((1024, 768))
        encoded = encode(np.asarray(photo), "JPEG", quality=90)
        reduced = _mean_difference_to_antialiased(encoded, size, size)
        plain = _mean_difference_to_antialiased(encoded, size, None)
        assert reduced < min(8, plain)
