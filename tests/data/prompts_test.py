"""Prompts of captions, from records and templates to batches of labels."""

import io
import types

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from cappa_tf.data import prompts, schema
from cappa_tf.data.caption_dataset import CaptionDataset
from cappa_tf.data.sources.class_captions import LabelCaptions
from cappa_tf.data.sources.mixture import Mixture
from cappa_tf.data.tokenizer import Tokenizer, train_tokenizer
from cappa_tf.evaluation.images import EvaluationImages
from cappa_tf.inference.feature_cache import FeatureCache
from cappa_tf.models.vision_encoder import VisionEncoder

SIZE, LENGTH, COUNT = 8, 32, 9
LONG = "is it " * 40
COLOURS = ("red", "green", "blue")
ANSWER = "answer: {question}"
TOO_LONG = f"prompt of more than {LENGTH - 2} tokens"


def _image(i):
    file = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (20 * i, 9, 7)).save(file, "PNG")
    return file.getvalue()


def _asked(i):
    """An image with two questions, of which the first has two answers."""
    pairs = [
        (f"what colour is {i}", COLOURS[i % 3]),
        (f"what colour is {i}", "dark"),
        (f"how many {i}", f"{i}"),
    ]
    if i == 3:  # One of its questions is too long.
        pairs[2] = (LONG, "no")
    if i == 4:  # All of them are.
        pairs = [(LONG, "no"), (LONG, "yes")]
    if i == 5:  # A caption without a question.
        pairs = [("", "a square")]
    if i == 6:  # A question without an answer.
        pairs[0] = (pairs[0][0], " ")
    asked, answers = map(list, zip(*pairs))
    return schema.Example(f"k{i}", _image(i), answers, i % 3, asked)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Questions in asked/, captions of the same images in plain/."""
    path = tmp_path_factory.mktemp("prompts")
    asked = [_asked(i) for i in range(COUNT)]
    plain = [
        schema.Example(f"p{i}", _image(i), [f"a square {i}"], i % 3)
        for i in range(COUNT)
    ]
    classes = {"classes": list(COLOURS)}
    schema.write_dataset({"train": asked}, path / "asked", "asked", 2)
    schema.write_dataset({"train": plain}, path / "plain", "p", 2, classes)
    texts = [text for e in asked for text in (*e.captions, *e.prompts) if text]
    texts += ["a square", "caption: answer: classify:", *COLOURS]
    texts += [f"{i} {i}" for i in range(COUNT)]
    train_tokenizer(texts * 2, path / "tokenizer.model", 120)
    return path


def make(folder, source="asked", **options):
    path = folder / source if isinstance(source, str) else source
    return CaptionDataset(
        path,
        "train",
        Tokenizer(folder / "tokenizer.model", LENGTH),
        SIZE,
        **{"batch_size": 4, "max_skipped_fraction": 0.5, **options},
    )


def texts_of(data, batch):
    """A list of {(prompt, answer)} of each example that is not padding."""
    real = batch.get("_mask", np.ones(len(batch["labels"]))) > 0
    found = []
    good = np.flatnonzero(real)
    for labels, lengths in zip(
        batch["labels"][good], batch["prompt_lengths"][good]
    ):
        pairs = set()
        for row, length in zip(labels, lengths):
            prompt, answer = data.tokenizer.detokenize([row[:length]]) + (
                data.tokenizer.detokenize([row[length:]])
            )
            pairs.add((prompt, answer))
            assert (row[length:] == 1).sum() == 1  # It ends.
        found.append(pairs)
    return found


def pairs_of(example, template):
    """What of an example can be used."""
    return {
        (template.replace("{question}", question), answer)
        for question, answer in zip(example.prompts, example.captions)
        if question not in ("", LONG) and answer.strip()
    }


@pytest.fixture(scope="module")
def cached(folder, tmp_path_factory):
    """The data set whose images are replaced by cached features."""
    encoder = VisionEncoder(
        hidden_dim=8,
        num_layers=1,
        num_heads=2,
        mlp_dim=8,
        patch_size=4,
        image_size=SIZE,
    )
    encoder.build()

    def open_cached(**options):
        data = make(folder, prompt=ANSWER, **options)
        where = str(tmp_path_factory.getbasetemp() / "prompt_features")
        return data.with_features(
            FeatureCache.open_or_compute(encoder, data, folder=where)
        )

    return open_cached


@pytest.mark.parametrize("cache", ["stream", "images", "features"])
def test_labels_are_a_prompt_and_its_answer(folder, cached, cache):
    options = {"captions_per_image": 2, "length_buckets": [20]}
    if cache == "features":
        data = cached(**options)
    else:
        data = make(folder, prompt=ANSWER, cache=cache, **options)
    seen = {}
    for batch in data.train(3).take(12).as_numpy_iterator():
        assert batch["labels"].shape[:2] == (3, 2)
        assert batch["prompt_lengths"].dtype == np.int32
        for pairs in texts_of(data, batch):
            for pair in pairs:
                seen[pair] = seen.get(pair, 0) + 1
    # Four epochs: each question of each image, but those left out.
    wanted = {p for i in range(COUNT) for p in pairs_of(_asked(i), ANSWER)}
    assert set(seen) == wanted
    # At least, as batches are prepared ahead.
    assert data.skipped[TOO_LONG] >= 8 and data.skipped["no question"] >= 4


@pytest.mark.parametrize("cache", ["stream", "features"])
def test_evaluation_gives_each_prompt_beside_its_caption(folder, cached, cache):
    if cache == "features":
        data = cached(captions_per_image="all")
    else:
        data = make(folder, prompt=ANSWER, captions_per_image="all")
    found, counted = [], 0
    for batch in data.evaluate(4).as_numpy_iterator():
        found += texts_of(data, batch)
        counted += int(batch["_mask"].sum())
    examples = [e for e in data.read_examples() if e.captions]
    assert counted == len(examples) == COUNT - 2
    for pairs, example in zip(found, examples, strict=True):
        assert pairs == set(zip(example.prompts, example.captions))
        assert pairs == pairs_of(_asked(int(example.key[1:])), ANSWER)
    assert data.skipped == {TOO_LONG: 2, "no question": 1}


def test_prompts_of_a_record_need_no_template(folder):
    data = make(folder)
    assert data.prompts == ("{question}",)
    batch = next(data.evaluate(1).as_numpy_iterator())
    assert texts_of(data, batch) == [{("what colour is 0", "red")}]
    # A constant one is for captions that answer no question, too.
    data = make(folder, prompt="caption:")
    assert data.prompts == ("caption:",)
    (batch,) = data.evaluate(COUNT).as_numpy_iterator()
    assert batch["_mask"].sum() == COUNT
    assert {p for s in texts_of(data, batch) for p, _ in s} == {"caption:"}


def test_data_without_prompts_is_as_before(folder):
    data = make(folder, "plain")
    assert data.prompts == ()
    (batch,) = data.evaluate(COUNT).as_numpy_iterator()
    assert set(batch) == {"image", "labels", "index", "_mask"}
    with pytest.raises(ValueError, match="plain.*has no questions"):
        make(folder, "plain", prompt=ANSWER).train()


@pytest.mark.parametrize("cache", ["stream", "images"])
def test_each_source_of_a_mixture_has_its_prompt(folder, cache):
    classes = LabelCaptions(folder / "plain", templates=["{}"])
    mixture = Mixture(
        [folder / "asked", folder / "plain", classes],
        [1, 1, 1],
        prompts=[ANSWER, "caption:", "classify:"],
    )
    data = make(folder, mixture, cache=cache)
    assert data.prompts == (ANSWER, "caption:", "classify:")
    seen = set()
    for batch in data.train(9).take(30).as_numpy_iterator():
        seen |= set.union(*texts_of(data, batch))
    wanted = {p for i in range(COUNT) for p in pairs_of(_asked(i), ANSWER)}
    wanted |= {("caption:", f"a square {i}") for i in range(COUNT)}
    wanted |= {("classify:", colour) for colour in COLOURS}
    assert seen == wanted
    examples = list(data.read_examples())
    assert len(examples) == 3 * COUNT
    assert examples[COUNT].prompts == ["caption:"]


def test_evaluators_read_prompts_as_text(folder):
    data = EvaluationImages(folder / "asked", "train", prompt=ANSWER)
    tokenizer = Tokenizer(folder / "tokenizer.model", LENGTH)
    predictor = types.SimpleNamespace(
        tokenizer=tokenizer,
        preprocessing=make(folder).preprocessing,
        batch_size=8,
    )
    examples = [e for _, some in data.captioned(predictor) for e in some]
    first = schema.questions(examples[0])
    assert [q.text for q in first] == [
        "answer: what colour is 0",
        "answer: how many 0",
    ]
    assert first[0].answers == ["red", "dark"]


def test_prompts_are_matched_with_templates():
    templates = ("caption:", "answer: {question}", "read (all) a.b?")
    for good in (
        "caption:",
        "Answer: what colour",
        "READ (all) a.b?",
        "answer: two\nlines",
    ):
        assert prompts.matches(templates, good)
        assert tf.strings.regex_full_match(good, prompts.pattern(templates))
    for bad in ("", "caption", "answer:", "read (all) axb?", "what colour"):
        assert not prompts.matches(templates, bad)
        assert not tf.strings.regex_full_match(bad, prompts.pattern(templates))
    assert prompts.matches(("{question}",), "anything")
    assert prompts.matches(("", "caption:"), "")


@pytest.mark.parametrize("template", ["{", "a {b}", "{question}{question}", 3])
def test_a_template_is_checked(folder, template):
    with pytest.raises(ValueError, match="at most one {question}"):
        make(folder, prompt=template)
    with pytest.raises(ValueError, match="`prompts` must be text"):
        Mixture([folder / "asked"], [1], prompts=[template])
