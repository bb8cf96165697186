"""What transformers computes from our SigLIP folders, and we from theirs."""

import json

import numpy as np
import pytest
from harness import randomize
from random_contrastive import LENGTH, SIDE, make_contrastive

from cappa_tf.data.tokenizer import Tokenizer, train_tokenizer
from cappa_tf.models.positions import resample_positions
from cappa_tf.models.vision_encoder import VisionEncoder
from cappa_tf.saving.weights import variables_by_path

pytest.importorskip("safetensors", reason="pip install '.[interop]'")
from cappa_tf.saving import siglip

TEXTS = ["a red circle, left", "Blue  square!", "", "red " * 20]


def images(side=SIDE):
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, (3, side, side, 3)).astype("float32")


def values(model):
    return {k: v.numpy() for k, v in variables_by_path(model).items()}


def assert_same(one, other):
    for name, part in one.parts.items():
        ours, theirs = values(part), values(other.parts[name])
        assert ours.keys() == theirs.keys()
        for path in ours:
            np.testing.assert_array_equal(ours[path], theirs[path], path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    words = ("red", "blue", "circle", "square", "left", "!", ",", "a")
    train_tokenizer([f"{a} {b}" for a in words for b in words], path, 40)
    return Tokenizer(path, LENGTH)


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_contrastive(vocabulary=tokenizer.vocabulary_size)


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    siglip.save_siglip(model, str(folder), tokenizer)
    return folder


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="pip install '.[interop]'")


@pytest.fixture(scope="module")
def transformers(torch):
    return pytest.importorskip(
        "transformers", reason="pip install '.[interop]'"
    )


