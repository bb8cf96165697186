"""Hard negatives of the synthetic scenes: one word swapped or replaced.

The captions describe a scene completely, in one grammar, so each can be parsed
and put together wrongly. For
    a small red circle left of a large blue square
there are
    swap_color         a small blue circle left of a large red square
    swap_shape         a small red square left of a large blue circle
    swap_size          a large red circle left of a small blue square
    swap_objects       a large blue square left of a small red circle
    replace_relation   a small red circle above a large blue square
    replace_color      a small green circle left of a large blue square
    replace_shape      a small red star left of a large blue square
    replace_size       a large red circle left of a large blue square
and for "the word lamp in green on white"
    swap_word_colors   the word lamp in white on green
    replace_word       the word tent in green on white
A swap that changes nothing (both are red) is left out. Swaps have the same
words as the right caption, so no bag of words distinguishes them. All of them
are wrong, as two objects are in only one relation.
"""

import dataclasses
import re

import numpy as np

from cappa_tf.data.scenes import world
from cappa_tf.data.scenes.render import COLORS, RELATIONS, SHAPES, SIZES
from cappa_tf.evaluation.compositional.choices import Choice

_SCENE = re.compile(
    "a (?P<size_1>{0}) (?P<color_1>{1}) (?P<shape_1>{2}) (?P<relation>{3}) "
    "a (?P<size_2>{0}) (?P<color_2>{1}) (?P<shape_2>{2})".format(
        *("|".join(words) for words in (SIZES, COLORS, SHAPES, RELATIONS))
    )
)
_PRINT = re.compile(
    "the word (?P<word>{0}) in (?P<color>{1}) on (?P<ground>{1})".format(
        "|".join(world.WORDS), "|".join(COLORS)
    )
)


def parse(caption):
    """Parses a caption into a `Scene` or `Print`; None if it is neither."""
    if found := _SCENE.fullmatch(caption):
        first, second = (
            world.Thing(
                *(found[f"{a}_{i}"] for a in ("size", "color", "shape"))
            )
            for i in (1, 2)
        )
        return world.Scene(first, found["relation"], second)
    if found := _PRINT.fullmatch(caption):
        return world.Print(*found.groups())
    return None


def negatives(content, rng):
    """Wrong captions for an image.

    Args:
        content: `Scene` or `Print` that the image shows.
        rng: A `numpy.random.Generator`, which chooses the replacements.

    Returns:
        Dict subset -> caption.
    """
    if isinstance(content, world.Print):
        wrong = {
            "swap_word_colors": dataclasses.replace(
                content, color=content.ground, ground=content.color
            ),
            "replace_word": _replaced(content, rng, word=world.WORDS),
        }
    else:
        wrong = _wrong_scenes(content, rng)
    return {
        subset: other.caption
        for subset, other in wrong.items()
        if other != content
    }


def _wrong_scenes(scene, rng):
    first, second = scene.first, scene.second
    wrong = {}
    for name in ("color", "shape", "size"):
        mine, others = getattr(first, name), getattr(second, name)
        wrong[f"swap_{name}"] = dataclasses.replace(
            scene,
            first=dataclasses.replace(first, **{name: others}),
            second=dataclasses.replace(second, **{name: mine}),
        )
    wrong["swap_objects"] = dataclasses.replace(
        scene, first=second, second=first
    )
    wrong["replace_relation"] = _replaced(scene, rng, relation=RELATIONS)
    for name, words in (("color", COLORS), ("shape", SHAPES), ("size", SIZES)):
        place = ("first", "second")[int(rng.integers(2))]
        thing = _replaced(getattr(scene, place), rng, **{name: words})
        wrong[f"replace_{name}"] = dataclasses.replace(scene, **{place: thing})
    return wrong


def _replaced(content, rng, **words):
    """Copies `content` with another word in one place."""
    ((name, all_words),) = words.items()
    others = [word for word in all_words if word != getattr(content, name)]
    word = others[int(rng.integers(len(others)))]
    return dataclasses.replace(content, **{name: word})


def choices(caption, key, seed=0):
    """Choices between a caption and its hard negatives.

    Args:
        caption: The right caption.
        key: Name of the image; the replacements depend on `seed` and `key`.
        seed: An int.

    Returns:
        List of `Choice`s, empty for a caption of another kind.
    """
    content = parse(caption)
    if content is None:
        return []
    rng = np.random.default_rng([seed, *key.encode()])
    return [
        Choice(subset, (caption, wrong))
        for subset, wrong in negatives(content, rng).items()
    ]
