"""Encoders from all sources give the features of their source."""

import shutil

import keras
import numpy as np
import pytest
import tiny
from harness import check_config, randomize
from keras_nlp import models
from labelled import SIDE, keras_model

from cappa_tf.inference.predictor import Predictor
from cappa_tf.models.classifier import Classifier
from cappa_tf.models.encoder_adapter import EncoderAdapter
from cappa_tf.models.positions import resample_positions
from cappa_tf.models.vision_encoder import VisionEncoder
from cappa_tf.saving import big_vision, siglip
from cappa_tf.saving.checkpoints import named_variables
from cappa_tf.saving.encoders import image_size, open_encoder
from cappa_tf.saving.weights import POSITIONS, variables_by_path

IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, SIDE, SIDE, 3))
IMAGES = IMAGES.astype(np.float32)


def make_encoder(**kwargs):
    sizes = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 24}
    sizes |= {"patch_size": 8, "image_size": SIDE, **kwargs}
    encoder = VisionEncoder(**sizes)
    encoder.build()
    randomize(encoder)
    return encoder


@pytest.fixture(scope="module", name="ours")
def _ours(tmp_path_factory):
    path = tmp_path_factory.mktemp("ours") / "encoder.keras"
    encoder = make_encoder(dropout=0.5, patch_dropout=0.5, remat=True)
    encoder.save(path)
    return encoder, str(path)


def same(encoder, source, training=False):
    np.testing.assert_allclose(
        encoder(IMAGES, training=training)["pre_logits"],
        source(IMAGES)["pre_logits"],
        atol=1e-5,
    )


def save_classifier(encoder, path):
    model = Classifier(encoder, 3)
    model.build()
    model.save(path)


def test_our_encoder_comes_without_its_dropout(ours):
    source, path = ours
    encoder = open_encoder(path)
    same(encoder, source, training=True)
    assert encoder.trainable and not encoder.remat
    assert image_size(path) == (SIDE, SIDE)


def test_another_size_has_resampled_positions_and_a_new_pooling_is_new(ours):
    source, path = ours
    encoder = open_encoder(path, image_size=(24, 40), pooling="map")
    old, new = variables_by_path(source), variables_by_path(encoder)
    expected = resample_positions(old[POSITIONS].numpy(), (3, 5), (2, 2))
    np.testing.assert_array_equal(new[POSITIONS].numpy(), expected)
    added = new.keys() - old.keys()
    assert added and all(name.startswith("pool/") for name in added)
    for name in old.keys() - {POSITIONS}:
        np.testing.assert_array_equal(new[name].numpy(), old[name].numpy())
    with pytest.raises(ValueError, match="'gap' has no class_token"):
        open_encoder(path, pooling="tok")
    random = open_encoder(path, weights="random")
    kernel = "encoder_block_0/mlp/expand/kernel"
    values = variables_by_path(random)[kernel].numpy()
    assert np.abs(values - old[kernel].numpy()).min() > 0


def test_files_of_tasks_and_of_other_libraries(ours, tmp_path):
    source, _ = ours
    captioner = tiny.make_model(40)
    captioner.build()
    randomize(captioner)
    captioner.save(tmp_path / "captioner.keras")
    found = open_encoder(tmp_path / "captioner.keras")
    same(found, captioner.vision_encoder)
    save_classifier(found, tmp_path / "classifier.keras")
    same(open_encoder(tmp_path / "classifier.keras"), captioner.vision_encoder)
    # Sizes and pooling are those of the arrays.
    big_vision.save_vision_encoder(source, str(tmp_path / "vit.npz"))
    same(open_encoder(str(tmp_path / "vit.npz")), source)


def test_a_folder_of_transformers(ours, tmp_path):
    pytest.importorskip("safetensors", reason="pip install '.[interop]'")
    siglip.save_siglip_vision(ours[0], tmp_path / "siglip")
    same(open_encoder(tmp_path / "siglip"), ours[0])