def test_transformers_gives_the_same_embeddings(
    transformers, torch, folder, model, tokenizer
):
    """From the text itself: their vocabulary gives our token ids."""
    theirs, loading = transformers.SiglipModel.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(loading.values()), loading
    vocabulary = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = vocabulary(
        TEXTS, padding="max_length", truncation=True, return_tensors="pt"
    )
    assert [*inputs] == ["input_ids"]
    labels = tokenizer(TEXTS)
    np.testing.assert_array_equal(
        inputs["input_ids"], model.text_encoder.pad(labels)
    )
    pixels = torch.from_numpy(images().transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        found = theirs(pixel_values=pixels, **inputs)
    for one, other in (
        (found.image_embeds, model.embed_images(images())),
        (found.text_embeds, model.embed_texts(labels)),
        (found.logits_per_image, model.logits(images(), labels)),
    ):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_one_processor_prepares_images_and_texts(transformers, folder):
    processor = transformers.AutoProcessor.from_pretrained(folder)
    picture = np.random.default_rng(0).integers(256, size=(SIDE, SIDE, 3))
    batch = processor(
        text=TEXTS,
        images=picture.astype("uint8"),
        padding="max_length",
        truncation=True,
        return_tensors="np",
    )
    assert batch["input_ids"].shape == (4, LENGTH)
    expected = picture[None].transpose(0, 3, 1, 2) / 127.5 - 1.0
    np.testing.assert_allclose(batch["pixel_values"], expected, atol=1e-6)
    wide = np.zeros((20, 50, 3), "uint8")
    pixels = processor(images=wide, return_tensors="np")["pixel_values"]
    assert pixels.shape == (1, 3, SIDE, SIDE)


def test_there_and_back_is_bitwise_the_same(folder, model):
    found = siglip.load_siglip(str(folder))
    assert_same(found, model)
    assert found.text_encoder.pad_with_eos
    assert found.contrastive_head.loss == "sigmoid"
    assert siglip.is_siglip(str(folder))
    assert not siglip.is_siglip(str(folder.parent))


def test_what_transformers_writes_is_read(transformers, torch, tmp_path):
    """In bfloat16 and in several files, with what differs from defaults."""
    text = {"vocab_size": 30, "max_position_embeddings": 5}
    vision = {"image_size": 8, "patch_size": 4}
    for sizes in (text, vision):
        sizes.update(hidden_size=16, intermediate_size=24)
        sizes.update(num_hidden_layers=1, num_attention_heads=2)
    config = transformers.SiglipConfig(text_config=text, vision_config=vision)
    theirs = transformers.SiglipModel(config).to(torch.bfloat16).eval()
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    assert not (tmp_path / "model.safetensors").exists()
    found = siglip.load_siglip(str(tmp_path))
    theirs = theirs.float()
    pixels = images(8).transpose(0, 3, 1, 2).copy()
    labels = np.array([[3, 4, 1, 1, 1], [5, 6, 7, 8, 1], [1] * 5], "int32")
    with torch.no_grad():
        expected = theirs(
            pixel_values=torch.from_numpy(pixels),
            input_ids=torch.from_numpy(labels).long(),
        )
    np.testing.assert_allclose(
        found.logits(images(8), labels), expected.logits_per_image, atol=1e-4
    )
    theirs.vision_model.save_pretrained(tmp_path / "vision")
    encoder = siglip.load_siglip_vision(str(tmp_path / "vision"))
    np.testing.assert_allclose(
        encoder(images(8))["pre_logits"],
        found.vision_encoder(images(8))["pre_logits"],
        atol=1e-6,
    )


def test_the_image_tower_alone_at_another_size(folder, model):
    encoder = siglip.load_siglip_vision(str(folder), image_size=(24, 32))
    found, expected = values(encoder), values(model.vision_encoder)
    table = "positions/position_embedding"
    expected[table] = resample_positions(expected[table], (3, 4))
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize("positions", ["learned", "sincos2d"])
def test_an_encoder_without_attention_pooling(
    transformers, torch, positions, tmp_path
):
    encoder = VisionEncoder(
        hidden_dim=16,
        num_layers=2,
        num_heads=2,
        mlp_dim=24,
        patch_size=8,
        image_size=SIDE,
        position_embedding=positions,
    )
    encoder.build()
    randomize(encoder)
    siglip.save_siglip_vision(encoder, str(tmp_path))
    theirs, loading = transformers.SiglipVisionModel.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(loading.values()), loading
    pixels = torch.from_numpy(images().transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        found = theirs(pixels)
    encoded, expected = found.last_hidden_state, encoder(images())
    np.testing.assert_allclose(encoded, expected["encoded"], atol=1e-5)
    pooled = encoded.mean(1)
    np.testing.assert_allclose(pooled, expected["pre_logits"], atol=1e-5)
    assert found.pooler_output is None
    back = siglip.load_siglip_vision(str(tmp_path))(images())
    for name, value in expected.items():
        np.testing.assert_allclose(back[name], value, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling": "gap"}, "pooling='gap'"),
        ({"heads": (16, 16)}, r"embedding_dim=\(16, 16\)"),
        ({"heads": (None, None), "width": 16}, r"embedding_dim=\(None, None\)"),
        ({"image": (32, 8)}, r"image_size=\(32, 8\)"),
    ],
)
def test_what_it_cannot_represent_is_named(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        siglip.save_siglip(make_contrastive(**changes), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_another_computation_is_refused(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["hidden_act"] = "gelu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="hidden_act='gelu_pytorch_tanh'.*'gelu"
    ):
        siglip.load_siglip(str(tmp_path))
    with pytest.raises(ValueError, match="complete model.safetensors"):
        siglip.load_siglip_vision(str(tmp_path))
    with pytest.raises(ValueError, match="config.json"):
        siglip.load_siglip(str(tmp_path / "nowhere"))


def test_tensors_that_do_not_fit_are_listed(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = 7
    config["text_config"]["num_hidden_layers"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    content = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError) as error:
        siglip.load_siglip(str(tmp_path))
    assert " - text_model.encoder.layers.1.layer_norm1.bias (8,)" in str(
        error.value
    )
    assert (
        " ! text_model.embeddings.token_embedding.weight expected (7, 8)"
        in (str(error.value))
    )
