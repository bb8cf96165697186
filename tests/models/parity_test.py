"""The captioner reproduces the reference's numbers.

Three references: arrays of the authors' implementation (if they are
available), golden arrays of this project (testdata/make_golden.py), and a NumPy
model for other sizes.
"""

import functools
import pathlib

import keras
import numpy as np
import numpy_reference as reference
import parity
import pytest
import tensorflow as tf
from conftest import shared_reference

from cappa_tf.saving import big_vision
from cappa_tf.training.optimizers.adafactor import Adafactor
from cappa_tf.training.optimizers.schedules import Cosine, Linear, Rsqrt

GOLDEN = pathlib.Path(__file__).parents[1] / "testdata/golden_captioner.npz"
# Image sizes that the arrays do not tell.
IMAGE_SIZES = {"golden": (8, 6), "authors": None}
OPTIMIZERS = {
    "golden": {
        "learning_rate": 3e-3,
        "weight_decay": 1e-2,
        "global_clip_norm": 0.5,
        "beta2_cap": 0.6,
        "min_dim_size_to_factor": 8,
        "schedule": Cosine(total_steps=8, warmup_steps=2),
    },
    "authors": {
        "learning_rate": 3e-3,
        "weight_decay": 1e-2,
        "global_clip_norm": 0.5,
        "beta2_cap": 0.95,
        "schedule": Cosine(total_steps=9, warmup_steps=3),
    },
}


def close(found, expected, tolerance=2e-5):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def load(name, arrays):
    return big_vision.load_captioner(arrays, IMAGE_SIZES[name])


def read(name):
    if name == "authors":
        return dict(np.load(shared_reference("cappa_tiny.npz")))
    return dict(np.load(GOLDEN))


@pytest.fixture(scope="module", params=["golden", "authors"])
def case(request):
    """(name, arrays, captioner)."""
    arrays = read(request.param)
    return request.param, arrays, load(request.param, arrays)


def check_predictions(captioner, arrays, jit_compile):
    """encoded, pre_logits, logits and scores of one model."""
    modes = [m for m in parity.MODES if f"logits_{m}" in arrays]

    def predict(image, text, labels):
        return {
            **captioner.vision_encoder(image),
            **{
                f"logits_{mode}": captioner.logits(
                    image, text, parallel=mode == "parallel"
                )
                for mode in modes
            },
            "scores": captioner.score(image, labels),
        }

    found = parity.compiled(predict, jit_compile)(
        arrays["image"], arrays["text"], arrays["score_labels"]
    )
    for name in found.keys() - {"scores"}:
        close(found[name], arrays[name])
    np.testing.assert_allclose(found["scores"], arrays["scores"], rtol=1e-5)


def test_predictions(case):
    check_predictions(case[2], case[1], jit_compile=False)


def test_compiled_predictions():
    arrays = read("golden")
    check_predictions(load("golden", arrays), arrays, jit_compile=True)


def test_nll_of_captions(case):
    _, arrays, captioner = case
    batch = {
        "image": tf.constant(arrays["image"]),
        "labels": tf.constant(arrays["text"][:, None]),
    }
    parts = captioner.compute_losses(batch, training=False)
    expected = arrays["nll_per_caption"]
    np.testing.assert_allclose(parts["nll"], expected, rtol=1e-5)


def check_loss_and_gradients(captioner, arrays, mode, loss, gradients):
    assert float(loss) == pytest.approx(float(arrays[f"loss_{mode}"]), rel=1e-5)
    found = parity.by_name(captioner, gradients)
    expected = reference.below(arrays, f"grads_{mode}/")
    parity.check_gradients(found, expected)


@pytest.mark.parametrize(
    ("name", "jit_compile"),
    [
        ("golden", False),
        ("golden", True),
        ("authors", False),
        # Compiling Adafactor for 70 arrays takes half a minute, once is enough.
        pytest.param("authors", True, marks=pytest.mark.slow),
    ],
)
def test_six_steps_of_training(name, jit_compile):
    arrays = read(name)
    captioner = load(name, arrays)
    optimizer = Adafactor(**OPTIMIZERS[name])
    optimizer.build(captioner.trainable_variables)
    batches = parity.batches_of(captioner, arrays["image"], arrays["text"])

    def step(batch):
        loss, gradients = parity.loss_and_gradients(captioner, batch)
        optimizer.apply(gradients, captioner.trainable_variables)
        return loss, gradients

    step = parity.compiled(step, jit_compile)
    losses = []
    for number in range(6):
        mode = parity.MODES[(number + 1) % 2]
        loss, gradients = step(batches[mode])
        losses.append(float(loss))
        # The first multiplier of the warm-up is 0: weights are still those of
        # the file in both of the first two steps, one of each objective.
        if number < 2:
            check_loss_and_gradients(captioner, arrays, mode, loss, gradients)
    np.testing.assert_allclose(losses, arrays["optimizer/losses"], rtol=1e-4)
    expected = reference.below(arrays, "optimizer/params/")
    found = parity.variables_by_name(captioner)
    assert found.keys() == expected.keys()
    for key, wanted in expected.items():
        # A key bias of the encoder changes by normalized rounding noise.
        if not key.endswith(parity.KEY_BIAS):
            difference = np.linalg.norm(found[key].numpy() - wanted)
            assert difference <= 2e-3 * np.linalg.norm(wanted), key


