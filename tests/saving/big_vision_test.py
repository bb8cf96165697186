"""Weights of big_vision: sizes from arrays, both directions, messages."""

import re
import zipfile

import numpy as np
import numpy_reference as reference
import pytest
import tensorflow as tf
from conftest import shared_reference

from cappa_tf.models.positions import resample_positions
from cappa_tf.saving import big_vision
from cappa_tf.saving import big_vision_names as names

SIZES = reference.Sizes(
    width=12,
    depth=2,
    heads=3,
    mlp=10,
    patch=(4, 2),
    image=(8, 4),
    vocabulary=7,
    length=6,
    decoder_width=8,
    decoder_heads=1,
    decoder_depth=3,
    decoder_mlp=14,
    decoder_bias=True,
)
IMAGE = np.random.default_rng(2).uniform(-1, 1, (2, 8, 8, 3)).astype("float32")


def random_encoder(seed=3, **sizes):
    sizes = reference.Sizes(**sizes)
    return reference.random_encoder(sizes, np.random.default_rng(seed))


def check_encoder(encoder, arrays, image=IMAGE):
    """The encoder computes what the arrays define."""
    found, expected = encoder(image), reference.vit(arrays, image)
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=2e-5)


def assert_same(found, expected):
    """Bitwise the same arrays."""
    assert sorted(found) == sorted(expected)
    for name in expected:
        assert found[name].dtype == expected[name].dtype == np.float32
        assert found[name].tobytes() == expected[name].tobytes(), name


@pytest.fixture(scope="module")
def arrays():
    return reference.random_captioner(SIZES)


@pytest.fixture(scope="module")
def captioner(arrays):
    return big_vision.load_captioner(arrays)


def test_sizes_are_read_from_the_arrays(captioner):
    encoder, decoder = captioner.vision_encoder, captioner.text_decoder
    assert encoder.image_size == (8, 4)  # A square grid of 2 x 2 patches.
    assert encoder.patch_size == (4, 2)
    sizes = "hidden_dim num_layers num_heads mlp_dim".split()
    assert [getattr(encoder, s) for s in sizes] == [12, 2, 3, 10]
    assert [getattr(decoder, s) for s in sizes] == [8, 3, 1, 14]
    assert (decoder.vocabulary_size, decoder.max_length) == (7, 6)
    assert decoder.use_bias and decoder.special_tokens.mask is not None
    assert captioner.masked_pred_prob == 0.75


def test_what_differs_is_read_too():
    sizes = reference.Sizes(learned=False, mask=False)
    captioner = big_vision.load_captioner(
        reference.random_captioner(sizes), (8, 12), max_length=9
    )
    decoder = captioner.text_decoder
    assert not decoder.use_bias and decoder.special_tokens.mask is None
    assert decoder.position_embedding == "sincos2d"
    assert decoder.max_length == 9
    assert captioner.vision_encoder.grid == (2, 3)
    assert captioner.masked_pred_prob == 0.0


@pytest.mark.parametrize("scan", [False, True])
def test_there_and_back_is_bitwise_the_same(arrays, scan, tmp_path):
    first, second = tmp_path / "first.npz", tmp_path / "second.npz"
    stored = reference.stacked(arrays) if scan else arrays
    stored = {f"params/{name}": array for name, array in stored.items()}
    # Optimizer state and counters beside `params/` are not weights.
    np.savez(first, **stored, **{"opt/count": 3, "chrono/accum": 1.5})
    loaded = big_vision.load_captioner(first)
    big_vision.save_captioner(loaded, second, scan=scan)
    with np.load(second) as written:
        assert_same(dict(written), stored)
    assert [file.name for file in tmp_path.glob("second*")] == ["second.npz"]


