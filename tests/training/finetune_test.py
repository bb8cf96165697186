"""Fine-tuning: a classifier with everything that its recipes switch on."""

import json
import os
import signal
import time

import numpy as np
import processes
import pytest
import small_run
from conftest import two_devices

from cappa_tf.data.images import mixing
from cappa_tf.inference.predictor import Predictor
from cappa_tf.training import train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("labelled"))
    small_run.write_labelled(folder)
    return folder


def run(data, workdir, **overrides):
    """Four steps, with what needs no KerasCV."""
    eval_data = small_run.labelled(
        data, "val", resize="resize_small_central_crop"
    )
    arguments = {
        "augmentations": [mixing.Mixup(0.8)],
        "total_steps": 4,
        "checkpoint_steps": 4,
        "eval_steps": 4,
        "deterministic": False,
        "eval_data": eval_data,
        **overrides,
    }
    return small_run.finetuning_run(data, workdir, **arguments)


def test_two_devices_mix_and_train_as_one(data, tmp_path, monkeypatch):
    one = run(data, tmp_path / "one")
    assert {"top_1", "loss"} <= one.keys()
    # The one of all tests: the collective operations of a second one would
    # have the same numbers.
    monkeypatch.setattr(train, "make_strategy", lambda *_: two_devices())
    run(data, tmp_path / "two", eval_data=None, final_evaluation=False)
    found = [small_run.saved(str(tmp_path / n), 4) for n in ("one", "two")]
    for name, wanted in found[0].items():
        np.testing.assert_allclose(
            found[1][name].astype("float32"),
            wanted.astype("float32"),
            atol=1e-4,
            err_msg=name,
        )
    # Random crops are of the whole image; the model is used as it was judged.
    kept = json.loads((tmp_path / "one" / "preprocessing.json").read_text())
    assert kept["image"]["resize"] == "resize_small_central_crop"
    model = Predictor.open(str(tmp_path / "one")).model
    assert model.vision_encoder.stochastic_depth == 0.3


def _steps(folder):
    path = os.path.join(folder, "train.log")
    if not os.path.exists(path):
        return 0
    with open(path) as file:
        return file.read().count("  loss ")


@pytest.mark.slow
def test_killed_with_all_augmentations_is_never_interrupted(data, tmp_path):
    pytest.importorskip("keras_cv", reason="pip install '.[transfer]'")
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    for folder in (whole, killed):
        process = processes.Process(
            small_run.finetuning_run, data, folder, log=f"{folder}.txt"
        )
        while folder == killed and process.running and _steps(folder) < 8:
            time.sleep(0.001)
        if folder == killed:
            process.kill()
            assert process.wait() == -signal.SIGKILL, process.output
            process = processes.Process(
                small_run.finetuning_run, data, folder, log=f"{folder}.txt"
            )
        assert process.wait() == 0, process.output
    assert "resuming from" in process.output
    wanted, found = small_run.saved(whole), small_run.saved(killed)
    assert wanted.keys() == found.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
