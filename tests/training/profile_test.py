"""A run's profile, and the share of the peak that it reports."""

import pathlib
import re

import conftest
import pytest
import small_run
import tiny

from cappa_tf.training import flops
from cappa_tf.training.reporting import utilization
from tools import train as train_tool


def test_a_profile_of_some_steps_and_the_share_of_the_peak(tmp_path):
    run = tmp_path / "run"
    tiny.run(
        tmp_path,
        workdir=str(run),
        profile=(2, 3),
        peak_flops=1e9,
        log_steps=2,
        total_steps=4,
    )
    profiles = list(run.glob("tensorboard/plugins/profile/*/*.xplane.pb"))
    assert len(profiles) == 1 and profiles[0].stat().st_size > 0
    log = (run / "train.log").read_text()
    assert "profile of steps up to 3 in " in log
    # Loops of two steps end where the profile does.
    line = re.search(r"step 4 .*img/s (\S+).*GFLOP/s (\S+)  of peak (\S+)", log)
    images, rate, share = map(float, line.groups())
    assert rate == pytest.approx(share, rel=1e-2)
    model = tiny.make_model(40)
    model.build()
    one = flops.training_flops(model)
    assert 0.5 * one < rate * 1e9 / images < 1.1 * one
    tag = "train/peak_share"
    assert small_run.logged(str(run), tag)[4] == pytest.approx(share, rel=1e-2)


def test_utilization_counts_real_tokens_on_any_number_of_devices():
    with conftest.two_devices().scope():
        model = tiny.make_model(40)
        model.build()
    before = [v.numpy() for v in model.weights]
    found = utilization.Utilization(model, 1, 2, "float32", 1e6).figures(
        {"images_per_second": 10.0, "tokens_per_second": 30.0}
    )
    positions, tokens, width, vocabulary = 8, 3, 16, 40
    plain = tiny.make_model(vocabulary)
    plain.build()
    # The logits, their recomputation and two gradients.
    left_out = 4 * 2 * (positions - tokens) * width * vocabulary
    wanted = 10 * (flops.training_flops(plain) - left_out)
    assert found["gflops_per_second"] == pytest.approx(wanted / 1e9)
    assert found["peak_share"] == pytest.approx(wanted / 2e6)
    assert all((a == b.numpy()).all() for a, b in zip(before, model.weights))


def test_utilization_is_off_where_it_is_unknown():
    model = tiny.make_model(40)
    rates = {"images_per_second": 10.0}
    for captions, peak, given in (
        (1, None, rates),
        ("all", 1e6, rates),
        (1, 1e6, {}),
    ):
        made = utilization.Utilization(model, captions, 1, "float32", peak)
        assert made.figures(given) == {}


@pytest.mark.parametrize("steps", [(0, 2), (3, 2), (2, 5), (1, 2, 3), (1.0, 2)])
def test_steps_that_do_not_exist_are_refused(tmp_path, steps):
    with pytest.raises(ValueError, match="profile"):
        tiny.run(tmp_path, workdir=str(tmp_path / "run"), profile=steps)
    assert not pathlib.Path(tmp_path / "run").exists()


@pytest.mark.parametrize("given", ["3", "5,4", "0,2", "a,b", "1,2,3"])
def test_the_flag_is_refused_by_name(given):
    with pytest.raises(ValueError, match=f"--profile must be.*={given}"):
        train_tool.parse_profile(given.split(","))
    assert train_tool.parse_profile(["2", "3"]) == (2, 3)
