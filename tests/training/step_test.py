"""A step is the same however it is split; metrics are exact."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from conftest import two_devices

from cappa_tf.training import step
from cappa_tf.training.construct import build_model
from cappa_tf.training.distribution.strategies import (
    make_strategy,
    training_iterator,
)
from cappa_tf.training.optimizers.adafactor import Adafactor
from cappa_tf.training.optimizers.averaging import averaged_weights
from cappa_tf.training.reporting.metrics import Interval, Sums
from cappa_tf.training.step import TrainLoop


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vocabulary")


def _adafactor():
    # The gradient of a key's bias is zero but for rounding; divided by its own
    # size it would be noise.
    return Adafactor(0.01, epsilon=1e-3, momentum_dtype="float32")


def _keras_adamw():
    return keras.optimizers.AdamW(0.01, weight_decay=0.1, epsilon=1e-3)


def _train(folder, strategy=None, stop=None, optimizer=_adafactor, **kwargs):
    """Weights, sums and weight norm after three steps of batch 8."""
    strategy = strategy or make_strategy("one")
    size = tiny.vocabulary(folder)[1]
    model, optimizer = build_model(
        lambda: tiny.make_model(size),
        optimizer,
        strategy,
    )
    iterator = training_iterator(strategy, tiny.Data(folder).train, 8)
    loop = TrainLoop(strategy, model, optimizer, 8, stop=stop, **kwargs)
    sums, done, waited, norm, stopped = loop(iterator, 3)
    assert done == 3 and waited > 0.0 and not stopped
    if stop is not None:
        _check_stop(stop, loop, iterator)
    return [v.numpy() for v in model.trainable_variables], sums, norm


def _check_stop(stop, loop, iterator):
    """Once stopped, no step is made and no batch is taken."""
    stop.assign(True)
    assert loop(iterator, 5)[1] == 0
    assert next(iterator)["index"][0] == 24


@pytest.fixture(scope="module")
def plain(folder):
    return _train(folder, stop=tf.Variable(False))


def _assert_same(one, other, tolerance):
    for a, b in zip(one[0], other[0], strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance)
    sums = {**one[1].figures, **one[1].counts}
    found = {**other[1].figures, **other[1].counts}
    assert found.keys() == sums.keys()
    for name, value in sums.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


def test_accumulated_microbatches_are_one_batch(folder, plain):
    _assert_same(plain, _train(folder, accumulation_steps=4), 1e-6)


def test_two_devices_with_microbatches_are_one(folder, plain):
    strategy = two_devices()
    mirrored = _train(folder, strategy=strategy, accumulation_steps=2)
    _assert_same(plain, mirrored, 1e-6)


def test_an_optimizer_of_keras_sums_no_second_time(folder):
    one, two = (
        _train(folder, strategy=strategy, optimizer=_keras_adamw)
        for strategy in (make_strategy("one"), two_devices())
    )
    _assert_same(one, two, 1e-5)


def test_compiled_step_is_the_step(folder, plain):
    compiled = _train(folder, jit_compile=True, accumulation_steps=2)
    _assert_same(plain, compiled, 1e-5)


def test_compiled_updates_are_the_updates(folder, plain, monkeypatch):
    """Those of a model that is not tiny, on a CPU."""
    monkeypatch.setattr(step, "_SIZE_TO_FUSE", 0)
    _assert_same(plain, _train(folder), 1e-5)


def test_only_the_wait_for_data_is_timed(folder, monkeypatch):
    """The clock is read twice between two steps, never during one."""
    events = []

    def event(name, value, dtype):
        def note(value):
            events.append(name)
            return value

        # Stateless, as TensorFlow keeps the order of all others by itself.
        return tf.numpy_function(note, [value], dtype, stateful=False)

    strategy = make_strategy("one")
    data, size = tiny.Data(folder), tiny.vocabulary(folder)[1]
    model, optimizer = build_model(
        lambda: tiny.make_model(size), lambda: Adafactor(0.01), strategy
    )
    read_clock, compute = tf.timestamp, model.example_losses

    def example_losses(batch, training):
        image = event("step", batch["image"], tf.float32)
        image = tf.ensure_shape(image, batch["image"].shape)
        return compute({**batch, "image": image}, training=training)

    monkeypatch.setattr(model, "example_losses", example_losses)
    monkeypatch.setattr(
        tf,
        "timestamp",
        lambda: tf.ensure_shape(event("clock", read_clock(), tf.float64), []),
    )
    loop = TrainLoop(strategy, model, optimizer, 8)
    loop(iter(data.train(8)), 5)
    assert events == ["clock", "clock", "step"] * 5


def test_sums_are_those_of_the_batches(folder, plain):
    sums, data = plain[1], tiny.Data(folder)
    tokens = sum(
        np.count_nonzero(batch["labels"]) for batch in data.train(8).take(3)
    )
    weights = {name: weight for name, (_, weight) in sums.figures.items()}
    assert sums.counts["tokens"] == weights["nll_per_token"] == tokens
    assert weights["loss"] == 24 and weights["gradient_norm"] == 3
    assert weights["autoregressive/loss"] + weights["parallel/loss"] == 24
    squares = [np.square(w.astype("float64")).sum() for w in plain[0]]
    assert plain[2] == pytest.approx(np.sqrt(sum(squares)), rel=1e-5)


def test_inside_the_block_the_weights_are_their_average():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    optimizer = Adafactor(0.1, use_ema=True, ema_momentum=0.5)
    optimizer.build(model.trainable_variables)
    start = [v.numpy() for v in model.trainable_variables]
    with averaged_weights(model, optimizer):  # No step, no average.
        np.testing.assert_array_equal(start[0], model.weights[0].numpy())
    values = []
    for _ in range(2):
        optimizer.apply([tf.ones(v.shape) for v in model.trainable_variables])
        values.append(model.weights[0].numpy())
    with averaged_weights(model, optimizer):
        average = 0.5 * values[0] + 0.5 * values[1]
        np.testing.assert_allclose(model.weights[0].numpy(), average, 1e-6)
    np.testing.assert_array_equal(model.weights[0].numpy(), values[1])


def test_interval_divides_by_what_was_counted():
    interval = Interval(batch_size=4)
    sums = Sums(
        {
            "loss": (8.0, 4.0),
            "parallel/loss": (2.0, 1.0),
            "never/loss": (0.0, 0.0),
            "gradient_norm": (0.5, 1.0),
        },
        {"tokens": 12.0},
    )
    interval.add(sums, steps=1, seconds=100.0, waited=99.0, timed=False)
    interval.add(sums, steps=1, seconds=2.0, waited=0.5)
    figures = interval.result()
    assert figures["loss"] == 16.0 / 8
    assert figures["parallel/loss"] == 2.0
    assert "never/loss" not in figures
    assert figures["gradient_norm"] == 0.5
    # The first loop compiles and is not timed.
    assert figures["images_per_second"] == 2.0
    assert figures["tokens_per_second"] == 6.0
    assert figures["data_wait_share"] == 0.25
    assert interval.result() == {}
