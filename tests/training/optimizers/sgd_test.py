"""SGD with momentum, and multipliers of the learning rate."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from harness import check_config, check_optimizer, relative_difference

from cappa_tf.models.classifier import Classifier
from cappa_tf.models.vision_encoder import VisionEncoder
from cappa_tf.training.optimizers.adamw import AdamW
from cappa_tf.training.optimizers.multipliers import ByDepth, ByPattern
from cappa_tf.training.optimizers.schedules import Cosine
from cappa_tf.training.optimizers.sgd import SGD

PLAIN = {"schedule": None, "weight_decay": 0.0, "global_clip_norm": None}


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def make_variable(value, path):
    """A variable whose path is as if it were inside layers."""
    variable = keras.Variable(value, name=path.rpartition("/")[2])
    variable._path = path
    return variable


def test_the_trace_is_scaled_in_bfloat16_and_added_in_float32():
    optimizer = SGD(0.1, **PLAIN)
    variable = keras.Variable(random(5, 7), name="kernel")
    wanted, trace = variable.numpy(), np.zeros((5, 7), "float32")
    half = tf.bfloat16.as_numpy_dtype
    for step in range(4):
        g = random(5, 7, seed=step)
        optimizer.apply([tf.constant(g)], [variable])
        update = g + (half(trace) * half(0.9)).astype("float32")
        trace = update.astype(half).astype("float32")
        wanted = wanted - np.float32(0.1) * update
        np.testing.assert_allclose(variable, wanted, rtol=1e-6)


def test_in_float32_it_equals_sgd_of_keras():
    ours = SGD(0.01, momentum_dtype="float32", **PLAIN)
    theirs = keras.optimizers.SGD(0.01, momentum=0.9)
    variables = [keras.Variable(random(9)) for _ in "ab"]
    for step in range(4):
        g = tf.constant(random(9, seed=step))
        for optimizer, variable in zip((ours, theirs), variables):
            optimizer.apply([g], [variable])
    assert relative_difference(*variables) < 1e-6


def test_contract(tmp_path):
    check_optimizer(
        SGD,
        {
            "learning_rate": 0.01,
            "schedule": Cosine(20, 2),
            "weight_decay": 0.01,
            "use_ema": True,
            "multipliers": ByPattern([("embedding", 0.5)]),
        },
        tmp_path,
    )


@pytest.mark.parametrize(
    ("kwargs", "received"),
    [
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"momentum_dtype": "float16"}, "momentum_dtype='float16'"),
        ({"multipliers": 0.75}, "multipliers=0.75"),
    ],
)
def test_wrong_arguments_are_named(kwargs, received):
    with pytest.raises(ValueError, match="Received: ") as error:
        SGD(**kwargs)
    assert received in str(error.value)


@pytest.mark.parametrize("optimizer_cls", [SGD, AdamW])
def test_a_pattern_multiplies_the_rate_and_not_the_decay(optimizer_cls):
    """w - factor * rate * direction - decay * w."""
    paths = ("model/encoder/kernel", "model/head/kernel")
    variables = [make_variable(random(3), path) for path in paths]
    before = variables[0].numpy()
    optimizer = optimizer_cls(
        0.1,
        weight_decay=0.25,
        global_clip_norm=None,
        multipliers=ByPattern([("/head/", 0.5)]),
    )
    optimizer.build(variables)
    optimizer.apply([tf.constant(random(3, seed=1))] * 2)
    steps = [v.numpy() - 0.75 * before for v in variables]
    np.testing.assert_allclose(steps[1], 0.5 * steps[0], rtol=1e-5)


def test_the_rate_decays_with_the_depth_of_each_block():
    """Levels: before the blocks, two blocks, after them (and the head)."""
    encoder = VisionEncoder(
        hidden_dim=8,
        num_layers=2,
        num_heads=2,
        mlp_dim=8,
        image_size=8,
        patch_size=4,
        pooling="map",
        name="vision_encoder",
    )
    model = Classifier(encoder, 3)
    model.build()
    rates, decays = ByDepth(0.5).factors(model.trainable_variables)
    assert rates == decays
    found = {}
    for variable, factor in zip(model.trainable_variables, rates):
        name = "/".join(variable.path.split("/")[1:3])
        found.setdefault(name, set()).add(factor)
    assert found == {
        "vision_encoder/patches": {0.125},
        "vision_encoder/positions": {0.125},
        "vision_encoder/encoder_block_0": {0.25},
        "vision_encoder/encoder_block_1": {0.5},
        "vision_encoder/encoder_norm": {1.0},
        "vision_encoder/pool": {1.0},
        "head/kernel": {1.0},
        "head/bias": {1.0},
    }


def test_each_tower_has_depths_of_its_own():
    paths = {
        "model/image/layer_2/kernel": 0.5,
        "model/image/layer_0/kernel": 0.125,
        "model/text/layer_0/kernel": 0.5,
        "model/text/token_embedding/embeddings": 0.25,
        "model/scale": 1.0,
        # Of another library, whose blocks are one layer deeper.
        "hub/encoder/block_1/kernel": 0.5,
        "hub/patch_embedding/kernel": 0.125,
        "hub/pooler/kernel": 1.0,
    }
    variables = [make_variable(np.zeros(1), path) for path in paths]
    assert ByDepth(0.5).factors(variables)[0] == list(paths.values())


def test_multipliers_are_rebuilt_from_their_configuration():
    check_config(ByDepth(0.5))
    check_config(ByPattern([("a", 1.0)]))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: ByPattern([("(", 1.0)]), r"regular expressions.*'\('"),
        (lambda: ByPattern([("a", -1.0)]), "patterns=-1.0"),
        (lambda: ByPattern([("a", 1.0), ("b", 1.0)]), r"Received: \['b'\]"),
        (lambda: ByDepth(0.0), "decay=0.0"),
        (ByDepth, "numbered blocks.*'layer_a/kernel'"),
    ],
)
def test_multipliers_that_fit_no_variable_are_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make().factors([make_variable(np.zeros(1), "layer_a/kernel")])
