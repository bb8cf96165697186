"""Hard negatives of scenes are wrong, and differ in one thing only."""

import numpy as np
import pytest

from cappa_tf.data.scenes import world
from cappa_tf.evaluation.compositional import scene_choices

SCENE = "a small red circle left of a large blue square"
PRINT = "the word lamp in green on white"
SWAPS = {
    "swap_color": "a small blue circle left of a large red square",
    "swap_shape": "a small red square left of a large blue circle",
    "swap_size": "a large red circle left of a small blue square",
    "swap_objects": "a large blue square left of a small red circle",
    "replace_relation": "a small red circle above a large blue square",
}


@pytest.mark.parametrize("split", world.SPLITS)
def test_every_caption_is_taken_apart_and_put_together(split):
    for caption in world.captions(split, 200):
        assert scene_choices.parse(caption).caption == caption
    assert scene_choices.parse("a dog runs") is None


def test_worked_examples():
    found = scene_choices.negatives(
        scene_choices.parse(SCENE), np.random.default_rng(0)
    )
    assert {name: found[name] for name in SWAPS} == SWAPS
    replaced = set(found) - set(SWAPS)
    assert replaced == {"replace_color", "replace_shape", "replace_size"}
    for name in replaced:
        pairs = zip(found[name].split(), SCENE.split(), strict=True)
        assert sum(a != b for a, b in pairs) == 1, name
    words = scene_choices.negatives(
        scene_choices.parse(PRINT), np.random.default_rng(0)
    )
    assert words["swap_word_colors"] == "the word lamp in white on green"
    assert words["replace_word"] != PRINT


def test_a_swap_that_changes_nothing_is_left_out():
    same = "a small red circle above a large red circle"
    found = scene_choices.negatives(
        scene_choices.parse(same), np.random.default_rng(0)
    )
    assert "swap_color" not in found and "swap_shape" not in found
    assert same not in found.values()


def test_choices_depend_on_seed_and_key_alone():
    first = scene_choices.choices(SCENE, "a")
    assert first == scene_choices.choices(SCENE, "a")
    others = [scene_choices.choices(SCENE, f"{i}") for i in range(20)]
    assert any(other != first for other in others)
    assert all(choice.texts[0] == SCENE for choice in first)
    assert scene_choices.choices("a dog runs", "a") == []
