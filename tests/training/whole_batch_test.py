"""A contrastive step is that of the global batch, however it is split."""

import numpy as np
import pytest
import tensorflow as tf
import tiny
from conftest import two_devices

from cappa_tf.training.construct import build_model
from cappa_tf.training.distribution.hosts import Hosts
from cappa_tf.training.distribution.strategies import (
    make_strategy,
    training_iterator,
)
from cappa_tf.training.gradients import TaskGradients
from cappa_tf.training.optimizers.adafactor import Adafactor
from cappa_tf.training.step import TrainLoop
from cappa_tf.training.validation import Validation

STEPS = 20
CONTRASTIVE = ("softmax", "sigmoid")
OBJECTIVES = {
    "softmax": {"loss": "softmax"},
    "sigmoid": {"loss": "sigmoid", "bias": -2.0, "chunk_size": 3},
    "captioning too": {"captioning_weight": 2.0, "contrastive_weight": 0.5},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vocabulary")


def train(folder, objective, strategy=None, **kwargs):
    """Weights, and the figures of each step of batch 8."""
    strategy = strategy or make_strategy("one")
    size = tiny.vocabulary(folder)[1]
    both = objective not in CONTRASTIVE
    make = tiny.make_contrastive_captioner if both else tiny.make_contrastive
    model, optimizer = build_model(
        # Dropout, which has to be the same in both passes.
        lambda: make(size, dropout=0.1, **OBJECTIVES[objective]),
        # The gradient of a key's bias is zero but for rounding; divided by its
        # own size it would be noise.
        lambda: Adafactor(0.01, epsilon=1e-3, momentum_dtype="float32"),
        strategy,
    )
    data = tiny.Data(folder, captions=2 if both else 1)
    iterator = training_iterator(strategy, data.train, 8)
    loop = TrainLoop(strategy, model, optimizer, 8, **kwargs)
    figures = [
        loop(iterator, 1)[0].figures for _ in range(5 if both else STEPS)
    ]
    weights = [v.numpy() for v in model.trainable_variables]
    return weights, {
        name: np.array([step[name] for step in figures]) for name in figures[0]
    }


@pytest.fixture(scope="module", params=list(OBJECTIVES))
def plain(request, folder):
    return request.param, train(folder, request.param)


def assert_same(plain, other, tolerance=1e-5):
    np.testing.assert_allclose(
        other[1]["loss"], plain[1]["loss"], rtol=tolerance
    )
    for name, values in plain[1].items():
        np.testing.assert_allclose(other[1][name], values, 1e-4, 1e-4, name)
    for a, b in zip(plain[0], other[0], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_the_loss_falls(plain):
    losses = np.divide(*plain[1][1]["loss"].T)
    if plain[0] not in CONTRASTIVE:
        return
    assert losses[-4:].mean() < 0.8 * losses[:4].mean()


def test_compiled_microbatches_are_the_whole_batch(folder, plain):
    objective, one = plain
    split = train(folder, objective, accumulation_steps=4, jit_compile=True)
    assert_same(one, split)


def test_two_devices_are_one(folder, plain):
    objective, one = plain
    assert_same(one, train(folder, objective, two_devices()))


def test_two_compiled_devices_with_microbatches_are_one(folder, plain):
    objective, one = plain
    if objective not in CONTRASTIVE:
        return
    split = train(
        folder, objective, two_devices(), accumulation_steps=2, jit_compile=True
    )
    assert_same(one, split)


def test_two_compiled_devices_are_one(folder, plain):
    objective, one = plain
    if objective == "softmax":
        compiled = train(folder, objective, two_devices(), jit_compile=True)
        assert_same(one, compiled)


def test_fit_on_several_devices_is_refused(folder):
    with two_devices().scope():
        model = tiny.make_contrastive(tiny.vocabulary(folder)[1])
        with pytest.raises(ValueError, match="compares the examples of one"):
            model.train_step({"image": tf.zeros([2, 16, 16, 3])})


@pytest.mark.parametrize(
    "make", [tiny.make_contrastive, tiny.make_contrastive_captioner]
)
def test_validation_compares_the_whole_batch_on_any_devices(folder, make):
    size = tiny.vocabulary(folder)[1]
    found = []
    for strategy in (make_strategy("one"), two_devices()):
        model, _ = build_model(lambda: make(size), Adafactor, strategy)
        # 30 examples in batches of 8: the last one is padded.
        data = tiny.Data(folder, examples=30)
        found.append(Validation(strategy, Hosts(strategy), model, data, 8)())
    one, two = found
    assert one["examples"] == 30
    assert two == pytest.approx(one, rel=1e-5)


def test_captions_that_are_all_alike_are_each_others_negatives(folder):
    """As in the reference: a match can only be guessed, and nothing is NaN."""
    model = tiny.make_contrastive(tiny.vocabulary(folder)[1])
    model.build()
    batch = next(iter(tiny.Data(folder).train(4)))
    batch["labels"] = tf.repeat(batch["labels"][:1], 4, axis=0)
    step = TaskGradients(model, 4)
    gradients, sums = step.of_batch(batch)
    sums = step.layout.unpacked(sums)
    assert float(sums.figures["loss"][0]) / 4 >= np.log(4) / 2
    assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 0.0}, "`temperature` must be a number > 0"),
        ({"temperature": float("nan")}, "`temperature`"),
        ({"loss": "sigmoid"}, "needs a `bias`"),
        ({"bias": float("inf")}, "`bias`"),
        ({"embedding_dim": (8, None)}, "one width"),
        ({"pooling": "none"}, "that pools"),
    ],
)
def test_arguments_out_of_range_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        tiny.make_contrastive(40, **given)


def test_a_batch_without_negatives_is_refused(folder, tmp_path):
    size = tiny.vocabulary(folder)[1]
    with pytest.raises(ValueError, match="`batch_size` must be at least 2"):
        tiny.run(
            folder,
            model=lambda: tiny.make_contrastive(size),
            workdir=str(tmp_path),
            batch_size=1,
        )


def test_an_embedding_does_not_depend_on_the_padding_of_its_batch(folder):
    """Also where the length of the texts is open, as with `length_buckets`."""
    model = tiny.make_contrastive(tiny.vocabulary(folder)[1])
    model.build()
    labels = tf.constant([[5, 6, 1, 0, 0], [7, 1, 0, 0, 0]])
    spec = tf.TensorSpec([None, None], tf.int32)
    embed = tf.function(model.embed_texts, [spec], autograph=False)
    expected = model.embed_texts(tf.pad(labels, [[0, 0], [0, 3]]))
    np.testing.assert_allclose(embed(labels), expected, atol=1e-6)
    np.testing.assert_allclose(model.embed_texts(labels), expected, atol=1e-6)
    with pytest.raises(ValueError, match="at most `max_length` tokens"):
        model.embed_texts(tf.zeros([1, 9], tf.int32))
