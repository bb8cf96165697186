"""The captioner gives the reference's numbers.

Three witnesses: arrays of the authors' implementation (where they are at
hand), golden arrays of this project (testdata/make_golden.py), and a NumPy
model for sizes that are in neither.
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

from cappa_tf.export import big_vision
from cappa_tf.training.adafactor import Adafactor
from cappa_tf.training.schedules import Cosine, Linear, Rsqrt

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
JIT = pytest.mark.parametrize("jit_compile", [False, True])


def close(found, expected, tolerance=2e-5):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def load(name, arrays):
    captioner = big_vision.load_captioner(arrays, IMAGE_SIZES[name])
    return captioner


@pytest.fixture(scope="module", params=["golden", "authors"])
def case(request):
    """(name, arrays, captioner)."""
    path = GOLDEN
    if request.param == "authors":
        path = shared_reference("cappa_tiny.npz")
    arrays = dict(np.load(path))
    return request.param, arrays, load(request.param, arrays)


def check_predictions(captioner, arrays, jit_compile):
    """encoded, pre_logits, logits, nll and scores of one model."""
    image, text = arrays["image"], arrays["text"]
    batch = parity.batch_of(image, text)

    def predict(image, text):
        return {
            **captioner.vision_encoder(image),
            "logits_autoregressive": captioner.logits(image, text),
            "logits_parallel": captioner.logits(image, text, parallel=True)
            if captioner.text_decoder.use_mask_token
            else 0.0,
            "nll": captioner.compute_losses(batch, training=False)["nll"],
            "scores": captioner.score(image, arrays["score_labels"]),
        }

    found = parity.compiled(predict, jit_compile)(image, text)
    for name in (
        "encoded",
        "pre_logits",
        *map("logits_{}".format, parity.MODES),
    ):
        if name in arrays:
            close(found[name], arrays[name])
    for name, key in (("nll", "nll_per_caption"), ("scores", "scores")):
        np.testing.assert_allclose(found[name], arrays[key], rtol=1e-5)


@JIT
def test_predictions(case, jit_compile):
    check_predictions(case[2], case[1], jit_compile)


@JIT
@pytest.mark.parametrize("mode", parity.MODES)
def test_losses_and_gradients(case, mode, jit_compile):
    _, arrays, captioner = case
    batch = parity.batch_of(arrays["image"], arrays["text"])
    loss, found = parity.gradients_by_name(captioner, batch, mode, jit_compile)
    assert loss == pytest.approx(float(arrays[f"loss_{mode}"]), rel=1e-5)
    parity.check_gradients(found, reference.below(arrays, f"grads_{mode}/"))


@JIT
def test_six_optimizer_steps(case, jit_compile):
    name, arrays, _ = case
    captioner = load(name, arrays)
    optimizer = Adafactor(**OPTIMIZERS[name])
    optimizer.build(captioner.trainable_variables)
    batch = parity.batch_of(arrays["image"], arrays["text"])

    def step(mode):
        parity.set_mode(captioner, mode)
        loss, gradients = parity.loss_and_gradients(captioner, batch)
        optimizer.apply(gradients, captioner.trainable_variables)
        return loss

    steps = {
        mode: parity.compiled(functools.partial(step, mode), jit_compile)
        for mode in parity.MODES
    }
    order = ("parallel", "autoregressive") * 3
    losses = [float(steps[mode]()) for mode in order]
    np.testing.assert_allclose(losses, arrays["optimizer/losses"], rtol=1e-4)
    expected = reference.below(arrays, "optimizer/params/")
    found = parity.variables_by_name(captioner)
    assert found.keys() == expected.keys()
    for key, wanted in expected.items():
        # A key bias of the encoder moves by normalised rounding noise.
        if not key.endswith(parity.KEY_BIAS):
            difference = np.linalg.norm(found[key].numpy() - wanted)
            assert difference <= 2e-3 * np.linalg.norm(wanted), key


def test_mixed_precision_stays_close(case):
    name, arrays, captioner = case
    policy = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy("mixed_bfloat16")
        mixed = load(name, arrays)
    finally:
        keras.config.set_dtype_policy(policy)
    assert mixed.text_decoder.compute_dtype == "bfloat16"
    batch = parity.batch_of(arrays["image"], arrays["text"])
    for mode in parity.MODES:
        loss, found = parity.gradients_by_name(mixed, batch, mode)
        assert loss == pytest.approx(float(arrays[f"loss_{mode}"]), rel=0.01)
        pair = [
            np.concatenate([np.ravel(g[key]) for key in sorted(found)])
            for g in (found, reference.below(arrays, f"grads_{mode}/"))
        ]
        cosine = pair[0] @ pair[1] / np.prod([np.linalg.norm(g) for g in pair])
        assert cosine >= 0.995, mode


# Sizes that are in no file: (what the arrays do not tell, sizes).
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
    nll = reference.token_nll(scores["autoregressive"], text).sum(1)
    expected = {
        "image": image,
        "text": text,
        "score_labels": labels,
        "scores": reference.scores(p, image, labels),
        "nll_per_caption": nll,
        **{f"logits_{mode}": value for mode, value in scores.items()},
        **reference.vit(reference.below(p, "encoder/"), image),
    }
    for jit_compile in (False, True):
        check_predictions(captioner, expected, jit_compile)
    for mode in modes:
        check_slopes(captioner, p, image, text, mode)


def check_slopes(captioner, p, image, text, mode):
    """The gradient times random directions is what differences give."""
    batch = parity.batch_of(image, text)
    loss, found = parity.gradients_by_name(captioner, batch, mode)

    def at(p):
        return reference.loss(p, image, text, mode == "parallel")

    assert loss == pytest.approx(at(p), rel=1e-5)
    rng = np.random.default_rng(0)
    for _ in range(3):
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
