"""Evaluators run between steps and at the end, and report metrics."""

import json
import pathlib

import pytest
import scoring
import tensorflow as tf
import tiny

from cappa_tf.evaluation.compositional.benchmarks import SugarCrepe
from cappa_tf.evaluation.evaluator import Evaluator, Report
from cappa_tf.evaluation.fewshot import Fewshot
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
    """(step, name) of all that TensorBoard would show."""
    found = set()
    for path in pathlib.Path(folder, "tensorboard").glob("events*"):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            found |= {(event.step, v.tag) for v in event.summary.value}
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
    assert {(2, name), (4, name), (5, name)} <= scalars(tmp_path / "run")
    assert name in (tmp_path / "run" / "train.log").read_text()
    saved = json.loads((tmp_path / "run" / "results.json").read_text())
    assert saved[name] == steps.blind[-1]


def test_real_ones_on_a_model_in_training(tmp_path):
    folder = scoring.write_colours(tmp_path / "colours", count=12)
    result = tiny.run(
        tmp_path,
        workdir=str(tmp_path / "run"),
        evaluators=[
            Fewshot(folder / "labels", shots=[1], num_seeds=1),
            ZeroShot(folder / "labels", name="colours"),
        ],
    )
    assert 0 <= result["evaluation/fewshot/1_shot"] <= 1
    assert 0 <= result["evaluation/colours/top_1"] <= 1


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
