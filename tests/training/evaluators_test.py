"""Evaluators run between steps and at the end, and report metrics."""

import json
import pathlib

import pytest
import scoring
import tensorflow as tf
import tiny

from cappa_tf.evaluation.compositional.benchmarks import SugarCrepe
from cappa_tf.evaluation.embedding_geometry import EmbeddingGeometry
from cappa_tf.evaluation.evaluator import Evaluator, Report
from cappa_tf.evaluation.fewshot import Fewshot
from cappa_tf.evaluation.retrieval import Retrieval
from cappa_tf.evaluation.zero_shot import ZeroShot


class Steps(Evaluator):
    """Notes how often it ran and what a text scores without an image."""

    def __init__(self, name="steps"):
        super().__init__(name)
        self.blind = []

    def evaluate(self, predictor):
        self.blind.append(float(predictor.blind(["red circle"])[0]))
        return Report({"blind": self.blind[-1]}, [])


def scalars(folder):
    """Dict (step, name) -> value of all that TensorBoard would show."""
    found = {}
    for path in pathlib.Path(folder, "tensorboard").glob("events*"):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                number = tf.make_ndarray(value.tensor)
                found[event.step, value.tag] = number.item(0)
    return found


def test_every_n_steps_and_at_the_end(tmp_path):
    steps = Steps()
    result = tiny.run(
        tmp_path,
        workdir=str(tmp_path / "run"),
        total_steps=5,
        steps_per_loop=3,
        evaluators=[steps],
        evaluator_steps=2,
    )
    # After steps 2 and 4, and at the end, with other weights each time.
    assert len(set(steps.blind)) == len(steps.blind) == 3
    name = "evaluation/steps/blind"
    assert result[name] == steps.blind[-1]
    assert {(2, name), (4, name), (5, name)} <= {*scalars(tmp_path / "run")}
    assert name in (tmp_path / "run" / "train.log").read_text()
    saved = json.loads((tmp_path / "run" / "results.json").read_text())
    assert saved[name] == steps.blind[-1]


def test_real_ones_on_a_model_in_training(tmp_path):
    """Embeddings are those of the weights of the step."""
    folder = scoring.write_colours(tmp_path / "colours", count=12)
    size = tiny.vocabulary(tmp_path)[1]
    result = tiny.run(
        tmp_path,
        workdir=str(tmp_path / "run"),
        model=lambda: tiny.make_contrastive(size),
        evaluator_steps=2,
        evaluators=[
            Fewshot(folder / "labels", shots=[1], num_seeds=1),
            ZeroShot(folder / "labels", name="colours"),
            Retrieval(folder / "captions"),
            EmbeddingGeometry(folder / "captions"),
        ],
    )
    assert 0 <= result["evaluation/fewshot/1_shot"] <= 1
    assert 0 <= result["evaluation/colours/top_1"] <= 1
    assert result["evaluation/retrieval/image_to_text/recall@10"] <= 1
    found = [
        value
        for (_, name), value in sorted(scalars(tmp_path / "run").items())
        if name == "evaluation/geometry/uniformity/texts"
    ]
    assert len(set(found)) == len(found) == 2
    last = result["evaluation/geometry/uniformity/texts"]
    assert found[-1] == pytest.approx(last)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"evaluators": [3]}, "Received: 3"),
        ({"evaluators": [Steps(), Steps()]}, "own `name`"),
        ({"evaluator_steps": 0}, "evaluator_steps=0"),
        ({"evaluators": [SugarCrepe("none", "none")]}, "SugarCrepe must be"),
    ],
)
def test_what_cannot_run_stops_the_run_before_it_trains(
    tmp_path, overrides, message
):
    workdir = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        tiny.run(tmp_path, workdir=str(workdir), **overrides)
    assert not (workdir / "checkpoints").exists()
