"""Contrastive training gives the reference's numbers.

Losses, gradients and six optimizer steps of the authors' implementation: all
weights, and with a frozen image tower (LiT).
"""

import numpy as np
import numpy_reference as reference
import parity
import pytest
import tensorflow as tf
from conftest import shared_reference

from cappa_tf.saving import big_vision
from cappa_tf.training.gradients import TaskGradients
from cappa_tf.training.optimizers.adafactor import Adafactor
from cappa_tf.training.optimizers.adamw import AdamW
from cappa_tf.training.optimizers.base import global_norm
from cappa_tf.training.optimizers.schedules import Cosine

FILES = ("clip_tiny", "siglip_tiny", "lit_tiny")


def read(name):
    return dict(np.load(shared_reference(f"{name}.npz")))


def load(arrays):
    stored = {k: v for k, v in arrays.items() if k.startswith("params/")}
    return big_vision.load_two_towers(stored)


def batch_of(arrays):
    count = len(arrays["text"])
    return {
        "image": tf.constant(arrays["image"]),
        "labels": tf.constant(arrays["text"][:, None], tf.int32),
        "index": tf.range(count, dtype=tf.int64),
    }


@pytest.fixture(scope="module", params=FILES)
def case(request):
    arrays = read(request.param)
    return arrays, load(arrays)


def variables_by_name(model):
    """Every variable by its name in big_vision."""
    found = {}
    for prefix, rows, part in big_vision.two_towers_rows(model):
        for row, (variable,) in big_vision.paired(rows, part):
            found[prefix + row.name] = variable
    return found


@pytest.mark.parametrize(
    ("accumulation_steps", "jit_compile"), [(1, False), (4, True)]
)
def test_loss_and_gradients(case, accumulation_steps, jit_compile):
    arrays, model = case
    loss, gradients = parity.task_gradients(
        model, batch_of(arrays), accumulation_steps, jit_compile
    )
    assert float(loss) == pytest.approx(float(arrays["loss"]), rel=1e-5)
    numbers = {id(v): i for i, v in enumerate(model.trainable_variables)}
    found = {
        name: np.asarray(gradients[numbers[id(variable)]])
        for name, variable in variables_by_name(model).items()
    }
    parity.check_gradients(found, reference.below(arrays, "grads/"))


def test_losses_of_the_examples(case):
    arrays, model = case
    losses = model.example_losses(batch_of(arrays), training=False)
    mean = float(tf.reduce_mean(losses.loss))
    assert mean == pytest.approx(float(arrays["loss"]), rel=1e-5)
    if "losses" in arrays:
        np.testing.assert_allclose(losses.loss, arrays["losses"], rtol=1e-5)


def test_half_a_batch_has_fewer_negatives(case):
    """What gathering is for: this would be the loss without it."""
    arrays, model = case
    batch = {k: x[: len(x) // 2] for k, x in batch_of(arrays).items()}
    losses = model.example_losses(batch, training=False)
    mean = float(tf.reduce_mean(losses.loss))
    expected = float(arrays["loss_of_first_half_alone"])
    assert mean == pytest.approx(expected, rel=1e-5)


def test_each_device_against_all_texts(case):
    arrays, model = case
    if "devices/count" not in arrays:
        pytest.skip("of the sigmoid loss alone")
    batch, count = batch_of(arrays), int(arrays["devices/count"])
    images, texts, _ = model.embed(batch, training=False)
    size = images.shape[0] // count
    for device, expected in enumerate(arrays["devices/loss_per_device"]):
        own = (device * size, size)
        losses = model.batch_losses(images, texts, own)
        mean = float(tf.reduce_mean(losses.loss))
        assert mean == pytest.approx(float(expected), rel=1e-5)


def test_evaluation_leaves_masked_pairs_out(case):
    arrays, model = case
    if "masked/mask" not in arrays:
        pytest.skip("of the softmax loss alone")
    mask = arrays["masked/mask"].astype("float32")
    batch = {**batch_of(arrays), "_mask": tf.constant(mask)}
    losses = model.example_losses(batch, training=False)
    kept = mask > 0
    np.testing.assert_allclose(
        losses.loss.numpy()[kept], arrays["masked/losses"][kept], rtol=1e-5
    )
    total, weight = losses.metrics["contrastive/loss"]
    mean = float(tf.reduce_sum(total) / tf.reduce_sum(weight))
    assert mean == pytest.approx(float(arrays["masked/loss"]), rel=1e-5)
    correct = losses.metrics["contrastive/accuracy"][0].numpy()
    np.testing.assert_array_equal(
        correct[kept], arrays["masked/correct"][kept].astype("float32")
    )


SETTINGS = {
    "learning_rate": 3e-3,
    "weight_decay": 1e-2,
    "global_clip_norm": 0.5,
    "schedule": Cosine(total_steps=9, warmup_steps=3),
}
# Name in the arrays -> (optimizer, parts frozen, layers of them trained).
RUNS = {
    "optimizer": (lambda: Adafactor(**SETTINGS, beta2_cap=0.95), (), ()),
    # The reference counts an output head with its tower.
    "lit": (
        lambda: AdamW(**SETTINGS),
        ("vision_encoder", "contrastive_head/image"),
        (),
    ),
    "lit_pooling": (
        lambda: Adafactor(**SETTINGS, beta2_cap=0.95),
        ("vision_encoder",),
        ("vision_encoder/pool",),
    ),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", FILES)
def test_six_steps_of_training(name, run):
    arrays = read(name)
    if f"{run}/losses" not in arrays:
        pytest.skip("an image tower without a MAP head")
    model, batch = load(arrays), batch_of(arrays)
    make_optimizer, frozen, trained = RUNS[run]
    if model.contrastive_head.embedding_dim[0] is None:
        frozen = [part for part in frozen if part == "vision_encoder"]
    model.freeze(frozen, trained)
    optimizer = make_optimizer()
    variables = model.trainable_variables
    optimizer.build(variables)
    task_gradients = TaskGradients(model, batch["image"].shape[0])

    @tf.function(autograph=False)
    def step():
        gradients, sums = task_gradients.of_batch(batch)
        optimizer.apply(gradients, variables)
        total, weight = task_gradients.layout.unpacked(sums).figures["loss"]
        return total / weight, global_norm(gradients)

    steps = [step() for _ in range(6)]
    losses, norms = np.array(steps).T
    np.testing.assert_allclose(losses, arrays[f"{run}/losses"], rtol=1e-5)
    np.testing.assert_allclose(
        norms, arrays[f"{run}/gradient_norms"], rtol=1e-4
    )
    before = reference.below(arrays, "params/")
    expected = {**before, **reference.below(arrays, f"{run}/params/")}
    moved = reference.below(arrays, f"{run}/params/").keys()
    for key, variable in variables_by_name(model).items():
        wanted, found = expected[key], variable.numpy()
        if key not in moved:
            np.testing.assert_array_equal(found, before[key], key)
        # A key's bias moves by normalised rounding noise.
        elif not key.endswith(parity.KEY_BIAS):
            difference = np.linalg.norm(found - wanted)
            assert difference <= 2e-3 * np.linalg.norm(wanted), key
