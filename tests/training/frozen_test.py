"""Frozen parts: the same as dropping their gradients, and nothing else."""

import numpy as np
import pytest
import tiny
from conftest import two_devices

from cappa_tf.training import memory_estimate
from cappa_tf.training.construct import build_model
from cappa_tf.training.distribution.strategies import (
    make_strategy,
    training_iterator,
)
from cappa_tf.training.gradients import TaskGradients, function
from cappa_tf.training.optimizers.adafactor import Adafactor
from cappa_tf.training.step import TrainLoop

FROZEN = ["vision_encoder"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vocabulary")


def _build(folder, frozen, strategy=None, dropout=0.0):
    size = tiny.vocabulary(folder)[1]
    return build_model(
        lambda: tiny.make_model(size, dropout=dropout, patch_dropout=dropout),
        # Decay would move a frozen kernel even without a gradient.
        lambda: Adafactor(
            0.01, epsilon=1e-3, weight_decay=0.1, momentum_dtype="float32"
        ),
        strategy or make_strategy("one"),
        frozen_parts=frozen,
    )


def _values(part):
    return [v.numpy() for v in part.weights]


def _train(folder, strategy, dropout):
    """Encoder before and after three steps; decoder after them."""
    model, optimizer = _build(folder, FROZEN, strategy, dropout)
    before = _values(model.vision_encoder)
    iterator = training_iterator(strategy, tiny.Data(folder).train, 8)
    TrainLoop(strategy, model, optimizer, 8)(iterator, 3)
    return before, _values(model.vision_encoder), _values(model.text_decoder)


@pytest.fixture(scope="module")
def expected(folder):
    """The decoder of a plain model whose encoder's gradients are dropped."""
    model, _ = _build(folder, ())
    decoder = model.text_decoder.trainable_variables
    optimizer = Adafactor(
        0.01, epsilon=1e-3, weight_decay=0.1, momentum_dtype="float32"
    )
    optimizer.build(decoder)
    every = model.trainable_variables
    compute = function(TaskGradients(model, 8).of_microbatch)
    for batch in tiny.Data(folder).train(8).take(3):
        gradients, _ = compute(batch)
        kept = {id(v): g for v, g in zip(every, gradients, strict=True)}
        optimizer.apply([kept[id(v)] for v in decoder], decoder)
    return _values(model.text_decoder)


@pytest.mark.parametrize("devices", [1, 2])
def test_the_rest_is_trained_as_if_gradients_were_dropped(
    folder, expected, devices
):
    """A frozen encoder has no dropout in training."""
    strategy = make_strategy("one") if devices == 1 else two_devices()
    before, after, decoder = _train(folder, strategy, dropout=0.5)
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(expected, decoder, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_neither_state_nor_gradients_are_held(folder):
    whole, frozen = (_build(folder, parts) for parts in ((), FROZEN))
    model, optimizer = frozen
    ours = [v.path for v in optimizer.variables]
    assert not [path for path in ours if "vision_encoder" in path]
    assert len(ours) < len(whole[1].variables)
    sizes = [
        memory_estimate.estimate(*pair, make_strategy("one"), 8)
        for pair in (whole, frozen)
    ]
    assert sizes[0]["weights"] == sizes[1]["weights"]
    encoder = 4 * model.vision_encoder.count_params()
    assert sizes[0]["gradients"] - sizes[1]["gradients"] == encoder
    for name in ("optimizer state", "activations"):
        assert sizes[1][name] < sizes[0][name]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["encoder"], r"'vision_encoder', 'text_decoder'\].*\['encoder'\]"),
        (["vision_encoder", "text_decoder"], "something to train"),
    ],
)
def test_parts_that_cannot_be_frozen_are_named(folder, parts, message):
    with pytest.raises(ValueError, match=message):
        _build(folder, parts)


# LiT: the text tower is trained, and of the image tower at most the pooling.


POOL = ("vision_encoder/pool",)


def _lit(folder, trained):
    return build_model(
        lambda: tiny.make_contrastive(
            tiny.vocabulary(folder)[1],
            pooling="map",
            dropout=0.5,
            patch_dropout=0.5,
        ),
        lambda: Adafactor(0.01, epsilon=1e-3, weight_decay=0.1),
        make_strategy("one"),
        frozen_parts=FROZEN,
        trained_parts=trained,
    )


def test_a_pooling_head_is_trained_on_a_frozen_tower(folder):
    model, optimizer = _lit(folder, POOL)
    encoder = model.vision_encoder
    pool = {id(v) for v in encoder.layers[-1].variables}
    before = _values(encoder)
    strategy = make_strategy("one")
    iterator = training_iterator(strategy, tiny.Data(folder).train, 8)
    TrainLoop(strategy, model, optimizer, 8)(iterator, 20)
    moved = [
        not np.array_equal(one, other)
        for one, other in zip(before, _values(encoder), strict=True)
    ]
    assert moved == [id(v) in pool for v in encoder.weights]


def test_a_frozen_tower_is_not_differentiated_through(folder):
    model, _ = _lit(folder, POOL)
    assert _differentiated(model) == {"pool"}
    model.freeze(())
    assert _differentiated(model) >= {"pool", "encoder_block_0", "patches"}


def _differentiated(model):
    """Names of the image tower's layers that the gradient's graph goes into."""
    step = function(TaskGradients(model, 8).of_microbatch)
    graph = step.get_concrete_function(model.batch_spec(8)).graph
    # gradient_tape/vision_encoder_1/pool_1/...
    inside = [
        op.name.split("/")[2]
        for op in graph.get_operations()
        if op.name.startswith(f"gradient_tape/{model.vision_encoder.name}")
    ]
    names = [layer.name for layer in model.vision_encoder.layers]
    return {n for n in names if any(x.startswith(n) for x in inside)}


@pytest.mark.parametrize(
    ("trained", "message"),
    [
        (["vision_encoder/head"], r"'vision_encoder/pool'\].*encoder/head"),
        (["text_encoder/norm"], r"TRAINED_PARTS.*text_encoder/norm"),
    ],
)
def test_what_is_not_inside_a_frozen_part_is_named(folder, trained, message):
    with pytest.raises(ValueError, match=message):
        _lit(folder, trained)
