"""Prompts: what the docstrings promise, and the reference's arrays."""

import numpy as np
import pytest
from conftest import shared_reference

from cappa_tf.evaluation import prompts


def test_canonical_text_by_example():
    assert prompts.canonical("T-shirt (cotton)") == "tshirt cotton"
    name = "Great White_Shark,  big"
    assert prompts.canonical(name, keep=",") == "great white shark, big"
    assert prompts.canonical("A photo of a {}.", "{}") == "a photo of a {}"


def test_canonical_text_of_the_reference():
    arrays = np.load(shared_reference("transfer_tiny.npz"))
    for what, keep in (("names", ","), ("templates", "{}")):
        found = [
            prompts.canonical(t, keep) for t in arrays[f"canonical/{what}"]
        ]
        assert found == arrays[f"canonical/{what}_out"].tolist()


def test_published_templates():
    paper = prompts.find_templates("clip_paper")
    best = prompts.find_templates("clip_best")
    assert (len(set(paper)), len(set(best))) == (81, 8)
    assert "{}" in best and set(best) < set(paper)


def test_what_is_not_a_template_is_refused():
    for template in ("a", "{} {}", 3):
        with pytest.raises(ValueError, match="{} once"):
            prompts.find_templates([template])
    with pytest.raises(ValueError, match="clip_paper.*templates='a {}'"):
        prompts.find_templates("a {}")
    with pytest.raises(ValueError, match=r"templates=\[\]"):
        prompts.find_templates([])


def test_prompts_of_names_and_aliases():
    templates = ("A {}.", "The {}")
    names = ["Cat, kitty", "T-shirt"]
    assert prompts.class_prompts(names, templates) == [
        ["A Cat, kitty.", "The Cat, kitty"],
        ["A T-shirt.", "The T-shirt"],
    ]
    assert prompts.class_prompts(names, templates, True, "first") == [
        ["a cat", "the cat"],
        ["a tshirt", "the tshirt"],
    ]
    # As in the reference, an alias keeps the space before it.
    assert prompts.class_prompts(names[:1], templates, True, "all") == [
        ["a cat", "the cat", "a  kitty", "the  kitty"]
    ]


def test_a_class_needs_a_name():
    with pytest.raises(ValueError, match="'...' among"):
        prompts.class_prompts(["cat", "..."], ("{}",), True)
    with pytest.raises(ValueError, match="`class_names` must not be empty"):
        prompts.class_prompts([], ("{}",))
