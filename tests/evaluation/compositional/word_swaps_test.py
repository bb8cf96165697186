"""Swapped words: what is swapped, and what is left out."""

import pytest

from cappa_tf.evaluation.compositional import word_swaps


def test_two_colors_and_two_nouns_are_swapped():
    caption = "A black dog chases a man in a red shirt ."
    assert word_swaps.swaps(caption) == {
        "swap_color": "A red dog chases a man in a black shirt .",
        "swap_noun": "A black man chases a dog in a red shirt .",
    }


def test_a_capital_stays_at_the_beginning():
    assert word_swaps.swaps("Dog on a bench") == {"swap_noun": "Bench on a dog"}


@pytest.mark.parametrize(
    "caption",
    [
        "a boy and a girl",  # as true the other way round
        "a black and white photo",
        "a man next to a woman",
        "a dog runs",
        "a dog bites a dog",
        "a red, a blue thing in green",  # three colors
    ],
)
def test_what_may_stay_true_is_not_swapped(caption):
    assert word_swaps.swaps(caption) == {}


def test_a_swap_that_somebody_wrote_is_left_out():
    captions = ["a dog on a car", "a car on a dog"]
    assert word_swaps.choices(captions) == []
    (one,) = word_swaps.choices(captions[:1])
    assert one.texts == ("a dog on a car", "a car on a dog")
