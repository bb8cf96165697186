"""The schedules equal the reference's, and refuse invalid arguments."""

import math

import numpy as np
import pytest
from conftest import shared_reference
from harness import check_config, check_function

from cappa_tf.training.optimizers.schedules import Cosine, Linear, Rsqrt

SCHEDULES = {
    "cosine": Cosine(100, 10),
    "rsqrt": Rsqrt(100, 10, cooldown_steps=20, timescale=15),
    "linear": Linear(100, 5, end=0.1),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_equals_the_reference_at_every_step(name):
    wanted = np.load(shared_reference("cappa_tiny.npz"))[f"schedule/{name}"]
    steps = np.arange(len(wanted))
    actual = [float(SCHEDULES[name](step)) for step in steps]
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "step", "wanted"),
    [
        # The first step is made at step 0: a warm-up starts from nothing.
        (Cosine(100, 10), 0, 0.0),
        (Cosine(100, 10), 5, 0.5),
        (Cosine(100, 10), 10, 1.0),
        (Cosine(100, 10), 55, 0.5),
        (Cosine(100, 10), 40, 0.5 + 0.5 * math.cos(math.pi / 3)),
        (Cosine(100, 10), 100, 0.0),
        (Cosine(100, 10), 1000, 0.0),
        (Cosine(100), 0, 1.0),
        (Linear(100, 20, end=0.2), 60, 0.6),
        (Linear(100, 20, end=0.2), 200, 0.2),
        (Linear(100, 20), 100, 0.0),
        (Rsqrt(100, 10, timescale=30), 10, 1.0),
        (Rsqrt(100, 10, timescale=30), 100, 0.5),
        # Without a cooldown the length of the run has no effect.
        (Rsqrt(100, 10, timescale=30), 460, 0.25),
        (Rsqrt(100, 10, 50, timescale=30), 100, 0.0),
        (Rsqrt(100, 10, 50, timescale=30), 75, 0.5 / math.sqrt(1 + 65 / 30)),
        # The reference turns negative here.
        (Rsqrt(100, 10, 50, timescale=30), 150, 0.0),
    ],
)
def test_worked_examples(schedule, step, wanted):
    assert float(schedule(step)) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_same_in_a_graph_and_stays_in_range(name):
    schedule = SCHEDULES[name]
    for step in (0, 3, 50, 99, 10**9):
        multiplier = check_function(schedule, [np.int64(step)])
        assert multiplier.dtype == "float32"
        assert multiplier.shape == ()
        assert 0.0 <= float(multiplier) <= 1.0


@pytest.mark.parametrize("name", SCHEDULES)
def test_config_rebuilds(name):
    rebuilt = check_config(SCHEDULES[name])
    for step in (0, 7, 42, 99):
        assert float(rebuilt(step)) == float(SCHEDULES[name](step))


def test_paper_schedule_is_exact_late_in_the_run():
    """366,500 steps are distinguished in float32."""
    schedule = Cosine(366_500, 10_000)
    for step in (10_001, 188_250, 366_499):
        progress = (step - 10_000) / 356_500
        wanted = 0.5 + 0.5 * math.cos(math.pi * progress)
        assert float(schedule(step)) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Cosine(total_steps=1e3), "total_steps=1000.0"),
        (lambda: Cosine(total_steps="100"), "total_steps='100'"),
        (lambda: Cosine(total_steps=0), "total_steps=0"),
        (lambda: Cosine(total_steps=True), "total_steps=True"),
        (lambda: Cosine(100, warmup_steps=-1), "warmup_steps=-1"),
        (lambda: Cosine(100, warmup_steps=100), "warmup_steps=100"),
        (lambda: Linear(100, end=1.5), "end=1.5"),
        (lambda: Linear(100, end="0.1"), "end='0.1'"),
        (lambda: Rsqrt(100, timescale=0), "timescale=0"),
        (lambda: Rsqrt(100, timescale=float("nan")), "timescale=nan"),
        (lambda: Rsqrt(100, cooldown_steps=101), "cooldown_steps=101"),
        (lambda: Rsqrt(100, cooldown_steps=None), "cooldown_steps=None"),
    ],
)
def test_wrong_arguments_are_named(make, name):
    with pytest.raises(ValueError, match="Received: ") as error:
        make()
    assert name in str(error.value)


def test_misspelled_argument_is_refused():
    with pytest.raises(TypeError, match="warm_up_steps"):
        Cosine(100, warm_up_steps=10)
