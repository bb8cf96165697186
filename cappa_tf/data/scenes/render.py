"""Rendering of the scenes data set.

Colors, positions, sizes and the background vary a little from image to image.
Edges are smooth, and faint noise is added.

H/W: height and width of an image, here both `image_size`.
"""

import functools
import itertools
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZES = {"small": (0.105, 0.115), "large": (0.19, 0.205)}  # radius / W
COLORS = {
    "red": (214, 38, 38),
    "orange": (247, 144, 28),
    "yellow": (246, 228, 52),
    "green": (44, 160, 60),
    "blue": (38, 76, 214),
    "purple": (146, 48, 172),
    "black": (24, 24, 24),
    "white": (244, 244, 244),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# The axis along which the first object comes before the second.
RELATIONS = {"left of": 0, "above": 1}

_OVERSAMPLE = 4  # rendered at 4 times the size, then averaged for smooth edges
_ACROSS = 0.4  # maximum offset across a relation's axis, relative to along it
# Centers are near the points of a grid, so that a shape meets the patches of a
# vision transformer in few positions, and is learned from thousands of images
# instead of hundreds of thousands.
_GRID = 12
_JITTER = 0.015  # of the image's width, about a pixel
_WORD_WIDTH = 0.86  # of the image's width; a short and high word is narrower


def brightness(color):
    """Gray value of a named color, in [0, 255] (ITU-R BT.601)."""
    return float(np.dot(COLORS[color], (0.299, 0.587, 0.114)))


def draw_objects(scene, rng, image_size=64):
    """Renders two objects on a gray background.

    Args:
        scene: A `world.Scene`.
        rng: A `numpy.random.Generator`.
        image_size: Height and width in pixels.

    Returns:
        An RGB `PIL.Image.Image`.
    """
    image = _ground([rng.uniform(110, 160)] * 3, rng, image_size)
    things = (scene.first, scene.second)
    for thing, *spot in zip(things, *place(scene, rng)):
        mask = _shape_mask(thing.shape, *spot, rng, image_size)
        image.paste(_vary(COLORS[thing.color], rng), mask=mask)
    return _add_noise(image, rng)


def draw_word(word, color, ground, rng, image_size=64):
    """Renders a word in one color on a background of another.

    Args:
        word: A string.
        color: A name in `COLORS`.
        ground: Name of the background's color.
        rng: A `numpy.random.Generator`.
        image_size: Height and width in pixels.

    Returns:
        An RGB `PIL.Image.Image`.
    """
    image = _ground(COLORS[ground], rng, image_size)
    mask = _word_mask(word, rng, image_size)
    image.paste(_vary(COLORS[color], rng), mask=mask)
    return _add_noise(image, rng)


def place(scene, rng):
    """Samples radii and centers of two objects, according to their relation.

    Args:
        scene: A `world.Scene`.
        rng: A `numpy.random.Generator`.

    Returns:
        Float arrays radii [2] and centers [2, 2] (x, y), in image widths.
    """
    things = (scene.first, scene.second)
    radii = np.array([rng.uniform(*SIZES[thing.size]) for thing in things])
    spots = _spots(RELATIONS[scene.relation], *(t.size for t in things))
    centers = spots[rng.integers(len(spots))]
    return radii, centers + rng.uniform(-_JITTER, _JITTER, (2, 2))


@functools.cache
def _spots(axis, first_size, second_size):
    """All pairs of grid points at which two objects may be.

    Args:
        axis: 0 if the first is left of the second, 1 if it is above.
        first_size: A name in `SIZES`.
        second_size: Another one.

    Returns:
        Float array [pairs, 2, 2] of (x, y) of both objects.
    """
    # Outlines stay within 1.1 radii.
    reach = [
        1.1 * SIZES[size][1] + _JITTER for size in (first_size, second_size)
    ]
    points = np.arange(1, _GRID) / _GRID
    first, second = (points[(points >= r) & (points <= 1 - r)] for r in reach)
    pairs = [
        ((along, across), (along_2, across_2))
        for along, across in itertools.product(first, first)
        for along_2, across_2 in itertools.product(second, second)
        if sum(reach) <= along_2 - along
        and abs(across_2 - across) + 2 * _JITTER
        <= _ACROSS * (along_2 - along - 2 * _JITTER)
    ]
    return np.array(pairs)[..., [axis, 1 - axis]]


def _ground(color, rng, image_size):
    return Image.new("RGB", (image_size, image_size), _vary(color, rng))


def _vary(color, rng):
    """Varies each channel of a color by at most 10 of 255."""
    varied = np.asarray(color) + rng.uniform(-10, 10, 3)
    return tuple(int(channel) for channel in varied.clip(0, 255))


def _add_noise(image, rng):
    """Adds a light gradient and Gaussian noise, each of a few gray levels."""
    size = image.size[0]
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    slope_x, slope_y = rng.uniform(-8, 8, 2).astype(np.float32)
    pixels = np.asarray(image, np.float32)
    pixels = pixels + 4 * rng.standard_normal(pixels.shape, np.float32)
    pixels += (slope_y * ramp[:, None] + slope_x * ramp)[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@functools.cache
def _outline(shape):
    """Polygons of a shape within 1 (star: 1.1) of its center, y downwards.

    Returns:
        A list of float arrays [corners, 2]; the second polygon is a hole.
    """

    def around(radii):  # clockwise from the top
        angles = 2 * math.pi * np.arange(len(radii)) / len(radii)
        points = np.stack([np.sin(angles), -np.cos(angles)], -1)
        return points * np.asarray(radii)[:, None]

    near, far = 0.34, 1.0
    quarter = [(near, -far), (near, -near), (far, -near)]
    turns = [[(x, y), (-y, x), (-x, -y), (y, -x)] for x, y in quarter]
    return {
        "circle": [around([0.95] * 40)],
        "square": [np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)],
        "triangle": [np.array([(0, -1), (1, 0.8), (-1, 0.8)])],
        "star": [around([1.1, 0.48] * 5)],
        "cross": [np.array([turn[i] for i in range(4) for turn in turns])],
        "ring": [around([1.0] * 40), around([0.55] * 40)],
    }[shape]


def _shape_mask(shape, radius, center, rng, image_size):
    """Coverage of a shape rotated by at most 4 degrees, an "L" image."""
    canvas = Image.new("L", (_OVERSAMPLE * image_size,) * 2)
    pen = ImageDraw.Draw(canvas)
    turn = math.radians(rng.uniform(-4, 4))
    rotation = np.array(
        [
            [math.cos(turn), math.sin(turn)],
            [-math.sin(turn), math.cos(turn)],
        ]
    )
    for fill, corners in zip((255, 0), _outline(shape)):
        corners = (corners @ rotation * radius + center) * canvas.size[0]
        pen.polygon([tuple(corner) for corner in corners], fill=fill)
    return canvas.reduce(_OVERSAMPLE)


@functools.lru_cache(maxsize=4096)
def _letters(word, width):
    """A bold word about `width` pixels wide, a cropped "L" image."""
    # Rendered large and scaled down, as font sizes would come in steps.
    font = ImageFont.load_default(size=96)
    left, top, right, bottom = font.getbbox(word, stroke_width=3)
    image = Image.new("L", (right - left, bottom - top))
    pen = ImageDraw.Draw(image)
    pen.text((-left, -top), word, fill=255, font=font, stroke_width=3)
    scale = min(width / image.width, 0.75 * width / image.height)
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.BOX)


def _word_mask(word, rng, image_size):
    """Coverage of a word near the center of the image, an "L" image."""
    canvas = Image.new("L", (image_size,) * 2)
    letters = _letters(word, round(_WORD_WIDTH * image_size))
    free = (np.array(canvas.size) - letters.size) / 2
    x, y = free + rng.uniform(-_JITTER, _JITTER, 2) * image_size
    canvas.paste(letters, (round(x), round(y)))
    return canvas
