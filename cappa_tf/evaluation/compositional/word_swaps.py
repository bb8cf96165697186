"""Hard negatives of people's captions: two colors or two nouns swapped.

For "a black dog chases a man in a red shirt" there are

    swap_color   a red dog chases a man in a black shirt
    swap_noun    a black man chases a dog in a red shirt

The words are the same, so no bag of words distinguishes the two. A swap can be
as true as the caption where a word between the two makes them exchangeable ("a
boy and a girl", "a man next to a woman"); such pairs are left out, and so are
captions with three colors or more, whose pairs are hard to tell apart.
"""

import itertools
import re

from cappa_tf.evaluation.compositional.choices import Choice

# fmt: off
COLORS = (
    "black", "white", "red", "blue", "green", "yellow", "brown", "orange",
    "pink", "purple", "gray", "grey", "tan", "blond", "silver", "gold",
)
# Nouns of things, animals and people that are frequent in captions of photos.
NOUNS = (
    "man", "men", "woman", "women", "boy", "boys", "girl", "girls", "child",
    "children", "kid", "kids", "baby", "person", "people", "dog", "dogs", "cat",
    "horse", "bird", "ball", "frisbee", "stick", "toy", "bike", "bicycle",
    "motorcycle", "car", "truck", "bus", "boat", "surfboard", "skateboard",
    "snowboard", "sled", "kayak", "bench", "chair", "table", "car", "hat",
    "shirt", "helmet", "jacket", "rope", "swing", "slide", "ramp", "wall",
    "fence", "tree", "rock", "hill", "mountain", "river", "lake", "pool",
    "ocean", "wave", "beach", "field", "grass", "snow", "sand", "street",
    "road", "sidewalk", "building", "house", "camera", "guitar", "umbrella",
    "fish", "cow", "sheep", "bear", "flower", "sign", "bag", "bottle",
)
# fmt: on
# Words between two others that often make their exchange a true caption.
_EXCHANGEABLE = frozenset(
    "and or with near beside next together other another facing both".split()
)
_WORD = re.compile(r"[A-Za-z]+")


def swaps(caption):
    """Wrong captions made from a right one.

    Args:
        caption: The right caption.

    Returns:
        Dict subset -> caption; empty where nothing can be swapped.
    """
    found = {}
    for subset, words in (("swap_color", COLORS), ("swap_noun", NOUNS)):
        places = [
            match
            for match in _WORD.finditer(caption)
            if match[0].lower() in words
        ]
        if subset == "swap_color" and len(places) != 2:
            continue
        for first, second in itertools.pairwise(places):
            between = caption[first.end() : second.start()].lower()
            if first[0].lower() == second[0].lower() or _EXCHANGEABLE & set(
                _WORD.findall(between)
            ):
                continue
            found[subset] = (
                caption[: first.start()]
                + _cased(second[0], first[0])
                + caption[first.end() : second.start()]
                + _cased(first[0], second[0])
                + caption[second.end() :]
            )
            break
    return found


def _cased(word, like):
    """The word, capitalized as another one is."""
    return word.capitalize() if like[0].isupper() else word.lower()


def choices(captions):
    """Choices between captions of one image and their swaps.

    Args:
        captions: The right captions.

    Returns:
        List of `Choice`s; a swap that happens to be one of the captions is
        left out.
    """
    return [
        Choice(subset, (caption, wrong))
        for caption in captions
        for subset, wrong in swaps(caption).items()
        if wrong not in captions
    ]
