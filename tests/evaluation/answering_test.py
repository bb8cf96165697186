"""Evaluators of questions and of text in images, with and without images."""

import json

import numpy as np
import pytest
import tiny
from PIL import Image

from cappa_tf.data.preprocessing import ImagePreprocessing
from cappa_tf.data.tokenizer import Tokenizer, train_tokenizer
from cappa_tf.evaluation.answering import respond
from cappa_tf.evaluation.ocr import OCR
from cappa_tf.evaluation.vqa import VQA
from cappa_tf.inference.predictor import Predictor
from cappa_tf.models.captioner import Captioner
from cappa_tf.models.text_decoder import TextDecoder
from cappa_tf.models.vision_encoder import VisionEncoder

LENGTH = 32
TEMPLATES = ("read:", "answer: {question}")
COLOURS = {"red": (250, 20, 20), "green": (20, 250, 20), "blue": (20, 20, 250)}


def make_predictor(folder, prompts, **options):
    """A captioner of random weights."""
    path = str(folder / "tokenizer.model")
    words = [f"{a} {b}" for a in tiny.WORDS for b in tiny.WORDS]
    train_tokenizer([*words, "read: answer: is it what colour?"], path, 60)
    tokenizer = Tokenizer(path, LENGTH, **options)
    small = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32}
    model = Captioner(
        VisionEncoder(patch_size=8, image_size=16, **small),
        TextDecoder(tokenizer.vocabulary_size, LENGTH, **small),
        prompts=prompts,
    )
    model.build()
    random = np.random.RandomState(0)
    for weight in model.trainable_variables:
        weight.assign(random.normal(0, 0.3, weight.shape))
    return Predictor(model, tokenizer, ImagePreprocessing(16), batch_size=2)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return make_predictor(tmp_path_factory.mktemp("answering"), TEMPLATES)


@pytest.fixture
def knowing(predictor, monkeypatch):
    """The predictor, which knows the colour of an image, and guesses "no"."""
    asked = []

    def captions(images, prompts=None):
        asked.append((None if images is None else len(images), prompts))
        assert len(prompts) <= predictor.batch_size
        if images is None:
            return ["no"] * len(prompts)
        names = list(COLOURS)
        found = [names[int(i.mean((0, 1)).argmax())] for i in images]
        return [
            ("yes" if name == "red" else "no") if "is it" in prompt else name
            for name, prompt in zip(found, prompts)
        ]

    monkeypatch.setattr(predictor, "captions", captions)
    predictor.asked = asked
    return predictor


@pytest.fixture
def folder(tmp_path):
    """Red, green and blue images with questions, and a fourth without."""
    rows = []
    for i, (name, colour) in enumerate(COLOURS.items()):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{i}.png")
        is_red = "yes" if name == "red" else "no"
        many = [name.title(), *[name] * 8, "grey"]
        rows += [
            {"image": f"{i}.png", "question": "what colour?", "answers": many},
            {"image": f"{i}.png", "question": "is it red?", "answer": is_red},
        ]
    rows.append({"image": "0.png", "key": "mute", "caption": "no question"})
    rows = [{**row, "split": "test"} for row in rows]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "vqa.jsonl").write_text(lines)
    return tmp_path


def test_questions_are_answered_with_each_kind_of_image(folder, knowing):
    evaluator = VQA(folder)
    evaluator.open()
    report = evaluator.evaluate(knowing)
    metrics = report.metrics
    assert metrics["num_questions"] == 6
    assert metrics["exact_match"] == 1.0
    assert metrics["vqa_accuracy"] == 1.0
    # Of the image before, whose colour is another one: green's is red.
    assert metrics["other_image/exact_match"] == pytest.approx(1 / 6)
    assert metrics["blind/exact_match"] == pytest.approx(2 / 6)
    assert metrics["blind/vqa_accuracy"] == 0
    # By people's answers, as the data have no types.
    assert metrics["exact_match/yes/no"] == metrics["exact_match/other"] == 1
    types = report.details["types"]
    assert types["yes/no"]["num_questions"] == 3
    assert types["yes/no"]["blind"] == {"exact_match": pytest.approx(2 / 3)}
    assert set(types["other"]["image"]) == {"exact_match", "vqa_accuracy"}
    assert report.details["prompt"] == "answer: {question}"
    assert report.details["skipped"] == {"no question": 1}
    row = report.rows[2]
    assert row["key"] == "1.png" and row["answer"] == "green"
    assert row["prompt"] == "answer: what colour?"
    assert row["other_image"] == "red" and row["blind"] == "no"
    assert len(row["answers"]) == 10 and row["vqa_accuracy"] == 1
    # Without an image, an answer depends on the question alone.
    blind = [prompts for count, prompts in knowing.asked if not count]
    assert sorted(sum(blind, [])) == [
        "answer: is it red?",
        "answer: what colour?",
    ]
    assert "exact_match by type" in report.lines[0]
    assert report.sheets == {}  # No answer is wrong.


