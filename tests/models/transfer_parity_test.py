"""Classification gives the reference's numbers.

Losses, gradients, mixup and six optimizer steps of the authors'
implementation: fine-tuning, a MAP probe, one learning rate for each layer, and
several labels per image with Adafactor.
"""

import numpy as np
import numpy_reference as reference
import parity
import pytest
import tensorflow as tf
from conftest import shared_reference

from cappa_tf.data.images.mixing import mix
from cappa_tf.models.positions import resample_positions
from cappa_tf.saving import big_vision
from cappa_tf.saving import big_vision_names as names
from cappa_tf.training.gradients import TaskGradients
from cappa_tf.training.optimizers.adafactor import Adafactor
from cappa_tf.training.optimizers.base import global_norm
from cappa_tf.training.optimizers.multipliers import ByPattern
from cappa_tf.training.optimizers.schedules import Cosine
from cappa_tf.training.optimizers.sgd import SGD


@pytest.fixture(scope="module")
def arrays():
    return dict(np.load(shared_reference("transfer_tiny.npz")))


def load(arrays, **overrides):
    stored = {k: v for k, v in arrays.items() if k.startswith("params/")}
    model = big_vision.load_vision_encoder(stored)
    for name, value in overrides.items():
        setattr(model, name, value)
    return model


def batch_of(arrays, label="label", image="image"):
    return {
        "image": tf.constant(arrays[image]),
        "label": tf.constant(arrays[label]),
        "index": tf.range(len(arrays["label"]), dtype=tf.int64),
    }


def mixed(arrays):
    """The batch mixed with the reference's weight."""
    batch = batch_of(arrays)
    weights = tf.fill([len(batch["label"])], float(arrays["mixup/weight"]))
    return mix(batch, weights)


def variables_by_name(model):
    structure = {
        "num_layers": model.vision_encoder.num_layers,
        "learned": True,
        "pooling": "map",
        "head": True,
    }
    rows = names.vision_rows(**structure)
    return {
        row.name: variable
        for row, (variable,) in big_vision.paired(rows, model)
    }


def check_gradients(model, batch, arrays, prefix):
    loss, gradients = parity.task_gradients(model, batch)
    expected = float(arrays[f"{prefix}/loss"])
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    numbers = {id(v): i for i, v in enumerate(model.trainable_variables)}
    found = {
        name: np.asarray(gradients[numbers[id(variable)]])
        for name, variable in variables_by_name(model).items()
    }
    parity.check_gradients(found, reference.below(arrays, f"{prefix}/grads/"))


def test_outputs_losses_and_top_1(arrays):
    model = load(arrays)
    outputs = model(arrays["image"])
    for name in ("logits", "pre_logits"):
        np.testing.assert_allclose(outputs[name], arrays[name], atol=2e-5)
    for loss in ("softmax", "sigmoid"):
        model.loss_kind = loss
        found = model.example_losses(batch_of(arrays), training=False).loss
        np.testing.assert_allclose(found, arrays[f"{loss}/losses"], rtol=1e-5)
    found = model.example_losses(batch_of(arrays, "multi_label"), False)
    np.testing.assert_allclose(
        found.loss, arrays["sigmoid/multi_label_losses"], rtol=1e-5
    )
    correct, counted = found.metrics["top_1"]
    np.testing.assert_array_equal(counted, arrays["top1/counted"])
    np.testing.assert_array_equal(
        correct * counted, arrays["top1/correct"] * arrays["top1/counted"]
    )


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_gradients(arrays, loss):
    check_gradients(
        load(arrays, loss_kind=loss), batch_of(arrays), arrays, loss
    )


def test_mixup(arrays):
    batch, model = mixed(arrays), load(arrays)
    np.testing.assert_allclose(batch["image"], arrays["mixup/image"], atol=1e-6)
    check_gradients(model, batch, arrays, "mixup")


SETTINGS = {"global_clip_norm": 1.0, "schedule": Cosine(9, 3)}
MULTIPLIERS = [("/head/", 1.0), ("", 0.1)]
# The probe's frozen parts, and what of them is trained.
PROBE = (["vision_encoder"], ["vision_encoder/pool"])
# Name in the arrays -> (optimizer, parts frozen, layers of them trained).
RUNS = {
    "finetune": (lambda: SGD(0.03, **SETTINGS), (), ()),
    "probe": (lambda: SGD(0.03, **SETTINGS), *PROBE),
    "lr_multipliers": (
        lambda: SGD(
            0.03,
            multipliers=ByPattern([("/head/", 1.0), ("", 0.1)]),
            **SETTINGS,
        ),
        (),
        (),
    ),
    "adafactor": (
        lambda: Adafactor(3e-3, weight_decay=1e-2, beta2_cap=0.95, **SETTINGS),
        (),
        (),
    ),
}


@pytest.mark.parametrize("run", RUNS)
def test_six_steps_of_training(arrays, run):
    model = load(arrays)
    batches = [batch_of(arrays)] * 2
    if run == "finetune":
        batches[1] = mixed(arrays)
    if run == "adafactor":
        model.loss_kind = "sigmoid"
        batches = [batch_of(arrays, "multi_label")] * 2
    make_optimizer, frozen, trained = RUNS[run]
    model.freeze(frozen, trained)
    optimizer = make_optimizer()
    variables = model.trainable_variables
    optimizer.build(variables)
    task_gradients = TaskGradients(model, len(arrays["label"]))

    @tf.function(autograph=False)
    def step(batch):
        gradients, sums = task_gradients.of_batch(batch)
        optimizer.apply(gradients, variables)
        total, weight = task_gradients.layout.unpacked(sums).figures["loss"]
        return total / weight, global_norm(gradients)

    steps = [step(batches[number % 2]) for number in range(6)]
    losses, norms = np.array(steps).T
    np.testing.assert_allclose(losses, arrays[f"{run}/losses"], rtol=1e-5)
    np.testing.assert_allclose(
        norms, arrays[f"{run}/gradient_norms"], rtol=1e-4
    )
    before = reference.below(arrays, "params/")
    expected = {**before, **reference.below(arrays, f"{run}/params/")}
    moved = {id(v) for v in variables}
    for key, variable in variables_by_name(model).items():
        found = variable.numpy()
        if id(variable) not in moved:
            np.testing.assert_array_equal(found, before[key], key)
        # A key's bias moves by normalized rounding noise.
        elif not key.endswith(parity.KEY_BIAS):
            difference = np.linalg.norm(found - expected[key])
            assert difference <= 2e-3 * np.linalg.norm(expected[key]), key


@pytest.mark.parametrize("sizes", [(4, 7), (5, 5), (6, 4)])
def test_positions_are_resampled(arrays, sizes):
    old, new = sizes
    prefix = f"positions/{old}_to_{new}"
    found = resample_positions(arrays[f"{prefix}/old"], (new, new), (old, old))
    np.testing.assert_allclose(found, arrays[f"{prefix}/new"], atol=1e-6)
