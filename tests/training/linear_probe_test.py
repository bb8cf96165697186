"""Linear probe: chosen without the test, refitted to all of train."""

import json
import os
import pathlib

import numpy as np
import pytest
from labelled import SIDE, keras_model, write

from cappa_tf.inference.predictor import Predictor
from cappa_tf.models.encoder_adapter import EncoderAdapter
from cappa_tf.training import linear_probe
from cappa_tf.training.linear_probe import SweepSettings, hold_out

LABELS = [0, 1, 3] * 12  # No image of class 2.
FEW = SweepSettings(weight_decays=[0.01, 0.3])


@pytest.fixture(scope="module", name="encoder")
def _encoder():
    encoder = EncoderAdapter(keras_model(), name="vision_encoder")
    encoder.build()
    return encoder


@pytest.fixture(scope="module", name="data")
def _data(tmp_path_factory):
    return write(
        tmp_path_factory.mktemp("data") / "data",
        {"train": [*LABELS, None], "test": [3, 1, 0, 0], "dev": [0, 1, 3]},
        classes=["a", "b", "none", "d"],
    )


@pytest.fixture(scope="module", name="probed")
def _probed(encoder, data, tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("probe"))
    called = []
    found = linear_probe.linear_probe(
        encoder, data, workdir, sweep=FEW, on_start=called.append
    )
    assert called == [workdir]
    return workdir, found


def _read(workdir, name):
    return pathlib.Path(workdir, name).read_text()


def test_the_result_is_a_run_that_opens(probed, encoder):
    workdir, found = probed
    assert found == json.loads(_read(workdir, "results.json"))
    assert found["top_1"] == 1.0 and "top_5" not in found
    assert found["chosen"]["weight_decay"] in (0.01, 0.3)
    assert found["held_out"] == 0.2 and found["compared_on"] == 6
    assert [row["weight_decay"] for row in found["sweep"]] == [0.3, 0.01]
    assert found["examples"] == {"train": 36, "test": 4}
    assert found["skipped"] == {"train": {"no label": 1}, "test": {}}
    predictor = Predictor.open(workdir)
    images = np.random.default_rng(0).uniform(-1, 1, (2, SIDE, SIDE, 3))
    images = images.astype(np.float32)
    np.testing.assert_allclose(
        predictor.features(images), encoder(images)["pre_logits"], atol=1e-5
    )
    assert predictor.class_probabilities(images).shape == (2, 4)
    log = _read(workdir, "train.log")
    assert "no training image of 1 of 4 classes" in log and "2 none" in log
    assert "skipped in train: 1 x no label" in log


def test_a_split_for_it_chooses_the_setting(probed, encoder, data):
    """And the features are there."""
    workdir, _ = probed
    found = linear_probe.linear_probe(
        encoder, data, workdir, eval_split="dev", sweep=FEW
    )
    assert found["held_out"] is None and found["compared_on"] == 3
    log = _read(workdir, "train.log")
    assert log.count("train: 37 x [8] float32, read from") == 1


def test_the_choice_never_sees_the_test(encoder, data, tmp_path, monkeypatch):
    """Other test labels change nothing but the figures of the test."""
    seen = []
    choose = linear_probe._choose_and_fit

    def spy(found, *args):
        found["test"].labels[:] = 2
        seen.append(choose(found, *args))
        return seen[-1]

    run = linear_probe.linear_probe
    first = run(encoder, data, str(tmp_path), sweep=FEW)
    monkeypatch.setattr(linear_probe, "_choose_and_fit", spy)
    other = run(encoder, data, str(tmp_path), sweep=FEW)
    assert (first["top_1"], other["top_1"]) == (1.0, 0.0)
    for name in ("chosen", "chosen_top_1", "sweep"):
        assert first[name] == other[name]
    assert seen


def test_the_head_is_fitted_to_all_of_train(probed, encoder, data, tmp_path):
    """The chosen decay alone, with nothing held out, gives the same head."""
    _, found = probed
    one = SweepSettings(weight_decays=[found["chosen"]["weight_decay"]])
    alone = linear_probe.linear_probe(encoder, data, str(tmp_path), sweep=one)
    assert alone["nll"] == pytest.approx(found["nll"], rel=1e-2)
    assert alone["top_1"] == found["top_1"]


def test_a_dry_run_reads_and_writes_nothing(encoder, tmp_path, capsys):
    found = linear_probe.linear_probe(
        encoder, "nowhere", str(tmp_path / "run"), sweep=FEW, dry_run=True
    )
    assert found["width"] == 8 and len(found["settings"]) == 2
    assert "features of 8, 2 settings" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_each_class_is_held_out_alike():
    labels = np.repeat([0, 1, 7, 9], [10, 5, 1, 2])
    kept, held_out = hold_out(labels, 0.5, seed=1)
    np.testing.assert_array_equal(
        np.sort([*kept, *held_out]), np.arange(len(labels))
    )
    counts = np.bincount(labels[held_out], minlength=10)
    # Of one example none; of five, two.
    assert counts[[0, 1, 7, 9]].tolist() == [5, 2, 0, 1]
    other = hold_out(labels, 0.5, seed=2)[1]
    assert other.tolist() != held_out.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 3}, "3 according to NUM_CLASSES.*label 3.*'train'"),
        ({"test_split": "odd"}, "4 according to the class names.*label 9.*odd"),
        ({"train_split": "none"}, "no labeled image in split 'none'"),
        ({"train_split": "single"}, "no images to compare.*EVAL_SPLIT"),
    ],
    ids=str,
)
def test_labels_that_cannot_be_used(encoder, tmp_path, options, message):
    splits = {"train": [0, 3, 1, 1], "test": [0, 1], "odd": [9]}
    splits |= {"none": [None, None], "single": [0, 1, 3]}
    data = write(tmp_path / "data", splits, classes=["a", "b", "c", "d"])
    with pytest.raises(ValueError, match=message):
        linear_probe.linear_probe(
            encoder, data, str(tmp_path / "run"), sweep=FEW, **options
        )
    assert not os.path.exists(tmp_path / "run" / "results.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "adam"}, "solver.*lbfgs.*adam"),
        ({"weight_decays": []}, "weight_decays"),
        ({"weight_decays": [-1.0]}, "weight_decays.*-1"),
        ({"learning_rates": [0.0]}, "learning_rates.*> 0"),
        ({"held_out": 1.5}, "held_out"),
    ],
    ids=str,
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        SweepSettings(**options)