def test_types_of_the_data_and_what_is_left_out(folder, knowing):
    rows = (folder / "vqa.jsonl").read_text().splitlines()[:2]
    long = {"image": "0.png", "question": "red " * 40, "answer": "a"}
    rows = [*map(json.loads, rows), {**long, "split": "test"}]
    rows = [{**row, "question_type": "a kind"} for row in rows]
    (folder / "vqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = VQA(folder, baselines=()).evaluate(knowing)
    assert list(report.details["types"]) == ["a kind"]
    assert set(report.metrics) == {
        "exact_match",
        "vqa_accuracy",
        "num_questions",
    }
    assert report.metrics["num_questions"] == 2
    reasons = report.details["skipped"]
    assert reasons == {"prompt of more than 30 tokens": 1}


def test_the_likeliest_of_a_list(folder, predictor, tmp_path):
    choices = ["red", "green", "blue square", "left"]
    images = np.random.RandomState(0).uniform(-1, 1, (2, 16, 16, 3))
    prompts = ["answer: what colour?", "answer: is it red?"]
    said = respond(predictor, images, prompts, choices)
    blind = respond(predictor, None, prompts, choices)
    for image, prompt, one, other in zip(images, prompts, said, blind):
        for kind, answer in (("autoregressive", one), ("blind", other)):
            scores = predictor.score(image[None], choices, kind, prompt)
            assert answer == choices[scores[0].argmax()]
    path = tmp_path / "answers.txt"
    path.write_text("\n".join([*choices, "", "red"]))
    evaluator = VQA(folder, answers=str(path), baselines=["blind"])
    evaluator.open()
    report = evaluator.evaluate(predictor)
    assert report.details["answers"] == choices
    assert {row["answer"] for row in report.rows} <= set(choices)
    assert {row["blind"] for row in report.rows} <= set(choices)


def test_text_is_read(folder, predictor, monkeypatch):
    rows = [
        {"image": "0.png", "caption": "Total  10"},
        {"image": "1.png", "captions": ["far away", "20"]},
        {"image": "2.png", "caption": "ab"},
    ]
    rows = [{**row, "split": "test"} for row in rows]
    (folder / "vqa.jsonl").unlink()
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = {0: "total 10", 1: "25", 2: "ab"}

    def captions(images, prompts=None):
        assert set(prompts) == {"read:"}
        if images is None:
            return ["a"] * len(prompts)
        return [texts[int(image.mean((0, 1)).argmax())] for image in images]

    monkeypatch.setattr(predictor, "captions", captions)
    evaluator = OCR(folder)
    evaluator.open()
    report = evaluator.evaluate(predictor)
    metrics = report.metrics
    assert metrics["num_texts"] == 3
    assert metrics["exact_match"] == pytest.approx(2 / 3)
    # Of the two texts of an image, the one that is nearer.
    assert metrics["character_error_rate"] == pytest.approx(1 / (8 + 2 + 2))
    assert metrics["word_accuracy"] == pytest.approx(3 / 4)
    assert metrics["blind/character_error_rate"] == pytest.approx(
        (7 + 2 + 1) / 12
    )
    assert metrics["other_image/exact_match"] == 0
    assert report.rows[1] == {
        "key": "1.png",
        "prompt": "read:",
        "text": "20",
        "read": "25",
        "edits": 1,
        "blind": "a",
        "other_image": "total 10",
    }
    assert report.details["lower_case"]
    worst = report.sheets["worst"][1][0]
    assert worst.caption == "25" and worst.image and worst.prompt == "read:"


def test_a_model_reads_without_prompts(folder, tmp_path):
    predictor = make_predictor(tmp_path, (), lowercase=False)
    with pytest.raises(ValueError, match="trained with prompts.*which was not"):
        VQA(folder).evaluate(predictor)
    (folder / "vqa.jsonl").unlink()
    for i in range(3):
        (folder / f"{i}.txt").write_text("square")
    report = OCR(folder, "train").evaluate(predictor)
    assert report.details == {
        "prompt": None,
        "lower_case": False,
        "skipped": {},
    }
    blind = {row["blind"] for row in report.rows}
    assert len(blind) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "answer: {quest}"}, "at most one {question}"),
        ({"baselines": ["deaf"]}, "'blind', 'other_image'"),
        ({"answers": ["yes", " yes"]}, "at least two different answers"),
        ({"answers": "nowhere.txt"}, "a list or a text file.*nowhere"),
        ({"split": "dev"}, r"one of \['test'\]"),
    ],
)
def test_mistakes_are_named_before_anything_is_answered(
    folder, options, message
):
    with pytest.raises(ValueError, match=message):
        VQA(folder, **options).open()


def test_one_of_several_prompts_must_be_chosen(folder, tmp_path):
    prompts = ("answer: {question}", "en: {question}")
    predictor = make_predictor(tmp_path, prompts)
    with pytest.raises(ValueError, match="`prompt` must be one of.*en: "):
        VQA(folder).check(predictor)
    VQA(folder, prompt="en: {question}").check(predictor)


def test_a_split_without_questions_is_refused(folder, predictor):
    (folder / "vqa.jsonl").write_text('{"image": "0.png", "caption": "c"}')
    with pytest.raises(ValueError, match="which has no questions"):
        VQA(folder, "train").evaluate(predictor)
