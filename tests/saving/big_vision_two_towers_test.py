"""Two towers of big_vision: the reference's numbers, and there and back."""

import dataclasses

import keras
import numpy as np
import numpy_reference as reference
import pytest
from conftest import shared_reference

from cappa_tf.export import big_vision
from cappa_tf.models.positions import resample_positions

IMAGE = reference.Sizes(width=12, depth=2, heads=3, mlp=10, pooling="map")
TEXT = reference.Sizes(width=8, depth=2, heads=2, mlp=6, vocabulary=9, length=5)
SMALL = dataclasses.replace(TEXT, depth=1)
# Of the authors' files and of random ones: (image tower, text tower, heads,
# bias). All poolings of images, all kinds of heads, with and without `b`.
LAYOUTS = {
    "siglip": (IMAGE, TEXT, (None, 12), True),
    "clip": (reference.Sizes(pooling="gap"), SMALL, (7, 7), False),
    "lit": (
        reference.Sizes(width=8, pooling="tok"),
        dataclasses.replace(SMALL, pooling="map"),
        (None, None),
        False,
    ),
}
AUTHORS = ("clip_tiny", "siglip_tiny", "lit_tiny")


def random_arrays(layout):
    image, text, heads, bias = LAYOUTS[layout]
    return reference.random_two_towers(image, text, heads, bias)


def check_logits(model, arrays):
    """The model, which reads padding (0) as eos (1), does as the arrays say."""
    images, labels = reference.random_batch(TEXT)
    ids = np.where(labels == 0, 1, labels)
    expected = reference.two_towers(arrays, images, ids)
    found = (
        model.embed_images(images),
        model.embed_texts(labels),
        model.logits(images, labels),
    )
    for one, other in zip(found, expected):
        np.testing.assert_allclose(one, other, atol=2e-5)


def assert_same(found, expected):
    """Bitwise the same arrays, by name."""
    assert sorted(found) == sorted(expected)
    for name in expected:
        assert found[name].dtype == expected[name].dtype == np.float32
        assert found[name].shape == expected[name].shape
        assert found[name].tobytes() == expected[name].tobytes(), name


@pytest.fixture(scope="module", params=AUTHORS)
def authors(request):
    """(the file's arrays, the model)."""
    arrays = dict(np.load(shared_reference(f"{request.param}.npz")))
    stored = {k: v for k, v in arrays.items() if k.startswith("params/")}
    return arrays, big_vision.load_two_towers(stored)


def test_numbers_of_the_authors(authors):
    arrays, model = authors
    images, labels = arrays["image"], arrays["text"]
    image, text = model.vision_encoder(images), model.text_encoder(labels)
    found = {
        "image_pre_logits": image["pre_logits"],
        "text_pre_logits": text["pre_logits"],
        "text_encoded": text["encoded"],
        "image_embedding": model.embed_images(images),
        "text_embedding": model.embed_texts(labels),
        "logits": model.logits(images, labels),
        "temperature": [model.contrastive_head.scale_and_bias[0]],
    }
    for name, value in found.items():
        np.testing.assert_allclose(value, arrays[name], atol=2e-5)
    has_bias = "bias" in arrays
    assert (model.contrastive_head.loss == "sigmoid") == has_bias
    if has_bias:
        bias = model.contrastive_head.scale_and_bias[1]
        assert float(bias) == arrays["bias"][0]


def test_poolings_of_the_authors():
    arrays = dict(np.load(shared_reference("clip_tiny.npz")))
    stored = {k: v for k, v in arrays.items() if k.startswith("params/")}
    expected = reference.below(arrays, "text_embedding_by_pooling/")
    for name in ("first", "mean", "max"):  # The default is last.
        pooling = "gap" if name == "mean" else name
        model = big_vision.load_two_towers(stored, text_pooling=pooling)
        found = model.embed_texts(arrays["text"])
        np.testing.assert_allclose(found, expected[name], atol=2e-5)


def test_files_of_the_authors_there_and_back(authors, tmp_path):
    arrays, model = authors
    big_vision.save_two_towers(model, tmp_path / "back.npz")
    with np.load(tmp_path / "back.npz") as written:
        stored = {k: v for k, v in arrays.items() if k.startswith("params/")}
        assert_same(dict(written), stored)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    arrays = random_arrays(layout)
    check_logits(big_vision.load_two_towers(arrays), arrays)


