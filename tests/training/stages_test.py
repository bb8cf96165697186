"""Runs of several stages: one command, resumable everywhere, one count."""

import os

import numpy as np
import pytest
import small_run

from cappa_tf import config
from cappa_tf.inference.predictor import Predictor
from cappa_tf.models.positions import resample_positions
from cappa_tf.saving.checkpoints import (
    latest_checkpoint,
    named_variables,
    saved_state,
)
from cappa_tf.saving.run_folder import load_model
from cappa_tf.training import initialize, stages, trainer
from cappa_tf.training.construct import build_model
from cappa_tf.training.distribution.strategies import make_strategy

FILES = [
    "gin/models/captioner.gin",
    "gin/objectives/cappa.gin",
    "gin/data/captions.gin",
    "gin/optimizers/adafactor.gin",
    "gin/runs/pretrain.gin",
    "gin/runs/low_resolution_first.gin",
]
PARAMS = """HIDDEN_DIM=16 NUM_LAYERS=1 DECODER_LAYERS=1 NUM_HEADS=2 MLP_DIM=32
PATCH_SIZE=8 IMAGE_SIZE=32 MAX_LENGTH=8 VOCABULARY_SIZE=27
TOTAL_STEPS=8 BATCH_SIZE=8 WARMUP_STEPS=1 LEARNING_RATE=0.01 PRECISION='float32'
STRATEGY='one' STEPS_PER_LOOP=2 LOG_STEPS=1 CHECKPOINT_STEPS=2
DROPOUT=0.1 FIRST_SHARE=0.5 FIRST_IMAGE_SIZE=16 FIRST_PATCH_DROPOUT=0.25
FIRST_TOKENS_KEPT=0.5 PEAK_FLOPS=None
settings.EvaluationSettings.final_evaluation=False
train.train.eval_data=None""".split()