def test_nested_half_precision_and_old_prefix(arrays, captioner):
    def nested(arrays):
        tree = {}
        for name, array in arrays.items():
            *folders, leaf = name.split("/")
            node = tree
            for folder in folders:
                node = node.setdefault(folder, {})
            node[leaf] = array
        return tree

    # NumPy stores bfloat16 as two nameless bytes.
    half = {
        name: tf.cast(array, tf.bfloat16).numpy().view("V2")
        for name, array in arrays.items()
    }
    loaded = big_vision.load_captioner({"opt": {"target": nested(half)}})
    for found, wanted in zip(loaded.weights, captioner.weights):
        rounded = tf.cast(tf.cast(wanted, tf.bfloat16), tf.float32)
        np.testing.assert_array_equal(found, rounded)


@pytest.mark.parametrize("scan", [False, True])
def test_all_that_is_wrong_is_listed_at_once(arrays, scan):
    broken = reference.stacked(arrays) if scan else dict(arrays)
    number = "" if scan else "0"
    query = f"decoder/EncDecBlock{number}/SelfAttn/query/kernel"
    missing = ["decoder/LayerNorm/bias", "encoder/embedding/kernel"]
    for name in missing:
        del broken[name]
    broken["encoder/head/kernel"] = np.zeros((12, 3), np.float32)
    broken["surplus"] = np.zeros(2, np.float32)
    shape = broken[query].shape
    broken[query] = broken[query][..., :-1]
    with pytest.raises(ValueError) as error:
        big_vision.load_captioner(broken)
    message = str(error.value)
    assert " - decoder/LayerNorm/bias (8,)" in message
    assert " - encoder/embedding/kernel (?, ?, 3, 12)" in message
    assert " + encoder/head/kernel (12, 3)" in message
    assert " + surplus (2,)" in message
    assert f" ! {query} expected {shape}, found {(*shape[:-1], 7)}" in message
    assert len(re.findall(r"^ [-+!] ", message, re.MULTILINE)) == 5


def test_a_missing_block_in_the_middle_is_missing():
    arrays = random_encoder(depth=3)
    arrays = {k: v for k, v in arrays.items() if "block_1/" not in k}
    with pytest.raises(ValueError, match=r"Missing \(16\)"):
        big_vision.load_vision_encoder(arrays)


