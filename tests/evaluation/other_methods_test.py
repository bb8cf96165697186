"""Evaluators ask a model for its capabilities, whatever its method."""

import json

import pytest
import scoring
import tiny

from cappa_tf.evaluation.caption_report import Captions
from cappa_tf.evaluation.compositional.benchmarks import Aro, SugarCrepe
from cappa_tf.evaluation.embedding_geometry import EmbeddingGeometry
from cappa_tf.evaluation.evaluate import evaluate
from cappa_tf.evaluation.fewshot import Fewshot
from cappa_tf.evaluation.human_judgments import Judgments
from cappa_tf.evaluation.perplexity import Perplexity
from cappa_tf.evaluation.retrieval import Retrieval
from cappa_tf.evaluation.zero_shot import ZeroShot
from cappa_tf.inference.predictor import Predictor


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    tokenizer = tiny.Data(tmp_path_factory.mktemp("vocabulary")).tokenizer
    return Predictor(
        scoring.KnowingEmbeddings(tokenizer),
        tokenizer,
        scoring.PREPROCESSING,
        4,
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
        # Without a limit all six: each has a twin of its colour, a tie.
        (lambda f: Retrieval(f / "captions"), "text_to_image/recall@5"),
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


def test_zero_shot_by_cosine_takes_the_middle_of_canonical_prompts(folder):
    """Each text is embedded once, "red, above" by its first name."""
    tokenizer = tiny.Data(folder).tokenizer
    model = scoring.KnowingEmbeddings(tokenizer)
    predictor = Predictor(model, tokenizer, scoring.PREPROCESSING, 4)
    evaluator = ZeroShot(
        folder / "labels",
        class_names=["red, above", "green", "blue"],
        templates=["{} Square!", "square {}", "red {}"],
    )
    assert evaluator.evaluate(predictor).metrics["top_1"] == 1.0
    # Two batches of images, and another evaluation: nine texts all the same.
    evaluator.evaluate(predictor)
    assert model.texts == 9
    evaluator = ZeroShot(folder / "labels", templates=["{}"])
    evaluator.evaluate(predictor)
    assert model.texts == 12


class Both(scoring.Knowing, scoring.KnowingEmbeddings):
    """In place of a captioner trained with a contrastive loss, too."""

    score_kinds = (*scoring.Knowing.score_kinds, "cosine")

    def __init__(self, tokenizer):
        scoring.KnowingEmbeddings.__init__(self, tokenizer)
        scoring.Knowing.__init__(self, tokenizer)


def test_a_model_of_both_kinds_has_both_figures(folder):
    """Likelihoods come first and are compared with the blind decoder."""
    tokenizer = tiny.Data(folder).tokenizer
    predictor = Predictor(Both(tokenizer), tokenizer, scoring.PREPROCESSING, 4)
    templates = ["{} square"]
    found = ZeroShot(folder / "labels", templates=templates).evaluate(predictor)
    names = ("top_1", "minus_blind/top_1", "cosine/top_1")
    assert [found.metrics[name] for name in names] == [1.0, 1.0, 1.0]
    found = Retrieval(folder / "captions", limit=3).evaluate(predictor).metrics
    for kind in ("", "minus_blind/", "cosine/"):
        assert found[f"{kind}image_to_text/recall@1"] == 1.0
    assert found["cosine/text_to_image/recall@1"] == 1.0


def test_judgments_by_cosine(predictor, tmp_path):
    pytest.importorskip("scipy", reason="pip install '.[test]'")
    scoring.write_judgments(tmp_path)
    report = Judgments(tmp_path).evaluate(predictor)
    assert report.metrics["tau_c"] > 0.5
    assert {*report.metrics} == {"tau_b", "tau_c"}


def test_scenes_and_sugar_crepe_by_cosine(folder, tmp_path, predictor):
    items = {"0": ("red square", "blue square"), "1": ("red", "Red")}
    names = ("caption", "negative_caption")
    content = {
        number: {"filename": "0.png", **dict(zip(names, texts))}
        for number, texts in items.items()
    }
    (tmp_path / "swap_att.json").write_text(json.dumps(content))
    report = SugarCrepe(tmp_path, folder).evaluate(predictor)
    # Equal tokens are a tie to the last bit, and lost.
    assert report.metrics["cosine/micro"] == 1 / 2
    assert report.details["ties"]["cosine"] == 1 / 2


def test_geometry_of_a_model_that_knows(predictor, folder):
    report = EmbeddingGeometry(folder / "captions").evaluate(predictor)
    assert report.metrics["cosine/pairs"] == pytest.approx(1.0, abs=0.02)
    assert report.metrics["alignment"] < 0.02
    assert report.metrics["modality_gap"] < 0.1
    # Two thirds of the other images show another colour, a sixth of them less
    # the image itself the same.
    assert report.metrics["cosine/non_pairs"] == pytest.approx(0.25, abs=0.1)


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
    named = rf"{type(evaluator).__name__}.*that can: {lacks}\. .*predicts no"
    with pytest.raises(ValueError, match=named):
        evaluator.evaluate(predictor)


def test_an_encoder_alone_gives_features_only():
    encode = scoring.KnowingEmbeddings(None).parts["vision_encoder"]
    alone = Predictor(encode, None, scoring.PREPROCESSING)
    assert alone.capabilities == ("features",)
    with pytest.raises(ValueError, match="ZeroShot.*no tokenizer"):
        ZeroShot("nowhere").evaluate(alone)
