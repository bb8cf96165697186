"""Scenes: one true caption per image, separate compositions."""

import hashlib
import io
import itertools
import pathlib

import numpy as np
import pytest
from PIL import Image

from cappa_tf.data.scenes import render, world
from cappa_tf.data.scenes.world import Print, Scene, Thing
from cappa_tf.data.tokenizer import Tokenizer

SMALL = {"num_train": 40, "num_eval": 12, "num_shards": 2}


def _all_compositions():
    things = list(itertools.product(render.COLORS, render.SHAPES))
    objects = [
        (*a, relation, *b)
        for a, relation, b in itertools.product(
            things, render.RELATIONS, things
        )
    ]
    prints = [
        (word, *colors)
        for word, colors in itertools.product(world.WORDS, world.print_colors())
    ]
    return objects, prints


def _composition(caption):
    """Parses the composition of a caption."""
    words = caption.removeprefix("a ").split()
    if caption.startswith("the word"):
        _, _, word, _, color, _, ground = caption.split()
        return (word, color, ground)
    first, second = words[:3], words[-3:]
    relation = " ".join(words[3:-4])
    return (*first[1:], relation, *second[1:])


def test_the_counts_are_those_of_the_docstring():
    objects, prints = _all_compositions()
    held_out = [sum(map(world.is_held_out, kind)) for kind in (objects, prints)]
    assert (len(objects), len(prints)) == (4608, 336)
    for number in ("4,608", "336", f"({held_out[0]} and {held_out[1]})"):
        assert number in world.__doc__.replace("\n", " ")


def test_no_composition_is_in_train_and_held_out():
    seen = {
        split: set(map(_composition, world.captions(split, 1500)))
        for split in world.SPLITS
    }
    assert not seen["train"] & seen["heldout"]
    assert not seen["validation"] & seen["heldout"]
    assert all(map(world.is_held_out, seen["heldout"]))
    assert seen["validation"] & seen["train"]
    # Nothing new but the combination: each single word is known from train.
    words = {split: {w for c in s for w in c} for split, s in seen.items()}
    assert words["heldout"] <= words["train"]


def test_captions_of_the_issue():
    things = Thing("small", "red", "circle"), Thing("large", "blue", "square")
    scene = Scene(things[0], "left of", things[1])
    assert scene.caption == "a small red circle left of a large blue square"
    print_ = Print("lamp", "green", "white")
    assert print_.caption == "the word lamp in green on white"


def test_the_relation_is_never_in_doubt():
    rng = np.random.default_rng(0)
    for _ in range(500):
        scene = world._sample_scene(rng)
        radii, centers = render.place(scene, rng)
        axis = render.RELATIONS[scene.relation]
        along = centers[1, axis] - centers[0, axis]
        across = abs(centers[1, 1 - axis] - centers[0, 1 - axis])
        assert along > 1.1 * radii.sum()
        assert across <= 0.4 * along + 1e-9
        assert (centers - 1.1 * radii[:, None] >= 0).all()
        assert (centers + 1.1 * radii[:, None] <= 1).all()


def _near(pixels, color):
    """Coordinates (y, x) of the pixels of about this color."""
    distance = np.abs(pixels - np.array(render.COLORS[color])).max(-1)
    return np.argwhere(distance < 40)


def test_pixels_say_what_the_caption_says():
    rng = np.random.default_rng(1)
    areas = {"small": [], "large": []}
    for relation, shape, size in itertools.product(
        render.RELATIONS, render.SHAPES, render.SIZES
    ):
        first, second = Thing(size, "red", shape), Thing(size, "blue", shape)
        image = world.draw(Scene(first, relation, second), rng)
        pixels = np.asarray(image, int)
        red, blue = _near(pixels, "red"), _near(pixels, "blue")
        axis = {"above": 0, "left of": 1}[relation]
        assert red[:, axis].mean() < blue[:, axis].mean()
        areas[size].append(np.ptp(red[:, axis]))
    assert min(areas["large"]) > 1.4 * max(areas["small"])


@pytest.mark.parametrize("word", ["ant", "lamp", "moon"])
def test_a_word_fills_most_of_the_picture_and_stays_inside(word):
    rng = np.random.default_rng(2)
    for _ in range(10):
        print_ = Print(word, "white", "black")
        pixels = np.asarray(world.draw(print_, rng), int)
        spots = _near(pixels, "white")
        assert 0.6 * 64 < np.ptp(spots[:, 1]) < 64
        border = np.concatenate(
            [pixels[[0, -1]], pixels[:, [0, -1]].swapaxes(0, 1)]
        )
        assert not len(_near(border, "white"))


def _digests(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(pathlib.Path(folder).iterdir())
    }


def test_same_arguments_same_bytes_and_no_second_drawing(tmp_path, monkeypatch):
    world.write_scenes(tmp_path / "a", **SMALL)
    description = world.write_scenes(tmp_path / "b", **SMALL)
    assert _digests(tmp_path / "a") == _digests(tmp_path / "b")
    counts = {s: description.num_examples(s) for s in description.splits}
    assert counts == {"train": 40, "validation": 12, "heldout": 12}

    monkeypatch.setattr(world.schema, "write_dataset", None)
    again = world.prepare(tmp_path / "a", **SMALL)
    assert again.content == description.content

    # As version 0.1.0 wrote it, too.
    assert description.metadata["source"] == "cappa_tf.data.scenes"

    before = _digests(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.model").unlink()
    world.prepare(tmp_path / "a", **SMALL)
    assert _digests(tmp_path / "a") == before


def test_what_is_not_complete_or_not_the_same_is_not_taken(tmp_path):
    world.prepare(tmp_path, **SMALL)
    with pytest.raises(ValueError, match="holds another data set.*Received"):
        world.prepare(tmp_path, **SMALL, seed=1)
    (tmp_path / "scenes-train.tfrecord-00001-of-00002").unlink()
    with pytest.raises(ValueError, match="00001-of-00002 is missing"):
        world.prepare(tmp_path, **SMALL)
    # As after an interruption: without a description all is written again.
    (tmp_path / "dataset.json").unlink()
    world.prepare(tmp_path, **SMALL).verify(checksums=True)


def test_the_vocabulary_has_every_word_whole(tmp_path):
    world.prepare(tmp_path, **SMALL)
    tokenizer = Tokenizer(tmp_path / "tokenizer.model", max_length=12)
    assert tokenizer.vocabulary_size == world.VOCABULARY_SIZE
    captions = list(world.captions("heldout", 200))
    tokens = tokenizer(captions).numpy()
    assert tokenizer.detokenize(tokens) == captions
    lengths = [len(caption.split()) + 1 for caption in captions]
    assert ((tokens != 0).sum(-1) == lengths).all()


@pytest.mark.parametrize(
    "argument",
    [
        {"num_train": 0},
        {"num_eval": 1.5},
        {"image_size": 16},
        {"seed": -1},
        {"vocabulary_size": 500},
    ],
)
def test_bad_arguments_are_named(tmp_path, argument):
    (name,) = argument
    with pytest.raises(ValueError, match=f"Received: {name}="):
        world.prepare(tmp_path, **(SMALL | argument))


def test_examples_are_independent_of_how_many_are_drawn():
    few, more = (
        list(world.examples("train", n, image_size=48)) for n in (2, 4)
    )
    assert few == more[:2]
    assert few != list(world.examples("train", 2, image_size=48, seed=1))
    assert Image.open(io.BytesIO(few[0].image)).size == (48, 48)