def test_sizes_are_read_from_the_arrays():
    model = big_vision.load_two_towers(random_arrays("siglip"))
    image, text = model.vision_encoder, model.text_encoder
    sizes = "hidden_dim num_layers num_heads mlp_dim pooling".split()
    assert [getattr(image, s) for s in sizes] == [12, 2, 3, 10, "map"]
    assert [getattr(text, s) for s in sizes] == [8, 2, 2, 6, "last"]
    assert (text.vocabulary_size, text.max_length) == (9, 5)
    assert image.image_size == (8, 8) and model.embedding_width == 12
    assert model.contrastive_head.loss == "sigmoid"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scan", [False, True])
def test_there_and_back_is_bitwise_the_same(layout, scan, tmp_path):
    arrays = random_arrays(layout)
    stored = reference.stacked(arrays) if scan else arrays
    stored = {f"params/{name}": array for name, array in stored.items()}
    first, second = tmp_path / "first.npz", tmp_path / "second.npz"
    np.savez(first, **stored, **{"opt/count": 3})
    model = big_vision.load_two_towers(first)
    big_vision.save_two_towers(model, second, scan=scan)
    with np.load(second) as written:
        assert_same(dict(written), stored)


def test_a_keras_file_of_two_towers(tmp_path):
    arrays = random_arrays("siglip")
    model = big_vision.load_two_towers(arrays)
    model.save(tmp_path / "towers.keras")
    loaded = keras.saving.load_model(tmp_path / "towers.keras")
    big_vision.save_two_towers(loaded, tmp_path / "towers.npz")
    with np.load(tmp_path / "towers.npz") as written:
        assert_same(reference.below(written, "params/"), arrays)


def test_another_pooling_and_padding():
    arrays = random_arrays("clip")
    _, labels = reference.random_batch(TEXT)
    for pooling in ("first", "gap", "max"):
        model = big_vision.load_two_towers(
            arrays, text_pooling=pooling, pad_with_eos=False
        )
        tower = reference.below(arrays, "txt/")
        expected = reference.text_tower(tower, labels, pooling)
        found = model.text_encoder(labels)["pre_logits"]
        np.testing.assert_allclose(found, expected, atol=2e-5)
    # SigLIP 2 pads with 0; its vocabulary tells.
    arrays["txt/Embed_0/embedding"] = np.ones((256_000, 8), np.float32)
    assert not big_vision.load_two_towers(arrays).text_encoder.pad_with_eos


def test_text_positions_that_were_added_twice():
    new = random_arrays("clip")
    old = dict(new)
    first = new["txt/pos_embedding"][:, ::-1] ** 2
    old["txt/Encoder_0/pos_embedding"] = first
    old["txt/pos_embedding"] = new["txt/pos_embedding"] - first
    check_logits(big_vision.load_two_towers(old), new)


def test_positions_are_resampled_for_another_size():
    arrays = random_arrays("siglip")
    model = big_vision.load_two_towers(arrays, image_size=(12, 16))
    table = model.vision_encoder._positions.position_embedding
    expected = resample_positions(arrays["img/pos_embedding"], (3, 4))
    np.testing.assert_array_equal(table, expected)
    assert model.embed_images(np.zeros((1, 12, 16, 3))).shape == (1, 12)


def test_all_that_is_wrong_is_listed_at_once():
    arrays = random_arrays("siglip")
    del arrays["t"], arrays["txt/Encoder_0/encoder_norm/scale"]
    arrays["txt/BertModel_0/pooler/kernel"] = np.zeros((2, 2), np.float32)
    arrays["img/pre_logits/bias"] = np.zeros(3, np.float32)
    # A text embedding that could not meet the image tower's.
    arrays["txt/head/kernel"] = np.zeros((8, 11), np.float32)
    with pytest.raises(ValueError) as error:
        big_vision.load_two_towers(arrays)
    for line in (
        " - t (1,)",
        " - txt/Encoder_0/encoder_norm/scale (8,)",
        " + txt/BertModel_0/pooler/kernel (2, 2)",
        " + img/pre_logits/bias (3,)",
        " ! txt/head/kernel expected (8, 12), found (8, 11)",
        "Received: a mapping of",
    ):
        assert line in str(error.value)


def test_a_file_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"(?s)Missing.*txt/Embed_0"):
        big_vision.load_two_towers(
            {
                name: array
                for name, array in random_arrays("clip").items()
                if name.startswith("img/")
            }
        )
    with pytest.raises(ValueError, match="text_pooling.*MAPHead_0"):
        big_vision.load_two_towers(random_arrays("lit"), text_pooling="gap")
    with pytest.raises(ValueError, match="text_pooling.*do not have"):
        big_vision.load_two_towers(random_arrays("clip"), text_pooling="map")
