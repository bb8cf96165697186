"""Checkpoints restore a run exactly, or fail with a reason."""

import os

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

from cappa_tf.saving import checkpoints
from cappa_tf.training.construct import build_model
from cappa_tf.training.distribution.strategies import make_strategy
from cappa_tf.training.optimizers.adafactor import Adafactor
from cappa_tf.training.optimizers.adamw import AdamW


def _build(optimizer=Adafactor, seed=0, **kwargs):
    return build_model(
        lambda: tiny.make_model(40, **kwargs),
        optimizer,
        make_strategy("one"),
        seed=seed,
    )


def _weights(model):
    return [v.numpy() for v in model.weights]


@pytest.fixture(scope="module")
def parts():
    return _build()


def test_restores_weights_optimizer_and_state(tmp_path, parts):
    model, optimizer = parts
    optimizer.iterations.assign(7)
    saving = checkpoints.Checkpoints(str(tmp_path), model, optimizer)
    saving.save(7, examples=56, best=1.5)
    other_model, other_optimizer = _build(seed=1)
    other = checkpoints.Checkpoints(str(tmp_path), other_model, other_optimizer)
    assert other.restore()
    assert other.state.values["examples"] == 56
    assert other.state.values["best"] == 1.5
    for a, b in zip(_weights(model), _weights(other_model), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(optimizer.variables, other_optimizer.variables):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_nothing_of_the_model_is_left_out(tmp_path, parts):
    model, optimizer = parts
    saving = checkpoints.Checkpoints(str(tmp_path), model, optimizer)
    saving.save_best(3)
    saved = dict(tf.train.list_variables(saving.best))
    shapes = sorted(shape for name, shape in saved.items() if "VALUE" in name)
    wanted = [list(v.shape) for v in model.weights]
    assert shapes == sorted([*wanted, []])  # and TensorFlow's save counter
    # Built differently, without a `captioner/` before every path.
    config = keras.saving.serialize_keras_object(model)
    other = keras.saving.deserialize_keras_object(config)
    checkpoints.restore_model(saving.best, other)
    for a, b in zip(_weights(model), _weights(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_another_architecture_is_refused_by_name(tmp_path, parts):
    checkpoints.Checkpoints(str(tmp_path), *parts).save(1)
    wider = checkpoints.Checkpoints(str(tmp_path), *_build(hidden_dim=32))
    named = (
        r"of another model.*\n  vision_encoder/patches/kernel: "
        r"\[8, 8, 3, 16\] in the checkpoint, \[8, 8, 3, 32\] in the model"
    )
    with pytest.raises(ValueError, match=named):
        wider.restore()
    adam = checkpoints.Checkpoints(str(tmp_path), *_build(AdamW))
    with pytest.raises(ValueError, match="only in the model"):
        adam.restore()


def test_keeps_the_newest_and_the_best(tmp_path, parts):
    saving = checkpoints.Checkpoints(str(tmp_path), *parts, keep=2)
    for step in (1, 2, 3):
        saving.save(step)
    saving.save_best(2)
    names = sorted(os.listdir(tmp_path / "checkpoints"))
    assert [n for n in names if n.endswith(".index")] == [
        "step-2.index",
        "step-3.index",
    ]
    assert saving.best.endswith("best/step-2")


def test_full_disk_leaves_the_previous_checkpoint(tmp_path, parts, monkeypatch):
    model, optimizer = parts
    saving = checkpoints.Checkpoints(str(tmp_path), model, optimizer)
    saving.save(1)
    before = _weights(model)

    def fill_disk(prefix, options=None):
        folder = f"{prefix}_temp"
        os.makedirs(folder)
        with open(os.path.join(folder, "part-0"), "wb") as file:
            file.write(b"half")
        raise tf.errors.ResourceExhaustedError(None, None, "No space left")

    monkeypatch.setattr(saving._all, "_write", fill_disk)
    with pytest.raises(ValueError, match=r"No space left.*step-1.*same comm"):
        saving.save(2)
    monkeypatch.undo()
    assert not any("temp" in n for n in os.listdir(tmp_path / "checkpoints"))
    model.weights[0].assign(model.weights[0] + 1.0)
    assert checkpoints.Checkpoints(str(tmp_path), model, optimizer).restore()
    np.testing.assert_array_equal(before[0], model.weights[0].numpy())


def test_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, parts):
    saving = checkpoints.Checkpoints(str(tmp_path), *parts)
    saving.save(1, examples=8)
    saving.save(2, examples=16)
    data = tmp_path / "checkpoints" / "step-2.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:100])
    again = checkpoints.Checkpoints(str(tmp_path), *parts)
    assert again.restore()
    assert again.state.values["examples"] == 8
    data.with_name("step-1.index").unlink()
    with pytest.raises(ValueError, match="None of these checkpoints"):
        again.restore()