def test_compiled_gradients_of_the_authors():
    arrays = read("authors")
    captioner = load("authors", arrays)
    batches = parity.batches_of(captioner, arrays["image"], arrays["text"])
    step = functools.partial(parity.loss_and_gradients, captioner)
    step = parity.compiled(step, jit_compile=True)
    for mode, batch in batches.items():
        check_loss_and_gradients(captioner, arrays, mode, *step(batch))


def test_mixed_precision_stays_close(case):
    name, arrays, _ = case
    policy = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy("mixed_bfloat16")
        mixed = load(name, arrays)
    finally:
        keras.config.set_dtype_policy(policy)
    assert mixed.text_decoder.compute_dtype == "bfloat16"
    batches = parity.batches_of(mixed, arrays["image"], arrays["text"])
    for mode, batch in batches.items():
        loss, found = parity.loss_and_gradients(mixed, batch)
        wanted = float(arrays[f"loss_{mode}"])
        assert float(loss) == pytest.approx(wanted, rel=0.01)
        found = parity.by_name(mixed, found)
        a, b = (
            np.concatenate([np.ravel(g[key]) for key in sorted(found)])
            for g in (found, reference.below(arrays, f"grads_{mode}/"))
        )
        cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
        assert cosine >= 0.995, mode


# Other sizes than in the files: (what the arrays do not tell, sizes).
VARIANTS = {
    "wide": (
        (24, 8),
        reference.Sizes(
            width=24,
            heads=3,
            depth=2,
            mlp=20,
            patch=(8, 4),
            image=(24, 8),
            vocabulary=31,
            length=9,
            decoder_bias=True,
            decoder_width=16,
            decoder_heads=4,
            decoder_depth=2,
            decoder_mlp=40,
        ),
    ),
    "sincos2d": (
        (8, 12),
        reference.Sizes(
            image=(8, 12), learned=False, heads=4, depth=3, length=7
        ),
    ),
    "one head, no MASK, square": (
        None,
        reference.Sizes(heads=1, mask=False, vocabulary=50, length=3),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_sizes_that_are_in_no_file(name):
    image_size, sizes = VARIANTS[name]
    p = reference.random_captioner(sizes)
    image, text = reference.random_batch(sizes)
    labels = reference.random_batch(sizes, batch=4, seed=5)[1]
    captioner = big_vision.load_captioner(p, image_size)
    modes = parity.MODES if sizes.mask else parity.MODES[:1]
    scores = {
        m: reference.logits(p, image, text, m == "parallel") for m in modes
    }
    expected = {
        "image": image,
        "text": text,
        "score_labels": labels,
        "scores": reference.scores(p, image, labels),
        **{f"logits_{mode}": value for mode, value in scores.items()},
        **reference.vit(reference.below(p, "encoder/"), image),
    }
    check_predictions(captioner, expected, jit_compile=False)
    for mode in modes:
        check_slopes(captioner, p, image, text, mode)


def check_slopes(captioner, p, image, text, mode):
    """The gradient times random directions equals finite differences."""
    captioner.masked_pred_prob = float(mode == "parallel")
    index = tf.range(len(text), dtype=tf.int64)
    batch = {
        "image": image,
        "labels": tf.constant(text)[:, None],
        "index": index,
    }
    loss, found = parity.loss_and_gradients(captioner, batch)
    found = parity.by_name(captioner, found)

    def at(p):
        return reference.loss(p, image, text, mode == "parallel")

    assert float(loss) == pytest.approx(at(p), rel=1e-5)
    rng = np.random.default_rng(0)
    for _ in range(2):
        # Half along the gradient of each array, half anywhere.
        direction = {
            k: g / np.linalg.norm(g) * rng.normal()
            + rng.normal(size=g.shape) / g.size**0.5
            for k, g in found.items()
            if not k.endswith(parity.KEY_BIAS) or k.startswith("decoder")
        }
        parts = [np.sum(direction[k] * found[k]) for k in direction]
        expected = reference.slope(at, p, direction)
        assert abs(sum(parts) - expected) <= 1e-4 * np.linalg.norm(parts)


def test_scanned_model_of_the_authors():
    arrays = dict(np.load(shared_reference("cappa_scan.npz")))
    captioner = big_vision.load_captioner(arrays)
    close(captioner.encode(arrays["image"]), arrays["encoded"])
    found = captioner.logits(arrays["image"], arrays["text"])
    close(found, arrays["logits_autoregressive"])


def test_encoder_of_the_authors_with_class_token_and_head():
    arrays = dict(np.load(shared_reference("vit_tok_head.npz")))
    found = big_vision.load_vision_encoder(arrays)(arrays["image"])
    close(found["encoded"], arrays["encoded"])
    close(found["pre_logits"], arrays["pre_logits"])
    close(found["logits"], arrays["output"])


def test_schedules_of_the_authors():
    arrays = np.load(shared_reference("cappa_tiny.npz"))
    schedules = {
        "cosine": Cosine(100, warmup_steps=10),
        "rsqrt": Rsqrt(100, warmup_steps=10, cooldown_steps=20, timescale=15),
        "linear": Linear(100, warmup_steps=5, end=0.1),
    }
    steps = tf.range(100, dtype=tf.float32)
    for name, schedule in schedules.items():
        found = tf.map_fn(schedule, steps)
        close(found, arrays[f"schedule/{name}"], 1e-6)
