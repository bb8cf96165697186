"""Perplexity is the exponential of the mean nll per token."""

import math

import numpy as np
import pytest
import scoring
import tensorflow as tf

from cappa_tf.data import schema
from cappa_tf.evaluation.images import EvaluationImages
from cappa_tf.evaluation.perplexity import Perplexity


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return scoring.write_colours(tmp_path_factory.mktemp("colours"))


def test_figures_are_those_of_the_losses(folder, tmp_path):
    predictor = scoring.tiny_predictor(tmp_path)
    report = Perplexity(folder / "captions", blind=True).evaluate(predictor)
    nll = tokens = 0.0
    data = EvaluationImages(folder / "captions", "test")
    for images, examples in data.captioned(predictor):
        labels = predictor.tokenizer([e.captions for e in examples])
        batch = {"image": tf.constant(images), "labels": labels}
        losses = predictor.model.compute_losses(batch, training=False)
        nll += float(tf.reduce_sum(losses["nll"]))
        tokens += float(tf.reduce_sum(losses["tokens"]))
    metrics = report.metrics
    assert metrics["nll_per_token"] == pytest.approx(nll / tokens, rel=1e-4)
    assert metrics["perplexity"] == pytest.approx(math.exp(nll / tokens), 1e-3)
    assert metrics["nll_per_caption"] == pytest.approx(nll / 12, rel=1e-4)
    assert metrics["blind/perplexity"] != metrics["perplexity"]
    assert report.details["num_tokens"] == tokens
    summed = sum(sum(row["nll"]["autoregressive"]) for row in report.rows)
    assert summed == pytest.approx(nll, rel=1e-4)
    assert [row["key"] for row in report.rows][0].endswith("0.png")


def test_records_and_folder_give_the_same(folder, tmp_path):
    examples = [
        schema.Example(
            str(i), (folder / f"{i}.png").read_bytes(), ["red", "blue square"]
        )
        for i in range(5)
    ]
    schema.write_dataset({"test": examples}, tmp_path / "records", "colours")
    predictor = scoring.tiny_predictor(tmp_path)
    read = []
    for path in (tmp_path / "records", folder / "captions"):
        batches = EvaluationImages(path, "test", 5).captioned(predictor)
        read.append(np.concatenate([images for images, _ in batches]))
    np.testing.assert_allclose(read[0], read[1], atol=1e-6)
    report = Perplexity(tmp_path / "records", limit=3).evaluate(predictor)
    assert report.details["num_images"] == 3


def test_bad_pictures_are_counted(folder, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    lines = (folder / "captions" / "captions.jsonl").read_text()
    lines = lines.replace("../", f"{folder}/")
    extra = '\n{"image": "bad.jpg", "captions": ["red"], "split": "test"}'
    (tmp_path / "captions.jsonl").write_text(lines + extra)
    data = EvaluationImages(tmp_path, "test")
    list(data.captioned(scoring.tiny_predictor(tmp_path)))
    assert data.skipped == {"image cannot be decoded": 1}
    with pytest.raises(ValueError, match="split='nowhere'"):
        EvaluationImages(tmp_path, "nowhere").open()
