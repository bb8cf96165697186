"""One step is one step, however it is split; figures are exact."""

import numpy as np
import pytest
import tensorflow as tf
import tiny

from cappa_tf.training.adafactor import Adafactor
from cappa_tf.training.build import build_model
from cappa_tf.training.distribution import make_strategy, training_iterator
from cappa_tf.training.metrics import Interval
from cappa_tf.training.step import TrainLoop


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vocabulary")


def _train(folder, steps=3, strategy=None, **kwargs):
    """Weights and sums after some steps of batch 8."""
    strategy = strategy or make_strategy("one")
    size = tiny.vocabulary(folder)[1]
    model, optimizer = build_model(
        lambda: tiny.make_model(size),
        # The gradient of a key's bias is zero but for rounding; divided by
        # its own size it would be noise.
        lambda: Adafactor(0.01, epsilon=1e-3, momentum_dtype="float32"),
        strategy,
    )
    data = tiny.Data(folder)
    iterator = training_iterator(strategy, data.train, 8)
    loop = TrainLoop(strategy, model, optimizer, 8, **kwargs)
    sums, done, waited, norm = loop(iterator, steps)
    assert done == steps and waited > 0.0
    return [v.numpy() for v in model.trainable_variables], sums, norm


@pytest.fixture(scope="module")
def plain(folder):
    return _train(folder)


def _assert_same(one, other, tolerance):
    for a, b in zip(one[0], other[0], strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance)
    for name, value in one[1].items():
        assert other[1][name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


def test_accumulated_microbatches_are_one_batch(folder, plain):
    _assert_same(plain, _train(folder, accumulation_steps=4), 1e-6)


def test_two_devices_are_one(folder, plain):
    strategy = tf.distribute.MirroredStrategy(_two_cpus())
    _assert_same(plain, _train(folder, strategy=strategy), 1e-6)
    accumulated = _train(folder, strategy=strategy, accumulation_steps=2)
    _assert_same(plain, accumulated, 1e-6)


def test_compiled_step_is_the_step(folder, plain):
    compiled = _train(folder, jit_compile=True, accumulation_steps=2)
    _assert_same(plain, compiled, 1e-5)


def test_sums_are_those_of_the_batches(folder, plain):
    sums, data = plain[1], tiny.Data(folder)
    tokens = sum(
        np.count_nonzero(batch["labels"]) for batch in data.train(8).take(3)
    )
    counted = sums["autoregressive/tokens"] + sums["parallel/tokens"]
    assert counted == tokens
    assert sums["autoregressive/examples"] + sums["parallel/examples"] == 24
    squares = [np.square(w.astype("float64")).sum() for w in plain[0]]
    assert plain[2] == pytest.approx(np.sqrt(sum(squares)), rel=1e-5)


def test_stop_ends_the_loop_before_the_next_step(folder):
    stop = tf.Variable(True)
    strategy = make_strategy("one")
    size = tiny.vocabulary(folder)[1]
    model, optimizer = build_model(
        lambda: tiny.make_model(size), Adafactor, strategy
    )
    loop = TrainLoop(strategy, model, optimizer, 8, stop=stop)
    iterator = iter(tiny.Data(folder).train(8))
    assert loop(iterator, 5)[1] == 0
    assert next(iterator)["index"][0] == 0  # No batch was lost.


def test_interval_divides_by_what_was_counted():
    interval = Interval(batch_size=4)
    sums = {
        "autoregressive/loss": 6.0,
        "autoregressive/examples": 3.0,
        "autoregressive/nll": 20.0,
        "autoregressive/tokens": 10.0,
        "parallel/loss": 2.0,
        "parallel/examples": 1.0,
        "parallel/nll": 8.0,
        "parallel/tokens": 2.0,
        "gradient_norm": 0.5,
    }
    interval.add(sums, steps=1, seconds=100.0, waited=99.0, timed=False)
    interval.add(sums, steps=1, seconds=2.0, waited=0.5)
    figures = interval.result()
    assert figures["loss"] == 16.0 / 8
    assert figures["autoregressive/loss"] == 2.0
    assert figures["autoregressive/nll_per_token"] == 2.0
    assert figures["parallel/nll_per_token"] == 4.0
    assert figures["gradient_norm"] == 0.5
    # The first, untimed loop compiled: it says nothing about speed.
    assert figures["images_per_second"] == 2.0
    assert figures["tokens_per_second"] == 6.0
    assert figures["data_wait_share"] == 0.25
    assert interval.result()["loss"] == 0.0


def _two_cpus():
    devices = tf.config.list_logical_devices("CPU")
    if len(devices) < 2:
        pytest.skip("needs two logical CPUs (see tests/conftest.py)")
    return ["CPU:0", "CPU:1"]
