"""Evaluators ask a model for its capabilities, whatever its method."""

import pytest
import scoring
import tensorflow as tf
import tiny

from cappa_tf.evaluation.caption_report import Captions
from cappa_tf.evaluation.compositional.benchmarks import Aro
from cappa_tf.evaluation.evaluate import evaluate
from cappa_tf.evaluation.fewshot import Fewshot
from cappa_tf.evaluation.perplexity import Perplexity
from cappa_tf.evaluation.retrieval import Retrieval
from cappa_tf.evaluation.zero_shot import ZeroShot
from cappa_tf.inference.predictor import Predictor


def _encode(images, training):
    del training
    return {"pre_logits": tf.reduce_mean(images, axis=[1, 2])}


class Contrastive(scoring.Knowing):
    """In place of a model of image-text similarity: cosine scores only."""

    score_kinds = ("cosine",)
    can_generate = False

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.parts = {"vision_encoder": _encode}


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    tokenizer = tiny.Data(tmp_path_factory.mktemp("vocabulary")).tokenizer
    return Predictor(
        Contrastive(tokenizer), tokenizer, scoring.PREPROCESSING, 4
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colours")
    return scoring.write_colours(folder, count=12)


def test_it_says_what_it_can(predictor):
    assert predictor.capabilities == ("features", "cosine")
    assert predictor.can("score") and not predictor.can("blind")


@pytest.mark.parametrize(
    "make, perfect",
    [
        (
            lambda f: ZeroShot(f / "labels", templates=["{} square"]),
            "top_1",
        ),
        (lambda f: Fewshot(f / "labels", shots=[2], num_seeds=1), "2_shot"),
        (
            lambda f: Retrieval(f / "captions", limit=3),
            "image_to_text/recall@1",
        ),
    ],
)
def test_scores_of_any_kind_and_features_are_enough(
    predictor, folder, make, perfect
):
    ((_, report),) = evaluate(predictor, [make(folder)])
    assert report.metrics[perfect] == 1.0
    # There is no decoder to score texts without an image.
    assert not [name for name in report.metrics if "blind" in name]


def test_choices_have_the_score_that_there_is(predictor, folder, tmp_path):
    (tmp_path / "choices.json").write_text(
        '[{"image_path": "0.png", "true_caption": "red square", '
        '"false_caption": "blue square"}]'
    )
    report = Aro(tmp_path / "choices.json", folder).evaluate(predictor)
    assert report.metrics["cosine/macro"] == 1.0
    assert not [name for name in report.metrics if "blind" in name]


@pytest.mark.parametrize(
    "make, lacks",
    [
        (lambda: Perplexity("nowhere"), "autoregressive"),
        (lambda: Captions("nowhere"), "generate"),
        (lambda: ZeroShot("nowhere", parallel=True), "parallel"),
        (lambda: Retrieval("nowhere", parallel=True), "parallel"),
    ],
)
def test_what_is_lacking_is_said_before_data_is_read(predictor, make, lacks):
    evaluator = make()
    named = rf"{type(evaluator).__name__}.*that can: {lacks}\. .*Contrastive"
    with pytest.raises(ValueError, match=named):
        evaluator.evaluate(predictor)


def test_an_encoder_alone_gives_features_only():
    alone = Predictor(_encode, None, scoring.PREPROCESSING)
    assert alone.capabilities == ("features",)
    with pytest.raises(ValueError, match="ZeroShot.*no tokenizer"):
        ZeroShot("nowhere").evaluate(alone)
