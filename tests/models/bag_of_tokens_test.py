"""SuperClass: targets, loss and counted frequencies against NumPy."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from conftest import two_devices

from cappa_tf.models.losses import bag_of_tokens
from cappa_tf.saving.run_folder import load_model

V, B = 30, 3
LABELS = [
    [[5, 7, 5, 1, 0, 0, 0, 0], [9, 1, 0, 0, 0, 0, 0, 0]],
    [[7, 7, 7, 8, 9, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]],
    [[6, 1, 0, 0, 0, 0, 0, 0], [6, 5, 8, 1, 0, 0, 0, 0]],
]


@pytest.fixture(scope="module")
def model():
    model = tiny.make_bag_of_tokens(V)
    model.build()
    random = np.random.RandomState(1)
    for variable in model.trainable_variables:
        variable.assign(random.normal(0, 0.3, variable.shape))
    counts = random.randint(0, 40, V)
    counts[6] = 40  # Every caption has it: it weighs nothing.
    model.head.document_frequency.assign(counts)
    model.head.num_documents.assign([40])
    return model


@pytest.fixture(scope="module")
def batch():
    images = np.random.RandomState(0).uniform(-1, 1, (B, 16, 16, 3))
    return {
        "image": tf.constant(images, tf.float32),
        "labels": tf.constant(LABELS, tf.int32),
        "index": tf.range(B, dtype=tf.int64),
    }


def test_the_loss_is_that_of_the_weighted_bag(model, batch):
    logits = model(batch["image"])["logits"].numpy()
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    counts = model.head.document_frequency.numpy()
    weights = np.log(41 / (counts + 1))
    losses = model.example_losses(batch, training=True)
    recall, known = losses.metrics["recall_at_10"]
    for row, captions in enumerate(LABELS):
        targets = []
        for caption in captions:
            target = np.zeros(V)
            target[[token for token in caption if token > 1]] = 1.0
            target *= weights
            if target.sum() > 0:
                targets.append(target / target.sum())
        target = np.mean(targets, axis=0)
        best = np.argsort(-logits[row])[:10]
        np.testing.assert_allclose(
            losses.loss[row], -(target * log_probs[row]).sum(), rtol=1e-5
        )
        np.testing.assert_allclose(recall[row], target[best].sum(), rtol=1e-5)
    np.testing.assert_array_equal(known, 1.0)


def test_a_caption_without_weight_has_no_loss(model, batch):
    only = tf.constant([[[6, 6, 1, 0]]] * B)
    losses = model.example_losses({**batch, "labels": only}, training=False)
    np.testing.assert_array_equal(losses.loss, 0.0)
    np.testing.assert_array_equal(losses.metrics["recall_at_10"][1], 0.0)


def test_tokens_weigh_alike_until_captions_are_counted():
    weights = bag_of_tokens.inverse_document_frequency(
        tf.zeros([V]), tf.zeros([])
    )
    np.testing.assert_array_equal(weights, 1.0)
    counts = tf.constant([0.0, 3.0, 7.0])
    weights = bag_of_tokens.inverse_document_frequency(counts, tf.constant(7.0))
    np.testing.assert_allclose(weights, np.log([8, 2, 1]), rtol=1e-6)


def test_frequencies_are_counted_by_caption(tmp_path):
    data = tiny.Data(tmp_path, examples=20)
    size = tiny.vocabulary(tmp_path)[1]
    model = tiny.make_bag_of_tokens(size, counted_images=15)
    model.build()
    assert model.prepare(data) == "token frequencies counted over 15 captions"
    expected = np.zeros(size)
    for row in data._labels[:15]:
        expected[np.unique(row)] += 1
    np.testing.assert_array_equal(model.head.document_frequency, expected)
    np.testing.assert_array_equal(model.head.num_documents, [15.0])
    with two_devices().scope():
        mirrored = tiny.make_bag_of_tokens(size, counted_images=15)
        mirrored.build()
    mirrored.prepare(data)
    counts = mirrored.head.document_frequency.value
    for device in two_devices().experimental_local_results(counts):
        np.testing.assert_array_equal(device, expected)


def test_a_run_counts_once_and_keeps_what_it_counted(tmp_path, monkeypatch):
    size = tiny.vocabulary(tmp_path)[1]
    reads = []
    read = tiny.Data.read_captions
    monkeypatch.setattr(
        tiny.Data,
        "read_captions",
        lambda self, limit: reads.append(limit) or read(self, limit),
    )
    options = {
        "model": lambda: tiny.make_bag_of_tokens(size),
        "eval_data": tiny.Data(tmp_path),
        "workdir": str(tmp_path / "run"),
        "final_evaluation": True,
    }
    tiny.run(tmp_path, **options)
    figures = tiny.run(tmp_path, **options, total_steps=8)
    assert reads == [100_000]
    log = (tmp_path / "run" / "train.log").read_text()
    assert "counted over 32 captions" in log and "resuming from" in log
    assert {"loss", "recall_at_10"} <= figures.keys()
    for weights in ("final", "latest"):
        model = load_model(tmp_path / "run", weights)
        np.testing.assert_array_equal(model.head.num_documents, [32.0])
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert not names & {"samples.png", "sheet.png"}


def test_a_saved_one_is_the_same(model, batch, tmp_path):
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.get_config() == model.get_config()
    np.testing.assert_array_equal(
        loaded.example_losses(batch, False).loss,
        model.example_losses(batch, False).loss,
    )


def test_refuses_an_encoder_without_a_pooled_feature(model):
    config = model.vision_encoder.get_config()
    encoder = type(model.vision_encoder)(**{**config, "pooling": "none"})
    with pytest.raises(ValueError, match="pooling='none'"):
        type(model)(encoder, V)
