"""Rematerialization of blocks changes only memory."""

import numpy as np
import pytest
import small_run
import tensorflow as tf

from cappa_tf.training.construct import build_model
from cappa_tf.training.distribution.strategies import make_strategy
from cappa_tf.training.gradients import TaskGradients, function
from cappa_tf.training.memory_estimate import estimate
from cappa_tf.training.optimizers.adafactor import Adafactor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))
    small_run.write_data(folder)
    return folder


def _build(folder, remat, precision="float32", num_layers=1):
    strategy = make_strategy("one")
    model, optimizer = build_model(
        lambda: small_run.make_model(folder, remat, num_layers),
        Adafactor,
        strategy,
        precision=precision,
    )
    # The head starts at zero and would let no gradient through.
    kernel = model.text_decoder.head_weights[0]
    kernel.assign(tf.random.stateless_normal(kernel.shape, (1, 2)))
    return model, optimizer, strategy


@pytest.mark.parametrize(
    "precision, tolerance", [("float32", 1e-5), ("mixed_bfloat16", 0.05)]
)
def test_gradients_are_the_same(folder, precision, tolerance):
    batch = next(iter(small_run.data(folder).train(4)))
    found = []
    for remat in (False, True):
        model, _, strategy = _build(folder, remat, precision)
        step = function(TaskGradients(model, 4).of_microbatch)
        found.append(step(batch)[0])
    for variable, a, b in zip(model.trainable_variables, *found, strict=True):
        limit = tolerance * max(1.0, float(tf.reduce_max(tf.abs(a))))
        np.testing.assert_allclose(a, b, atol=limit, err_msg=variable.path)
    assert max(float(tf.reduce_max(tf.abs(g))) for g in found[1]) > 0.1


def test_activations_take_less_memory(folder):
    sizes = [
        estimate(*_build(folder, remat, num_layers=3), batch_size=64)
        for remat in (False, True)
    ]
    kept, recomputed = (size["activations"] for size in sizes)
    # About one block of three, in encoder and decoder.
    assert recomputed < 0.6 * kept


def test_the_model_remembers_it(folder):
    config = _build(folder, True)[0].get_config()
    for part in ("vision_encoder", "text_decoder"):
        assert config[part]["config"]["remat"] is True
    with pytest.raises(ValueError, match="`remat` must be True or False"):
        small_run.make_model(folder, remat="yes")