class Killed(BaseException):
    """Ends a run at once, as a signal that cannot be caught."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))
    small_run.write_data(folder)
    return folder


def start(data, workdir, *params):
    config.parse(FILES, [*PARAMS, f"DATA={data!r}", *params], workdir=workdir)
    return config.run(on_start=config.save_config)


def start_and_kill(data, workdir, where):
    """Runs until `where(trainer, whether no step is made)` is true."""
    real = trainer.Trainer._between_loops, trainer.Trainer.run

    def between(self, interval):
        real[0](self, interval)
        if where(self, False):
            raise Killed

    def run(self, on_first_step=None):
        if where(self, True):
            raise Killed
        return real[1](self, on_first_step)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer.Trainer, "_between_loops", between)
        patch.setattr(trainer.Trainer, "run", run)
        start(data, workdir)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("whole") / "run")
    figures = start(data, workdir)
    assert figures["step"] == 8
    return workdir


def test_killed_in_both_stages_and_between_them_is_uninterrupted(
    data, finished, tmp_path
):
    workdir = str(tmp_path / "run")
    moments = [
        lambda run, first: run.step == 3,
        # The second stage has read its weights, and made no step.
        lambda run, first: first and run.settings.total_steps == 8,
        lambda run, first: run.step == 7,
    ]
    for where in moments:
        start_and_kill(data, workdir, where)
    assert start(data, workdir)["step"] == 8
    for folder, step in (("stage_1", 4), (".", 8)):
        wanted, found = (
            small_run.saved(os.path.join(one, folder), step)
            for one in (finished, workdir)
        )
        assert wanted.keys() == found.keys()
        for name, array in wanted.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)
    for tag in ("train/loss", "train/learning_rate"):
        both = [small_run.logged(one, tag) for one in (finished, workdir)]
        assert both[0] == both[1]


def test_steps_and_schedule_go_on_in_one_log(finished):
    rates = small_run.logged(finished, "train/learning_rate")
    assert list(rates) == list(range(1, 9))
    rates = list(rates.values())
    assert rates == sorted(rates, reverse=True) and rates[-1] < 1e-6
    with open(os.path.join(finished, "train.log")) as file:
        log = file.read()
    assert "positions resampled from 2x2 to 4x4, at step 4" in log
    assert all(f" step {n}  loss" in log for n in range(1, 9))
    assert not os.path.exists(os.path.join(finished, "stage_1", "train.log"))


def test_the_data_goes_on_behind_the_boundary(finished):
    paths = [latest_checkpoint(os.path.join(finished, "stage_1"))]
    paths.append(latest_checkpoint(finished))
    assert [saved_state(path)["examples"] for path in paths] == [32, 64]


def test_the_folder_is_that_of_the_last_stage(finished, data):
    assert Predictor.open(finished).model.vision_encoder.image_size == (32, 32)
    first = os.path.join(finished, "stage_1")
    encoder = load_model(first).vision_encoder
    assert (encoder.image_size, encoder.patch_dropout) == ((16, 16), 0.25)
    # Each is the configuration of a run that would do the same.
    bound = config.load_run(first)
    assert bound["settings"].total_steps == 4
    shares = [(x, a["settings"]) for x, a in config.stage_arguments()]
    assert [x for x, _ in shares] == [1.0]
    config.load_run(finished)
    found = list(config.stage_arguments())
    assert [share for share, _ in found] == [0.5, 0.5]
    assert [a["train_data"].image_size[0] for _, a in found] == [16, 32]


def test_the_optimizer_goes_on_and_positions_are_resampled(finished, data):
    first = os.path.join(finished, "stage_1")
    config.parse(FILES, [*PARAMS, f"DATA={data!r}"], workdir="none")
    bound = config.arguments()
    model, optimizer = build_model(
        bound["model"], bound["optimizer"], make_strategy("one"), seed=1
    )
    line, examples = initialize.continue_run(model, optimizer, first)
    assert line.startswith(f"continues {first}") and examples == 32
    arrays = {
        name.split("/.ATT")[0].removeprefix("variables/").replace(".S", "/"): x
        for name, x in small_run.saved(first, 4).items()
    }
    assert latest_checkpoint(first).endswith("step-4")
    for name, variable in named_variables(model, optimizer).items():
        value, found = arrays[name], variable.numpy()
        if value.shape != found.shape:
            assert "positions" in name and "vision_encoder" in name
            value = resample_positions(value, (4, 4), (2, 2))
        np.testing.assert_array_equal(found, value, err_msg=name)
    assert int(optimizer.iterations.numpy()) == 4


def test_second_moments_of_another_form_start_at_their_mean():
    """A table of 4 positions is not factored, one of 64 is."""
    table = "adafactor/vision_encoder_positions_position_embedding"
    moment = np.random.default_rng(0).uniform(size=(1, 4, 16))
    moment = moment.astype("float32")
    arrays = {f"{table}_velocity": moment}
    for kind, shape in (("row", (1, 64)), ("column", (1, 16))):
        name = f"{table}_velocity_{kind}"
        found = initialize._slot(name, shape, arrays, (2, 2), (8, 8))
        assert found.shape == shape
        np.testing.assert_allclose(found, moment.mean(), rtol=1e-6)


def test_another_optimizer_is_refused(finished, data):
    params = ["adafactor.Adafactor.min_dim_size_to_factor=16"]
    config.parse(FILES, [*PARAMS, *params, f"DATA={data!r}"], workdir="none")
    bound = config.arguments()
    built = build_model(
        bound["model"], bound["optimizer"], make_strategy("one")
    )
    with pytest.raises(ValueError, match="of the kind of the run.*velocity"):
        initialize.continue_run(*built, os.path.join(finished, "stage_1"))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (["FIRST_SHARE=1.0"], "must leave steps to the last one.*1.0"),
        (["FIRST_IMAGE_SIZE=12"], "multiple of `patch_size`"),
        (["FIRST_IMAGE_SIZE='a'"], "In stage_1: .*IMAGE_SIZE.*'a'"),
        (["FIRST_SIZE=8"], "FIRST_SIZE is set.*mean FIRST_IMAGE_SIZE"),
        (
            [
                "stages.Stage.bindings={'IMAGE_SIZE': %FIRST_IMAGE_SIZE, "
                "'PATCH_DROPOUT': %FIRST_PATCH_DROPOUT, "
                "'VISUAL_TOKENS_KEPT': %FIRST_TOKENS_KEPT, 'IMAGE': 8}"
            ],
            "In stage_1: IMAGE is set, but",
        ),
        (["TOTAL_STEPS=1", "WARMUP_STEPS=0"], "a step to each stage"),
    ],
)
def test_what_a_stage_cannot_be_is_named(params, message, tmp_path):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        start("nowhere", str(tmp_path / "run"), *params)


def test_stages_share_the_steps():
    third = stages.Stage(share=1 / 3, bindings={})
    found = stages.parts((third, third), 9, "run")
    assert [(p.first_step, p.last_step) for p in found] == [(0, 3), (3, 6)]
    assert [p.before for p in found] == [None, os.path.join("run", "stage_1")]
    assert [p.after for p in found] == [found[1].folder, "run"]
    few = stages.parts((third, third), 3, "run")
    assert [p.last_step for p in few] == [1, 2]
