"""The caption report: each image's CIDEr, and the worst and best."""

import numpy as np
import pytest
import scoring

from cappa_tf.evaluation import caption_metrics
from cappa_tf.evaluation.caption_report import Captions
from cappa_tf.models.sampling import BeamSearch


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    pytest.importorskip("pycocoevalcap", reason="pip install '.[test]'")
    folder = tmp_path_factory.mktemp("colours")
    scoring.write_colours(folder)
    predictor = scoring.tiny_predictor(folder)
    # A caption generator that gets red and green right, and blue wrong.
    texts = {0: "red square", 1: "green square", 2: "left above"}

    def generate(images, options):
        assert not options
        tokens = [
            predictor.tokenizer([texts[int(image.mean((0, 1)).argmax())]])[0]
            for image in images.numpy()
        ]
        tokens = np.stack(tokens)
        return {
            name: _Tensor(value)
            for name, value in (
                ("tokens", tokens),
                ("log_probs", np.where(tokens != 0, -0.5, 0.0)),
            )
        }

    predictor.decoder._generate = generate
    evaluator = Captions(folder / "captions", meteor=False, sheet_images=2)
    evaluator.open()
    return evaluator.evaluate(predictor)


class _Tensor:
    def __init__(self, value):
        self._value = value

    def numpy(self):
        return self._value


def test_the_corpus_cider_is_the_mean_of_the_images(report):
    ciders = [row["cider"] for row in report.rows]
    assert report.metrics["cider"] == pytest.approx(np.mean(ciders))
    assert report.metrics["num_images"] == 6
    assert report.metrics["exact_match"] == pytest.approx(2 / 3)
    assert {f"bleu_{n}" for n in range(1, 5)} | {"rouge_l"} <= {*report.metrics}
    assert "meteor" not in report.metrics
    assert any("METEOR" in line for line in report.lines)


def test_rows_say_what_was_said(report):
    row = report.rows[2]
    assert row["key"].endswith("2.png") and row["caption"] == "left above"
    assert row["references"] == ["blue square", "square blue"]
    assert row["cider"] == 0.0
    assert row["log_likelihood"] == -0.5 * row["tokens"]


def test_worst_and_best(report):
    worst = {row.caption for row in report.sheets["worst"][1]}
    best = {row.caption for row in report.sheets["best"][1]}
    assert worst == {"left above"} and "left above" not in best
    assert all(row.image for row in report.sheets["worst"][1])


def test_captions_are_searched_by_the_given_sampler(tmp_path, monkeypatch):
    pytest.importorskip("pycocoevalcap", reason="pip install '.[test]'")
    scoring.write_colours(tmp_path)
    predictor = scoring.tiny_predictor(tmp_path)
    made, make = [], predictor.make_decoder
    monkeypatch.setattr(
        predictor, "make_decoder", lambda **x: made.append(x) or make(**x)
    )
    options = {"meteor": False, "sheet_images": 0}
    sampler = BeamSearch(num_beams=3, length_penalty=0.0)
    beam = Captions(tmp_path / "captions", sampler=sampler, **options)
    found, again = (beam.evaluate(predictor).rows for _ in range(2))
    assert found == again
    # Once for both, as a decoder is traced.
    assert made == [{"sampler": sampler}]
    greedy = Captions(tmp_path / "captions", **options).evaluate(predictor).rows
    better = [
        x["log_likelihood"] > y["log_likelihood"] for x, y in zip(found, greedy)
    ]
    assert any(better)
    with pytest.raises(ValueError, match="`sampler` must be"):
        Captions(tmp_path / "captions", sampler="beam")


@pytest.mark.slow  # The Java program reads a large table first.
def test_meteor_where_java_is():
    pytest.importorskip("pycocoevalcap", reason="pip install '.[test]'")
    if not caption_metrics.has_java():
        pytest.skip("no java: apt-get install default-jre-headless")
    scores = caption_metrics.score_captions(
        {0: "a red ball on grass"}, {0: ["a red ball on grass"]}, meteor=True
    )
    assert scores.corpus["meteor"] > 0.99


def test_meteor_without_java(monkeypatch):
    pytest.importorskip("pycocoevalcap", reason="pip install '.[test]'")
    monkeypatch.setattr(caption_metrics, "has_java", lambda: False)
    with pytest.raises(ValueError, match="needs Java"):
        caption_metrics.score_captions({0: "a"}, {0: ["a"]}, meteor=True)
