"""Scores equal those of the logits, whatever the padding."""

import numpy as np
import pytest
import scoring
import tensorflow as tf
from random_contrastive import make_contrastive

from cappa_tf.data.preprocessing import ImagePreprocessing
from cappa_tf.data.tokenizer import Tokenizer
from cappa_tf.export.keras_backbone import save_backbone
from cappa_tf.inference import predictor as predictors
from cappa_tf.inference.predictor import Predictor
from cappa_tf.models.classifier import Classifier
from cappa_tf.models.vision_encoder import VisionEncoder
from cappa_tf.saving import big_vision, siglip

TEXTS = [["red circle"], ["blue", "green square left", "above"], ["left red"]]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return scoring.tiny_predictor(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def images():
    random = np.random.default_rng(0)
    return random.uniform(-1, 1, (3, 16, 16, 3)).astype("float32")


def by_logits(predictor, image, text, parallel=False):
    labels = predictor.tokenizer([text]).numpy()
    logits = predictor.model.logits(image[None], labels, parallel)
    log_p = tf.nn.log_softmax(logits).numpy()[0]
    tokens = labels[0][labels[0] != 0]
    return log_p[np.arange(len(tokens)), tokens].sum()


@pytest.mark.parametrize(
    "mode", [predictors.AUTOREGRESSIVE, predictors.PARALLEL]
)
def test_captions_score_as_their_logits_say(predictor, images, mode):
    found = predictor.score_captions(images, TEXTS, mode)
    assert [len(row) for row in found] == [1, 3, 1]
    for image, texts, scores in zip(images, TEXTS, found):
        for text, score in zip(texts, scores):
            wanted = by_logits(
                predictor, image, text, mode == predictors.PARALLEL
            )
            assert score == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("mode", ["autoregressive", "parallel", "blind"])
def test_labels_are_captions_of_all_images(predictor, images, mode):
    texts = TEXTS[1]
    rows = predictor.score_captions(images, [texts] * 3, mode)
    np.testing.assert_allclose(
        predictor.score(images, texts, mode), np.stack(rows), rtol=1e-4
    )


def test_blind_is_the_decoder_without_memory(predictor, images):
    labels = predictor.tokenizer(TEXTS[1]).numpy()
    shifted = np.pad(labels, ((0, 0), (1, 0)))[:, :-1]
    decoder = predictor.model.text_decoder
    log_p = tf.nn.log_softmax(decoder.logits(decoder(shifted))).numpy()
    chosen = np.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    wanted = (chosen * (labels != 0)).sum(-1)
    np.testing.assert_allclose(predictor.blind(TEXTS[1]), wanted, rtol=1e-4)
    assert (
        np.ptp(
            predictor.score(images, TEXTS[1], predictors.BLIND), axis=0
        ).max()
        == 0
    )


def test_many_texts_go_in_passes(predictor, images, monkeypatch):
    whole = predictor.score_captions(images, TEXTS)
    monkeypatch.setattr(predictors, "_TEXTS_PER_PASS", 2)
    for one, other in zip(
        predictor.score_captions(images, TEXTS), whole, strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_what_cannot_be_scored_is_refused(predictor, images):
    with pytest.raises(ValueError, match="batch_size=4"):
        predictor.score(np.repeat(images, 2, axis=0), ["red"])
    with pytest.raises(ValueError, match=r"lists of \[1, 0, 1\] texts"):
        predictor.score_captions(images, [["a"], [], ["b"]])
    with pytest.raises(ValueError, match="kind='paralel'"):
        predictor.score(images, ["red"], "paralel")


@pytest.fixture(scope="module")
def contrastive(tmp_path_factory):
    return scoring.contrastive_predictor(tmp_path_factory.mktemp("vocabulary"))


def test_cosines_are_those_of_the_model(contrastive, images):
    assert contrastive.capabilities == ("features", "cosine")
    texts = ["red circle", "blue", "Red circle"]
    labels = contrastive.tokenizer(texts)
    wanted = contrastive.model.score_texts(images, labels)
    found = contrastive.score(images, texts)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    # Equal tokens score equally, to the last bit.
    np.testing.assert_array_equal(found[:, 0], found[:, 2])
    rows = contrastive.score_captions(images, TEXTS)
    assert [len(row) for row in rows] == [1, 3, 1]
    for image, own, row in zip(images, TEXTS, rows):
        whole = contrastive.score(image[None], own)
        np.testing.assert_allclose(row, whole[0], atol=1e-6)


def test_embeddings_of_any_number_of_images(contrastive, images):
    many = np.concatenate([images, images])  # more than `batch_size`
    found = contrastive.embed_images(many)
    np.testing.assert_allclose(
        found, contrastive.model.embed_images(many), atol=1e-6
    )
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    texts = contrastive.embed_texts(["red"])
    np.testing.assert_allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-5)


def test_what_has_no_embeddings_or_no_tokens_says_so(predictor, contrastive):
    with pytest.raises(ValueError, match="Embedding texts.*cosine.*Captioner"):
        predictor.embed_texts(["red"])
    with pytest.raises(ValueError, match="generate.*predicts no tokens"):
        contrastive.make_decoder()


def test_a_model_never_trained_in_parallel_has_no_such_score(predictor):
    config = {**predictor.model.get_config(), "masked_pred_prob": 0.0}
    cap = type(predictor.model).from_config(config)
    found = predictors.Predictor(
        cap, predictor.tokenizer, scoring.PREPROCESSING
    )
    assert found.score_kinds == ("autoregressive", "blind")
    with pytest.raises(ValueError, match="Somebody.*parallel.*Captioner"):
        found.require("Somebody", "parallel")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    vocabulary = tmp_path_factory.mktemp("vocabulary")
    return scoring.save_run(tmp_path_factory.mktemp("run"), vocabulary)


ALL = ("features", "generate", "autoregressive", "parallel", "blind")


def test_one_call_opens_every_kind_of_model(run, tmp_path, images):
    whole = Predictor.open(run)
    assert (
        whole.capabilities == Predictor.open(run / "model.keras").capabilities
    )
    assert whole.capabilities == ALL
    model = whole.model
    model.save(tmp_path / "alone.keras")
    model.vision_encoder.save(run / "encoder.keras")
    big_vision.save_captioner(model, tmp_path / "captioner.npz")
    big_vision.save_vision_encoder(model.vision_encoder, tmp_path / "vit.npz")
    save_backbone(model.vision_encoder, tmp_path / "backbone.keras")
    wanted = whole.features(images)
    assert wanted.shape == (3, 16)
    for path in (
        tmp_path / "alone.keras",
        run / "encoder.keras",
        tmp_path / "captioner.npz",
        tmp_path / "vit.npz",
        tmp_path / "backbone.keras",
    ):
        found = Predictor.open(path)
        assert found.capabilities == ("features",)
        assert found.image_size == (16, 16)
        np.testing.assert_allclose(
            found.features(images), wanted, rtol=1e-4, atol=1e-5
        )
        with pytest.raises(ValueError, match=f"X needs .*{path}"):
            found.require("X", "generate")


def test_a_vocabulary_makes_a_lone_captioner_speak(run, tmp_path, images):
    whole = Predictor.open(run)
    whole.model.save(tmp_path / "alone.keras")
    big_vision.save_captioner(whole.model, tmp_path / "captioner.npz")
    for name in ("alone.keras", "captioner.npz"):
        found = Predictor.open(tmp_path / name, tokenizer=whole.tokenizer)
        assert found.capabilities[:2] == ("features", "generate")
        np.testing.assert_allclose(
            found.score(images, ["red circle"]),
            whole.score(images, ["red circle"]),
            rtol=1e-4,
        )


def test_a_vocabulary_makes_two_towers_read(run, tmp_path, images):
    """From every format; without it, they are their image tower."""
    tokenizer = Predictor.open(run).tokenizer
    model = make_contrastive(
        vocabulary=tokenizer.vocabulary_size, length=tokenizer.max_length
    )
    model.save(tmp_path / "towers.keras")
    model.vision_encoder.save(run / "encoder.keras")
    big_vision.save_two_towers(model, tmp_path / "towers.npz")
    texts = ["red circle", "blue"]
    wanted = model.score_texts(images, tokenizer(texts))
    for name in ("towers.keras", "towers.npz"):
        assert Predictor.open(tmp_path / name).capabilities == ("features",)
        found = Predictor.open(tmp_path / name, tokenizer=tokenizer)
        assert found.capabilities == ("features", "cosine")
        scores = found.score(images, texts)
        np.testing.assert_allclose(scores, wanted, atol=1e-5)
    found = Predictor.open(tmp_path / "towers.npz", tokenizer=tokenizer.path)
    assert found.tokenizer.max_length == tokenizer.max_length
    with pytest.raises(ValueError, match="for a model without a vocabulary"):
        Predictor.open(run, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="for a model that reads texts"):
        Predictor.open(run / "encoder.keras", tokenizer=tokenizer.path)
    longer = Tokenizer(tokenizer.path, tokenizer.max_length + 1)
    with pytest.raises(ValueError, match="towers.npz have at most 8 tokens"):
        Predictor.open(tmp_path / "towers.npz", tokenizer=longer)
    pytest.importorskip("safetensors", reason="pip install '.[interop]'")
    siglip.save_siglip(model, tmp_path / "with", tokenizer)
    siglip.save_siglip(model, tmp_path / "without")
    found = Predictor.open(tmp_path / "without")
    assert found.capabilities == ("features",)
    found = Predictor.open(tmp_path / "with")
    scores = found.score(images, texts)
    np.testing.assert_allclose(scores, wanted, atol=1e-5)


def test_features_of_a_classifier_are_what_its_head_reads():
    """As for a file of big_vision with a layer `pre_logits`."""
    encoder = VisionEncoder(
        hidden_dim=16,
        num_layers=1,
        num_heads=2,
        mlp_dim=24,
        patch_size=4,
        image_size=8,
    )
    model = Classifier(encoder, rep_size=6)
    model.build()
    images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3))
    images = images.astype("float32")
    found = Predictor(model, None, ImagePreprocessing(8)).features(images)
    assert found.shape == (2, 6)
    np.testing.assert_allclose(found, model(images)["pre_logits"], atol=1e-5)
