"""Prompts as strings: what a predictor answers, scores and refuses."""

import numpy as np
import pytest
import tensorflow as tf
import tiny

from cappa_tf.data.preprocessing import ImagePreprocessing
from cappa_tf.data.schema import Example
from cappa_tf.data.tokenizer import Tokenizer, train_tokenizer
from cappa_tf.evaluation import captioning
from cappa_tf.inference import annotator, prompting
from cappa_tf.inference.attention_maps import attention_maps
from cappa_tf.inference.predictor import Predictor
from cappa_tf.models.captioner import Captioner
from cappa_tf.models.text_decoder import TextDecoder
from cappa_tf.models.vision_encoder import VisionEncoder

LENGTH = 24
TEMPLATES = ("caption:", "answer: {question}")
ASKED = ["answer: red or green", "caption:", "answer: what"]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    """A captioner of random weights that was trained with two prompts."""
    path = str(tmp_path_factory.mktemp("prompting") / "tokenizer.model")
    words = [f"{a} {b}" for a in tiny.WORDS for b in tiny.WORDS]
    words += ["caption: answer: red or green what?"] * 4
    train_tokenizer(words, path, 60)
    tokenizer = Tokenizer(path, LENGTH)
    small = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32}
    model = Captioner(
        VisionEncoder(patch_size=8, image_size=16, **small),
        TextDecoder(tokenizer.vocabulary_size, LENGTH, **small),
        prompts=TEMPLATES,
    )
    model.build()
    random = np.random.RandomState(0)
    for weight in model.trainable_variables:
        weight.assign(random.normal(0, 0.3, weight.shape))
    return Predictor(model, tokenizer, ImagePreprocessing(16), batch_size=4)


@pytest.fixture(scope="module")
def images():
    return np.random.RandomState(1).uniform(-1, 1, (3, 16, 16, 3)).astype("f")


def test_each_image_is_asked_its_own_prompt(predictor, images):
    together = predictor.captions(images, ASKED)
    model, tokenizer = predictor.model, predictor.tokenizer
    for image, prompt, caption in zip(images, ASKED, together):
        ids = tokenizer.encode_prompts([prompt])
        tokens = model.generate(image[None], prompts=ids)["tokens"]
        assert tokenizer.detokenize(tokens) == [caption]
    assert predictor.captions(images[:1], ASKED[:1]) == together[:1]
    other = predictor.captions(images, ["caption:"] * 3)
    assert other[0] != together[0] and other[1] == together[1]
    (row,) = predictor.make_decoder(prompt=ASKED[0]).decode(images[:1], ["k"])
    assert (row.caption, row.prompt) == (together[0], ASKED[0])


@pytest.mark.parametrize("kind", ["autoregressive", "parallel", "blind"])
def test_scores_are_those_of_answers_to_prompts(predictor, images, kind):
    texts = [["red", "green square"], ["blue"], ["left circle", "above", "red"]]
    found = predictor.score_captions(images, texts, kind, ASKED)
    model, tokenizer = predictor.model, predictor.tokenizer
    for image, own, prompt, scores in zip(images, texts, ASKED, found):
        ids, lengths = tokenizer.with_prompts([prompt] * len(own), own)
        expected = model.score_captions(
            None if kind == "blind" else image[None],
            ids[None],
            parallel=kind == "parallel",
            prompt_lengths=lengths[None],
        )
        np.testing.assert_allclose(scores, expected[0], rtol=1e-4)
    # The same texts for all images.
    every = predictor.score(images, texts[2], kind, prompt=ASKED[2])
    np.testing.assert_allclose(every[2], found[2], rtol=1e-4)
    lists = [[prompt] * len(own) for prompt, own in zip(ASKED, texts)]
    again = predictor.score_captions(images, texts, kind, lists)
    np.testing.assert_array_equal(np.concatenate(again), np.concatenate(found))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "needs one: 'caption:', 'answer: {question}'.*no prompt"),
        ("red or green", "other prompts: 'caption:'.*'red or green'"),
        ("answer: " + "red " * 40, "at most 22 tokens.*Received: 4. tokens"),
    ],
)
def test_a_prompt_it_does_not_know_is_refused(
    predictor, images, prompt, message
):
    prompts = prompt and [prompt] * 3
    for ask in (
        lambda: predictor.captions(images, prompts),
        lambda: predictor.score_captions(images, [["red"]] * 3, None, prompts),
        lambda: predictor.score(images, ["red"], prompt=prompt),
    ):
        with pytest.raises(ValueError, match=message):
            ask()


