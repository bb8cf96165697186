"""Runs resume exactly, and stop with a reason."""

import glob
import json
import math
import os
import random
import signal
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

from cappa_tf.data.tokenizer import Tokenizer, train_tokenizer
from cappa_tf.saving import run_folder as workdir_module
from cappa_tf.saving import run_lock
from cappa_tf.training import trainer as run_module
from cappa_tf.training.construct import build_model
from cappa_tf.training.distribution.hosts import Hosts
from cappa_tf.training.distribution.interruption import Interruption
from cappa_tf.training.distribution.strategies import make_strategy
from cappa_tf.training.optimizers.adafactor import Adafactor
from cappa_tf.training.validation import Validation
from cappa_tf.utils import files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vocabulary")


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A run of four steps, never interrupted."""
    workdir = str(tmp_path_factory.mktemp("run"))
    calls = []
    figures = tiny.run(
        folder,
        workdir=workdir,
        eval_data=tiny.Data(folder, examples=11),
        eval_steps=2,
        sample_images=2,
        on_start=lambda path: calls.append("start"),
        on_first_step=lambda path, step: calls.append(step),
    )
    return workdir, figures, calls


def _weights(workdir):
    model = workdir_module.load_model(workdir)
    return [v.numpy() for v in model.weights]


def test_a_run_leaves_what_tools_need(finished, folder):
    workdir, figures, calls = finished
    assert calls == ["start", 1]
    assert figures["step"] == 4 and figures["interrupted"] is None
    with open(os.path.join(workdir, "results.json")) as file:
        assert json.load(file)["step"] == 4
    tokenizer, image = workdir_module.load_preprocessing(workdir)
    assert tokenizer.path.startswith(workdir)
    assert tokenizer.vocabulary_size == tiny.vocabulary(folder)[1]
    assert image.image_size == (16, 16)
    final = workdir_module.load_model(workdir, "final")
    latest = workdir_module.load_model(workdir, "latest")
    for a, b in zip(final.weights, latest.weights, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    workdir_module.load_model(workdir, "best")


def test_figures_reach_file_and_tensorboard(finished):
    workdir = finished[0]
    with open(os.path.join(workdir, "train.log")) as file:
        log = file.read()
    assert "parameters" in log and "step 4  loss" in log
    tags = {
        value.tag
        for name in os.listdir(os.path.join(workdir, "tensorboard"))
        for event in tf.compat.v1.train.summary_iterator(
            os.path.join(workdir, "tensorboard", name)
        )
        for value in event.summary.value
    }
    assert tags >= {
        "train/loss",
        "train/autoregressive/loss",
        "train/autoregressive/nll_per_token",
        "train/parallel/loss",
        "train/parallel/nll_per_token",
        "train/learning_rate",
        "train/gradient_norm",
        "train/weight_norm",
        "train/images_per_second",
        "train/tokens_per_second",
        "train/data_wait_share",
        "validation/nll_per_token",
        "samples/captions",
        "samples/sheet",
    }
    # `image_use_images` is 0 here.
    assert not [tag for tag in tags if tag.startswith("image_use")]


@pytest.fixture(scope="module")
def resumed(folder):
    """The same run on a remote file system, interrupted after one step.

    `ram://` is TensorFlow's own, in memory; Python's `os` and `open` do not
    reach it.
    """
    workdir = "ram://bucket/runs/tiny"
    real = run_module.Trainer._count

    def interrupted(self, *args):
        real(self, *args)
        signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_lock, "SETTLE", 0.0)
        patch.setattr(run_module.Trainer, "_count", interrupted)
        figures = tiny.run(folder, workdir=workdir)
        assert figures == {"step": 1, "interrupted": "SIGTERM"}
        assert not files.exists(os.path.join(workdir, "results.json"))
        patch.setattr(run_module.Trainer, "_count", real)
        starts = _record_starts(patch)
        figures = tiny.run(
            folder,
            workdir=workdir,
            eval_data=tiny.Data(folder, examples=11),
            eval_steps=2,
            sample_images=2,
        )
    assert figures["step"] == 4
    assert starts == [8]  # The next batch: one step of eight is done.
    return workdir


def test_interrupted_and_resumed_is_uninterrupted_bit_by_bit(finished, resumed):
    for a, b in zip(_weights(finished[0]), _weights(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_remote_workdir_holds_what_a_local_one_does(finished, resumed):
    def names(folder):
        found = {*files.listdir(folder)}
        for below in ("checkpoints", "best"):
            found |= {*files.listdir(os.path.join(folder, below))}
        return found

    # The interrupted run has saved its step.
    assert names(resumed) - names(finished[0]) == {
        "step-1.index",
        "step-1.data-00000-of-00001",
    }
    assert names(finished[0]) <= names(resumed)
    assert not glob.glob("ram:*")
    for name in ("preprocessing.json", "tokenizer.model"):
        one, other = (
            files.read_bytes(os.path.join(folder, name))
            for folder in (finished[0], resumed)
        )
        assert one == other, name
    log = files.read_text(os.path.join(resumed, "train.log"))
    words = ("SIGTERM at step 1", "step-1, example 8", "step 4  loss")
    assert [word for word in words if word in log] == list(words)
    assert len(files.listdir(os.path.join(resumed, "tensorboard"))) == 2
    best = [
        workdir_module.load_model(folder, "best").weights
        for folder in (finished[0], resumed)
    ]
    for a, b in zip(*best, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    tokenizer, _ = workdir_module.load_preprocessing(resumed)
    assert tokenizer.path == f"{resumed}/tokenizer.model"
    assert tokenizer.vocabulary_size > 2


def _record_starts(monkeypatch):
    starts = []
    real = tiny.Data.train

    def train(self, batch_size, start_index=0, **kwargs):
        starts.append(start_index)
        return real(self, batch_size, start_index, **kwargs)

    monkeypatch.setattr(tiny.Data, "train", train)
    return starts


def test_not_finite_stops_and_keeps_the_last_checkpoint(folder, tmp_path):
    workdir = str(tmp_path)
    poisoned = tiny.Data(folder, poison=24)  # in step 4, of steps 3 and 4
    with pytest.raises(
        FloatingPointError, match=r"between steps 2 and 4.*step-2"
    ):
        tiny.run(folder, workdir=workdir, train_data=poisoned)
    model = workdir_module.load_model(workdir)
    assert all(np.isfinite(v.numpy()).all() for v in model.weights)


def test_validation_counts_each_example_once(folder):
    model = tiny.make_model(tiny.vocabulary(folder)[1])
    model.build()
    data = tiny.Data(folder, examples=11)
    strategy = make_strategy("one")
    exact = [
        Validation(strategy, Hosts(strategy), model, data, size)()
        for size in (1, 4, 11)
    ]
    for figures in exact:
        assert figures["examples"] == 11
        # The head starts at zero: every token has the same probability.
        uniform = math.log(tiny.vocabulary(folder)[1])
        assert figures["nll_per_token"] == pytest.approx(uniform, rel=1e-5)
        assert figures["loss"] == pytest.approx(uniform, rel=1e-5)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"total_steps": 1e6}, "`total_steps` must be an integer"),
        ({"batch_size": "8"}, "`batch_size` must be an integer"),
        ({"checkpoint_steps": 0}, "checkpoint_steps=0"),
        ({"jit_compile": "yes"}, "`jit_compile` must be one of"),
        ({"precision": "float16"}, "`precision` must be one of"),
        ({"final_weights": "first"}, "`final_weights` must be one of"),
        ({"deterministic": 1}, "`deterministic` must be True or False"),
        ({"accumulation_steps": 3}, "must be divisible"),
        ({"strategy": "all"}, "`strategy` must be one of"),
        ({"strategy": "one", "devices": ["GPU:7"]}, "GPU:7.*CPU:0"),
        ({"model": 3}, "`model` must be an object"),
        ({"prepare": "scenes"}, "`prepare` must be a function"),
        ({"workdir": ""}, "`workdir` must be a path"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_read(
    folder, tmp_path, wrong, message
):
    with pytest.raises(ValueError, match=message):
        tiny.run(folder, **{"workdir": str(tmp_path / "run"), **wrong})
    assert not os.path.exists(tmp_path / "run")


def test_vocabulary_of_another_size_is_refused(folder, tmp_path):
    for size, many in ((20, "more"), (50, "fewer")):
        with pytest.raises(ValueError, match=f"tiny.model has {many} pieces"):
            tiny.run(
                folder,
                workdir=str(tmp_path),
                model=lambda size=size: tiny.make_model(size),
            )


def test_vocabulary_of_another_run_is_refused(finished, folder, tmp_path):
    data = tiny.Data(folder)
    other = tmp_path / "other.model"
    words = [f"{a} {b}" for a in tiny.WORDS[::-1] for b in tiny.WORDS[:3]]
    train_tokenizer(words, str(other), tiny.vocabulary(folder)[1])
    data.tokenizer = Tokenizer(str(other), max_length=tiny.LENGTH)
    size = data.tokenizer.vocabulary_size
    model = tiny.make_model(size)
    with pytest.raises(ValueError, match="started with another vocabulary"):
        workdir_module.describe_run(finished[0], model, data)


def test_missing_packages_are_found_at_the_start(folder, monkeypatch):
    """Checked at the start, not when the run ends and computes its metrics."""
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(ImportError, match="pip install"):
        tiny.run(folder, workdir="nowhere", caption_metrics=True)


def test_folder_that_cannot_be_written_is_refused(folder, tmp_path):
    file = tmp_path / "run"
    file.write_text("in place of the folder")
    with pytest.raises(ValueError, match="`workdir` must be a folder.*run"):
        tiny.run(folder, workdir=str(file))


def test_another_architecture_in_the_folder_is_refused(finished, folder):
    size = tiny.vocabulary(folder)[1]
    with pytest.raises(ValueError, match="of another model or optimizer"):
        tiny.run(
            folder,
            workdir=finished[0],
            model=lambda: tiny.make_model(size, hidden_dim=32),
        )


def test_dry_run_reads_and_writes_nothing(folder, tmp_path, capsys):
    class NoData:
        pass

    report = tiny.run(
        folder,
        workdir=str(tmp_path / "run"),
        train_data=NoData,
        prepare=lambda: pytest.fail("prepared"),
        dry_run=True,
    )
    printed = capsys.readouterr().out
    assert "parameters" in printed and "activations" in printed
    assert "(8, 16, 16, 3)" in printed
    counts = report["parameters"]
    parts = counts["vision_encoder"] + counts["text_decoder"]
    assert counts["total"] == parts
    assert report["memory"]["activations"] > 0
    assert not os.path.exists(tmp_path / "run")


def test_second_signal_is_not_caught(monkeypatch):
    raised = []
    with Interruption() as interruption:
        interruption._handle(signal.SIGINT, None)
        assert bool(interruption.stop.numpy())
        monkeypatch.setattr(signal, "raise_signal", raised.append)
        interruption._handle(signal.SIGINT, None)
    assert raised == [signal.SIGINT]


def test_precision_holds_for_the_model_only(folder):
    before = keras.config.dtype_policy().name
    size = tiny.vocabulary(folder)[1]
    model, _ = build_model(
        lambda: tiny.make_model(size),
        Adafactor,
        make_strategy("one"),
        precision="mixed_bfloat16",
    )
    assert model.dtype_policy.name == "mixed_bfloat16"
    assert keras.config.dtype_policy().name == before
    with pytest.raises(ValueError, match="`precision` must be the dtype"):
        build_model(model, Adafactor, make_strategy("one"), precision="float32")


def test_the_seed_decides_the_weights_and_leaves_no_trace(folder):
    def kernel(seed):
        size = tiny.vocabulary(folder)[1]
        model, _ = build_model(
            lambda: tiny.make_model(size), Adafactor, make_strategy("one"), seed
        )
        return model.weights[0].numpy()

    np.testing.assert_array_equal(kernel(3), kernel(3))
    assert np.abs(kernel(3) - kernel(4)).max() > 0.01
    state = random.getstate()
    kernel(5)
    assert random.getstate() == state