def test_a_file_that_is_none_is_named(tmp_path):
    path = tmp_path / "weights.npz"
    with pytest.raises(ValueError, match="weights.npz"):
        big_vision.load_captioner(path)
    path.write_bytes(b"PK\3\4 but not more")
    with pytest.raises(ValueError, match="weights.npz"):
        big_vision.load_captioner(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("config.json", "{}")
    with pytest.raises(ValueError, match="weights.npz.*config.json"):
        big_vision.load_captioner(path)


@pytest.mark.parametrize(
    "sizes",
    [
        {"pooling": "tok", "classes": 5},
        {"pooling": "map", "rep": 6, "learned": False},
        {"rep": 6, "classes": 5},
    ],
)
def test_encoders_with_heads(sizes, tmp_path):
    arrays = random_encoder(**sizes)
    # An image tower, beside what else a two-tower model has.
    tower = {f"params/img/{name}": array for name, array in arrays.items()}
    others = {
        "params/txt/Embed_0/embedding": np.ones((3, 2)),
        "params/t": [1.0],
    }
    encoder = big_vision.load_vision_encoder({**tower, **others}, 8)
    check_encoder(encoder, arrays)
    big_vision.save_vision_encoder(encoder, tmp_path / "encoder.npz")
    with np.load(tmp_path / "encoder.npz") as written:
        assert_same(reference.below(written, "params/"), arrays)


def test_scanned_encoder(tmp_path):
    arrays = random_encoder(depth=3)
    encoder = big_vision.load_vision_encoder(reference.stacked(arrays))
    check_encoder(encoder, arrays)


def test_the_encoder_of_a_captioner(arrays):
    encoder = big_vision.load_vision_encoder(arrays)
    check_encoder(encoder, reference.below(arrays, "encoder/"), IMAGE[:, :, :4])


def test_encoders_from_before_2022():
    new = random_encoder(pooling="tok", depth=2)
    old = {}
    for name, array in new.items():
        name = re.sub("^pos_emb", "Transformer/posembed_input/pos_emb", name)
        name = name.replace("MultiHeadDotProductAttention_0", "Attention")
        name = name.replace("Attention", "MultiHeadDotProductAttention_1")
        name = name.replace("LayerNorm_1", "LayerNorm_2")
        old[name.replace("MlpBlock_0", "MlpBlock_3")] = array
    # The class token had a position.
    key = "Transformer/posembed_input/pos_embedding"
    position = np.full((1, 1, 16), 0.25, np.float32)
    old[key] = np.concatenate([position, old[key]], 1)
    old["cls"] = old["cls"] - position
    check_encoder(big_vision.load_vision_encoder(old), new)
    # A MAP head was beside the encoder.
    new = random_encoder(pooling="map")
    old = {name.removeprefix("MAPHead_0/"): a for name, a in new.items()}
    check_encoder(big_vision.load_vision_encoder(old), new)


def test_positions_that_are_no_square_need_the_image_size():
    # 10 positions: two rows of five, not three of three and a class token's.
    arrays = random_encoder(image=(8, 20), pooling="tok")
    with pytest.raises(ValueError, match="divided|square|image_size"):
        big_vision.load_vision_encoder(random_encoder(image=(8, 12)))
    image = np.zeros((1, 8, 20, 3), np.float32) + IMAGE[:1, :, :1]
    check_encoder(
        big_vision.load_vision_encoder(arrays, (8, 20)), arrays, image
    )
    with pytest.raises(ValueError, match="sincos2d.*image_size"):
        big_vision.load_vision_encoder(random_encoder(learned=False))


def test_positions_are_resampled_for_another_size():
    arrays = random_encoder(image=(8, 8))
    encoder = big_vision.load_vision_encoder(arrays, (12, 20))
    expected = resample_positions(arrays["pos_embedding"], (3, 5))
    image = np.tile(IMAGE, (1, 2, 3, 1))[:, :12, :20]
    check_encoder(encoder, {**arrays, "pos_embedding": expected}, image)


def test_resampling_by_hand():
    # Corners stay; between them, halves and quarters.
    table = np.array([[0, 4], [8, 20]], np.float32).reshape(1, 4, 1)
    found = resample_positions(table, (3, 5))[0, :, 0].reshape(3, 5)
    np.testing.assert_array_equal(
        found, [[0, 1, 2, 3, 4], [4, 6, 8, 10, 12], [8, 11, 14, 17, 20]]
    )
    assert resample_positions(table, (4, 1)) is table
    smaller = resample_positions(np.arange(9.0).reshape(1, 9, 1), (2, 2))
    np.testing.assert_array_equal(smaller[0, :, 0], [0, 2, 6, 8])


def test_models_the_reference_has_not(captioner, tmp_path):
    path = tmp_path / "captioner.npz"
    config = captioner.get_config()
    config["vision_encoder"]["config"]["pooling"] = "map"
    pooled = type(captioner).from_config(config)
    with pytest.raises(ValueError, match="pooling='map'"):
        big_vision.save_captioner(pooled, path)
    # A variable without a row in the table, and a row without a variable.
    rows = names.vision_rows(num_layers=3, learned=False)
    with pytest.raises(ValueError, match="position_emb.*encoder_block_2/"):
        big_vision.paired(rows, captioner.vision_encoder)
    assert not path.exists()


@pytest.mark.parametrize("name", ["cappa_tiny", "cappa_scan", "vit_tok_head"])
def test_files_of_the_authors_there_and_back(name, tmp_path):
    stored = np.load(shared_reference(f"{name}.npz"))
    stored = {k: v for k, v in stored.items() if k.startswith("params/")}
    path, scan = tmp_path / "back.npz", name == "cappa_scan"
    if name == "vit_tok_head":
        encoder = big_vision.load_vision_encoder(stored)
        big_vision.save_vision_encoder(encoder, path)
    else:
        captioner = big_vision.load_captioner(stored)
        big_vision.save_captioner(captioner, path, scan=scan)
    with np.load(path) as written:
        assert_same(dict(written), stored)
