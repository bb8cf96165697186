"""Captioning and contrastive loss together are the two losses, weighted."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny

from cappa_tf.models.captioner import Captioner
from cappa_tf.models.contrastive import Contrastive
from cappa_tf.models.contrastive_head import ContrastiveHead
from cappa_tf.models.text_encoder import TextEncoder

V, B, K = 20, 4, 2
WEIGHTS = {"captioning_weight": 2.0, "contrastive_weight": 0.5}


def randomize(model):
    random = np.random.RandomState(1)
    for variable in model.trainable_variables:
        if variable.name != "log_temperature":
            variable.assign(random.normal(0, 0.3, variable.shape))


@pytest.fixture(scope="module")
def model():
    model = tiny.make_contrastive_captioner(V, **WEIGHTS)
    model.build()
    randomize(model)
    return model


@pytest.fixture(scope="module")
def batch():
    random = np.random.RandomState(0)
    labels = random.randint(2, V, (B, K, tiny.LENGTH))
    labels[..., 5] = 1
    labels[..., 6:] = 0
    images = random.uniform(-1, 1, (B, 16, 16, 3))
    return {
        "image": tf.constant(images, tf.float32),
        "labels": tf.constant(labels, tf.int32),
        "index": tf.range(10, 10 + B, dtype=tf.int64),
    }


@pytest.fixture(scope="module")
def apart(model):
    """A captioner and a contrastive model of the same weights."""
    captioner = Captioner(
        model.vision_encoder,
        model.text_decoder,
        masked_pred_prob=model.masked_pred_prob,
        chunk_size=model.chunk_size,
    )
    two_towers = Contrastive(
        model.vision_encoder, model.text_encoder, embedding_dim=8
    )
    two_towers.build()
    two_towers.contrastive_head.set_weights(
        model.contrastive_head.get_weights()
    )
    return captioner, two_towers


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_the_weighted_sum_of_both(model, apart, batch, training):
    losses = model.example_losses(batch, training)
    captions, pairs = (one.example_losses(batch, training) for one in apart)
    np.testing.assert_allclose(
        losses.loss, 2.0 * captions.loss + 0.5 * pairs.loss, rtol=1e-6
    )
    assert losses.metrics.keys() == {*captions.metrics, *pairs.metrics}
    for name, (total, weight) in {**captions.metrics, **pairs.metrics}.items():
        np.testing.assert_allclose(losses.metrics[name][0], total, rtol=1e-6)
        np.testing.assert_allclose(losses.metrics[name][1], weight)
    # Both captions are predicted, the first alone is compared.
    tokens = np.sum(batch["labels"] != 0, axis=(1, 2))
    np.testing.assert_array_equal(losses.counts["tokens"], tokens)


def test_images_are_encoded_once(model, batch, monkeypatch):
    encoder, sizes = model.vision_encoder, []
    call = type(encoder).call

    def counted(self, images, *args, **kwargs):
        sizes.append(images.shape[0])
        return call(self, images, *args, **kwargs)

    monkeypatch.setattr(type(encoder), "call", counted)
    model.example_losses(batch, True)
    assert sizes == [B]


def test_it_scores_and_generates_as_the_models_apart(model, apart, batch):
    captioner, two_towers = apart
    kinds = ("autoregressive", "parallel", "blind", "cosine")
    assert model.score_kinds == kinds
    images, labels = batch["image"], batch["labels"]
    for kind in kinds:
        one = two_towers if kind == "cosine" else captioner
        expected = one.score_texts(images, labels[:, 0], kind)
        found = model.score_texts(images, labels[:, 0], kind)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        if kind != "blind":
            np.testing.assert_allclose(
                model.score_own_texts(images, labels, kind),
                one.score_own_texts(images, labels, kind),
                rtol=1e-6,
            )
    np.testing.assert_array_equal(
        model.generate(images)["tokens"], captioner.generate(images)["tokens"]
    )


def test_a_saved_one_is_the_same(model, batch, tmp_path):
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.get_config() == model.get_config()
    for kind in ("autoregressive", "cosine"):
        np.testing.assert_array_equal(
            loaded.score_own_texts(batch["image"], batch["labels"], kind),
            model.score_own_texts(batch["image"], batch["labels"], kind),
        )


def test_each_part_may_be_frozen(model):
    try:
        for name, part in model.parts.items():
            model.freeze([name])
            trained = {id(v) for v in model.trainable_variables}
            assert not trained & {id(v) for v in part.variables}
    finally:
        model.freeze([])


def test_refuses_parts_that_do_not_fit(model):
    parts = dict(model.parts)
    texts = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32}
    for name, other, message in (
        ("text_encoder", TextEncoder(V + 1, tiny.LENGTH, **texts), "21"),
        ("text_encoder", TextEncoder(V, tiny.LENGTH - 1, **texts), "7"),
        ("contrastive_head", ContrastiveHead(16, 8, 8), "text_dim=8"),
    ):
        with pytest.raises(ValueError, match=message):
            type(model)(**{**parts, name: other})
