"""How the scenes data set is painted.

Colours, places, sizes and the ground vary a little from picture to picture,
and all of it is under a faint noise; edges are smooth.

H/W: height and width of a picture, here both `image_size`.
"""

import functools
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZES = {"small": (0.09, 0.105), "large": (0.18, 0.205)}  # radius / W
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

_OVERSAMPLE = 4  # drawn at 4 times the size, then averaged: smooth edges
_ACROSS = 0.4  # offset across the axis of a relation, of that along it


def brightness(color):
    """Grey value of a colour's name, in [0, 255] (ITU-R BT.601)."""
    return float(np.dot(COLORS[color], (0.299, 0.587, 0.114)))


def draw_objects(scene, rng, image_size=64):
    """Paints two objects on a grey ground.

    Args:
        scene: A `scenes.Scene`.
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
    """Paints a word in one colour on a ground of another.

    Args:
        word: A string.
        color: A name in `COLORS`.
        ground: Another one.
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
    """Radii and centres of the two objects, true to the rule of the captions.

    Args:
        scene: A `scenes.Scene`.
        rng: A `numpy.random.Generator`.

    Returns:
        Float arrays radii [2] and centres [2, 2] (x, y), in picture widths.
    """
    things = (scene.first, scene.second)
    radii = np.array([rng.uniform(*SIZES[thing.size]) for thing in things])
    # Outlines stay within 1.1 radii, and an edge of 0.02 around them free.
    low, high = 1.1 * radii + 0.02, 1 - 1.1 * radii - 0.02
    nearest = 1.1 * radii.sum() + 0.03
    farthest = min(high[1] - low[0], nearest + 0.25)
    along = rng.uniform(nearest, farthest)
    axis = RELATIONS[scene.relation]
    centers = np.empty((2, 2))
    first = rng.uniform(low[0], high[1] - along)
    centers[:, axis] = first, first + along
    # The second object's coordinate across: near the first's, in the picture.
    first = rng.uniform(low[0], high[0])
    nearby = np.clip([first - _ACROSS * along, first + _ACROSS * along], 0, 1)
    second = rng.uniform(max(nearby[0], low[1]), min(nearby[1], high[1]))
    centers[:, 1 - axis] = first, second
    return radii, centers


def _ground(color, rng, image_size):
    return Image.new("RGB", (image_size, image_size), _vary(color, rng))


def _vary(color, rng):
    """A colour close to `color`: each channel at most 10 of 255 away."""
    varied = np.asarray(color) + rng.uniform(-10, 10, 3)
    return tuple(int(channel) for channel in varied.clip(0, 255))


def _add_noise(image, rng):
    """Adds a slope of light and Gaussian noise, each of a few grey levels."""
    size = image.size[0]
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    slope_x, slope_y = rng.uniform(-8, 8, 2).astype(np.float32)
    pixels = np.asarray(image, np.float32)
    pixels = pixels + 4 * rng.standard_normal(pixels.shape, np.float32)
    pixels += (slope_y * ramp[:, None] + slope_x * ramp)[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@functools.cache
def _outline(shape):
    """Polygons of a shape within 1 (star: 1.1) of its centre, y downwards.

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
        "circle": [around([1.0] * 40)],
        "square": [np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.88],
        "triangle": [np.array([(0, -1), (1, 0.8), (-1, 0.8)])],
        "star": [around([1.1, 0.48] * 5)],
        "cross": [np.array([turn[i] for i in range(4) for turn in turns])],
        "ring": [around([1.0] * 40), around([0.55] * 40)],
    }[shape]


def _shape_mask(shape, radius, center, rng, image_size):
    """Coverage of a shape, turned by at most 8 degrees: an "L" image."""
    canvas = Image.new("L", (_OVERSAMPLE * image_size,) * 2)
    pen = ImageDraw.Draw(canvas)
    turn = math.radians(rng.uniform(-8, 8))
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
    """A word in bold print of about `width` pixels: a cropped "L" image."""
    # Set large once, then scaled: font sizes would come in steps otherwise.
    font = ImageFont.load_default(size=96)
    left, top, right, bottom = font.getbbox(word, stroke_width=3)
    image = Image.new("L", (right - left, bottom - top))
    pen = ImageDraw.Draw(image)
    pen.text((-left, -top), word, fill=255, font=font, stroke_width=3)
    scale = min(width / image.width, 0.75 * width / image.height)
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.BOX)


def _word_mask(word, rng, image_size):
    """Coverage of a printed word, as wide as fits with a little to spare."""
    canvas = Image.new("L", (image_size,) * 2)
    letters = _letters(word, round(rng.uniform(0.74, 0.9) * image_size))
    free = np.array(canvas.size) - letters.size
    # Half of the free height: the reading line moves, but not everywhere.
    x = rng.uniform(0.1, 0.9) * free[0]
    y = rng.uniform(0.3, 0.7) * free[1]
    canvas.paste(letters, (round(x), round(y)))
    return canvas