def test_any_keras_model_survives_without_its_file(tmp_path):
    """Values are converted for it, and its output is cut off at a layer."""
    model = keras_model()
    randomize(model)
    model.save(tmp_path / "model.keras")
    options = {"value_range": (0, 1), "mean": (0.5, 0.4, 0.3), "std": 0.2}
    encoder = open_encoder(tmp_path / "model.keras", output="norm", **options)
    given = ((IMAGES + 1) / 2 - np.array([0.5, 0.4, 0.3])) / 0.2
    patches = keras.Model(model.input, model.get_layer("norm").output)(given)
    outputs = encoder(IMAGES)
    expected = np.reshape(patches, (2, 4, 8))
    np.testing.assert_allclose(outputs["encoded"], expected, atol=1e-5)
    np.testing.assert_allclose(
        outputs["pre_logits"], expected.mean(1), atol=1e-5
    )
    assert encoder.grid == (2, 2)
    assert encoder.output_shapes() == {"encoded": (4, 8), "pre_logits": (8,)}
    check_config(encoder)
    task = Classifier(encoder, 3)
    task.build()
    task.save(tmp_path / "task.keras")
    (tmp_path / "model.keras").unlink()
    predictor = Predictor.open(tmp_path / "task.keras")
    np.testing.assert_allclose(
        predictor.features(IMAGES), outputs["pre_logits"], atol=1e-5
    )
    # Checkpoints of two instances have the same names.
    names = [*named_variables(task)]
    assert names == [*named_variables(predictor.model)]
    # A trained pooling is kept, with the rest.
    pooled = open_encoder(tmp_path / "task.keras", pooling="map")
    save_classifier(pooled, tmp_path / "pooled.keras")
    same(open_encoder(tmp_path / "pooled.keras"), pooled)


def test_backbones_of_kerashub(tmp_path):
    """SigLIP pools by itself; DINOv2 has tokens before its patches."""
    sizes = {"patch_size": 8, "hidden_dim": 16, "num_layers": 1}
    sizes |= {"num_heads": 2, "intermediate_dim": 24}
    sizes["image_shape"] = (SIDE, SIDE, 3)
    backbone = models.SigLIPVisionEncoder(**sizes)
    backbone.save_to_preset(tmp_path / "siglip")
    (tmp_path / "siglip" / "image_converter.json").write_text(
        '{"config": {"scale": 0.01, "offset": [-1.0, 0.0, 1.0]}}'
    )
    encoder = open_encoder(tmp_path / "siglip")
    given = (IMAGES + 1) / 2 * 255 * 0.01 + np.array([-1.0, 0.0, 1.0])
    outputs = encoder(IMAGES)
    np.testing.assert_allclose(
        outputs["pre_logits"], backbone(given), atol=1e-5
    )
    norm = backbone.get_layer("post_layer_norm").output
    patches = keras.Model(backbone.input, norm)(given)
    np.testing.assert_allclose(outputs["encoded"], patches, atol=1e-5)
    check_config(encoder)
    assert encoder.pooling == "own"
    shutil.rmtree(tmp_path / "siglip")

    backbone = models.DINOV2Backbone(**sizes, num_register_tokens=2)
    backbone.save(tmp_path / "dino.keras")
    encoder = open_encoder(tmp_path / "dino.keras")
    tokens = backbone(IMAGES)
    assert (encoder.prefix_tokens, encoder.grid) == (3, (2, 2))
    same(encoder, lambda x: {"pre_logits": tokens[:, 0]})
    gap = open_encoder(tmp_path / "dino.keras", pooling="gap")
    np.testing.assert_allclose(
        gap(IMAGES)["pre_logits"],
        keras.ops.mean(tokens[:, 3:], 1),
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "nix"}, "output.*'nix'"),
        ({"image_size": 40}, r"IMAGE_SIZE\) to \(16, 16\)"),
        ({"dropout": 0.1}, "dropout cannot be set for a model of another"),
        ({"prefix_tokens": 1}, "prefix_tokens.*must leave patches"),
        ({"pooling": "tok"}, "first token"),
        ({"pooling": "own"}, "needs a functional model"),
        ({"std": 0.0}, "std.*above 0"),
        ({"value_range": (1, 1)}, "value_range.*different"),
        ({"mean": (1, 2)}, "mean.*3 numbers"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_a_model(tmp_path, options, message):
    keras_model().save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=f"(?s){message}"):
        open_encoder(tmp_path / "model.keras", **options)


def test_what_is_no_encoder_is_refused(ours, tmp_path):
    _, path = ours
    with pytest.raises(ValueError, match="value_range cannot be set"):
        open_encoder(path, value_range=(0, 1))
    with pytest.raises(ValueError, match="ENCODER.*folder of a run"):
        open_encoder(tmp_path / "nothing")
    two = [keras.Input((SIDE, SIDE, 3)) for _ in "12"]
    with pytest.raises(ValueError, match="only input"):
        EncoderAdapter(keras.Model(two, keras.layers.Add()(two)))
    open_size = keras.Input((None, None, 3))
    model = keras.Model(open_size, keras.layers.Conv2D(4, 3)(open_size))
    with pytest.raises(ValueError, match="IMAGE_SIZE"):
        EncoderAdapter(model)
    assert EncoderAdapter(model, image_size=8).grid == (6, 6)