def test_a_model_without_prompts_refuses_them(tmp_path, images):
    path, size = tiny.vocabulary(tmp_path)
    model = tiny.make_model(size)
    model.build()
    plain = Predictor(model, Tokenizer(path, 8), ImagePreprocessing(16), 4)
    with pytest.raises(ValueError, match="trained without prompts.*'caption:'"):
        plain.captions(images, ["caption:"] * 3)
    assert len(plain.captions(images)) == 3
    with pytest.raises(
        ValueError, match=r"\[2, 1\] prompts for \[1, 1\] texts"
    ):
        plain.score_captions(images[:2], [["a"], ["b"]], None, [["a"] * 2, "b"])


def test_ids_are_padded_to_few_lengths(predictor):
    model, tokenizer = predictor.model, predictor.tokenizer
    ids = prompting.encode(model, tokenizer, ASKED, 5)
    assert ids.shape[0] == 5 and ids.shape[1] % 8 == 0
    assert not ids[3:].any()
    for row, prompt in zip(ids, ASKED):
        assert row[row != 0].tolist() == tokenizer.encode(prompt)[0]


def test_evaluation_asks_each_question_of_an_image(predictor, images):
    examples = [
        Example(
            "a",
            b"",
            ["red", "dark red", "square"],
            prompts=["answer: red", "answer: red", "answer: what"],
        ),
        Example("b", b"", ["left"], prompts=["caption:"]),
        *(
            Example(f"c{i}", b"", ["left"], prompts=[f"answer: {i}"])
            for i in range(1)
        ),
    ]
    rows = captioning.caption_batch(
        predictor.decoder, tf.constant(images), examples
    )
    assert [(i, row.prompt, row.references) for i, row in rows] == [
        (0, "answer: red", ["red", "dark red"]),
        (0, "answer: what", ["square"]),
        (1, "caption:", ["left"]),
        (2, "answer: 0", ["left"]),
    ]
    said = predictor.captions(
        images[[0, 0, 1, 2]], [row.prompt for _, row in rows]
    )
    assert [row.caption for _, row in rows] == said
    nll, tokens = predictor.decoder.reference_nll(
        images,
        [example.captions for example in examples],
        prompts=captioning.prompts_of(examples),
    )
    scores = predictor.score_captions(
        images,
        [example.captions for example in examples],
        prompts=[example.prompts for example in examples],
    )
    assert -np.concatenate(scores).sum() == pytest.approx(nll, rel=1e-4)
    texts = [c for example in examples for c in example.captions]
    assert tokens == predictor.count_tokens(texts).sum()


def test_a_caption_without_room_for_its_end_has_no_padding(predictor, images):
    prompt = "answer: " + " ".join(["red"] * 14)
    (row,) = predictor.decoder.decode(images[:1], ["k"], prompts=[prompt])
    asked = int(predictor.tokenizer.count_tokens([prompt])[0])
    assert LENGTH - asked < 8
    pad = predictor.tokenizer.pad_id
    assert 0 < len(row.tokens) <= LENGTH - asked and pad not in row.tokens
    assert len(row.pieces) == len(row.probabilities) == len(row.tokens)
    assert max(row.probabilities) < 1.0
    (words,) = attention_maps(
        predictor.model, predictor.tokenizer, images[:1], [row]
    )
    assert [word for word, _ in words] == [word for word, _ in row.words]


def test_annotated_captions_answer_the_questions_of_their_records(
    predictor, images
):
    """A question that leaves no room has no score; a record of none is bad."""
    long = "what " * LENGTH
    examples = [
        Example("a", b"", ["red", "blue"], None, ["what", "red or green"]),
        Example("b", b"", ["red", "blue"], None, [long, "what"]),
        Example("c", b"", ["red"], None, [long]),
        Example("d", b"", [" "], None, ["what"]),
    ]
    options = annotator.AnnotationOptions(
        write="scores", batch_size=4, prompt="answer: {question}"
    )
    batch = [
        (annotator.Annotation(example.key, example, {}), image)
        for example, image in zip(examples, [*images, images[0]])
    ]
    annotator.Annotator(predictor, options).annotate(batch)
    (a, b, c, d), _ = zip(*batch)
    (expected,) = predictor.score_captions(
        images[:1],
        [["red", "blue"]],
        prompts=[["answer: what", "answer: red or green"]],
    )
    np.testing.assert_allclose(a.values["scores"], expected, rtol=1e-4)
    assert np.isfinite(b.values["scores"]).tolist() == [False, True]
    assert (c.example, c.error) == (None, "no prompt that the model answers")
    assert (d.example, d.error, d.name) == (None, "no caption", "d")
