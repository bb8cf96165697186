"""Initial weights from another model: parts by name, at any resolution."""

import importlib.util

import numpy as np
import pytest
import tiny
from random_contrastive import make_contrastive

from cappa_tf.models.positions import resample_positions
from cappa_tf.saving import big_vision, siglip
from cappa_tf.saving.run_folder import load_model
from cappa_tf.saving.weights import variables_by_path
from cappa_tf.training.initialize import check_vocabulary, initialize
from cappa_tf.training.settings import WeightSettings

SIZE = 20
POSITIONS = "positions/position_embedding"


def make(seed=None, **sizes):
    model = tiny.make_model(SIZE, **sizes)
    model.build()
    if seed is not None:
        random = np.random.default_rng(seed)
        for v in model.weights:
            v.assign(random.normal(size=v.shape))
    return model


def values(part):
    return {k: v.numpy() for k, v in variables_by_path(part).items()}


def assert_same(one, other):
    """Compares two parts, or values of parts, array by array."""
    one, other = (x if isinstance(x, dict) else values(x) for x in (one, other))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], name)


@pytest.fixture(scope="module", name="source")
def _source():
    return make(seed=1)


@pytest.fixture(scope="module", name="files")
def _files(source, tmp_path_factory):
    """The same weights in every source that can be read."""
    folder = tmp_path_factory.mktemp("files")
    source.save(folder / "captioner.keras")
    source.vision_encoder.save(folder / "encoder.keras")
    big_vision.save_captioner(source, str(folder / "captioner.npz"))
    big_vision.save_vision_encoder(
        source.vision_encoder, str(folder / "encoder.npz")
    )
    return folder


@pytest.mark.parametrize("name", ["captioner.keras", "captioner.npz"])
def test_all_of_a_captioner(files, source, name):
    model = make()
    line = initialize(model, str(files / name))
    for name_of_part, part in model.parts.items():
        assert_same(part, source.parts[name_of_part])
    assert name in line and f"{model.count_params():,} parameters" in line


@pytest.mark.parametrize(
    "name", ["captioner.keras", "encoder.keras", "encoder.npz", "captioner.npz"]
)
def test_a_part_by_name(files, source, name):
    model = make(seed=2)
    before = values(model.text_decoder)
    initialize(model, str(files / name), ["vision_encoder"])
    assert_same(model.vision_encoder, source.vision_encoder)
    assert_same(values(model.text_decoder), before)


@pytest.mark.parametrize("name", ["captioner.keras", "captioner.npz"])
def test_positions_are_resampled(files, source, name):
    model = make(image_size=(32, 24))
    line = initialize(model, str(files / name))
    expected = resample_positions(
        values(source.vision_encoder)[POSITIONS], (4, 3)
    )
    found = values(model.vision_encoder)[POSITIONS]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert_same(model.text_decoder, source.text_decoder)
    if name.endswith(".keras"):
        assert "resampled from 2x2 to 4x3" in line


@pytest.fixture(scope="module", name="towers")
def _towers(tmp_path_factory):
    """Two towers, and what they can be read from."""
    folder = tmp_path_factory.mktemp("towers")
    model = make_contrastive()
    model.save(folder / "towers.keras")
    big_vision.save_two_towers(model, folder / "towers.npz")
    names = ["towers.keras", "towers.npz"]
    if importlib.util.find_spec("safetensors") is not None:
        siglip.save_siglip(model, folder / "siglip")
        names.append("siglip")
    return model, [str(folder / name) for name in names]


def test_two_towers_or_one_of_them(towers):
    source, paths = towers
    for path in paths:
        model = type(source).from_config(source.get_config())
        model.build()
        before = values(model.text_encoder)
        initialize(model, path, ["vision_encoder"])
        assert_same(model.vision_encoder, source.vision_encoder)
        assert_same(values(model.text_encoder), before)
        initialize(model, path)
        for name, part in model.parts.items():
            assert_same(part, source.parts[name])


def test_the_image_tower_of_two_for_a_captioner_at_another_size(towers):
    _, paths = towers
    model = make(image_size=32, mlp_dim=24, pooling="map")
    for path in paths:
        initialize(model, path, ["vision_encoder"])
        with pytest.raises(ValueError, match="has the parts.*text_decoder"):
            initialize(model, path)
    # Pooling by attention has weights that other encoders lack.
    model = make(image_size=32, mlp_dim=24)
    with pytest.raises(ValueError, match="pool/attention.*: only in the file"):
        initialize(model, path, ["vision_encoder"])


@pytest.mark.parametrize(
    ("sizes", "name", "parts", "message"),
    [
        ({"hidden_dim": 32}, "captioner.keras", None, r"\(16,.*\(32,"),
        ({"num_layers": 2}, "captioner.keras", None, "only in the model"),
        ({}, "encoder.keras", None, r"INITIALIZE_PARTS.*text_decoder"),
        ({}, "captioner.keras", ["head"], r"text_decoder.*'head'"),
        ({}, "none.keras", None, "initialize_from.*none.keras"),
        ({}, "none.npz", None, "initialize_from.*none.npz"),
    ],
)
def test_what_does_not_fit_is_named(files, sizes, name, parts, message):
    model = make(seed=3, **sizes)
    before = values(model)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        initialize(model, str(files / name), parts)
    assert_same(values(model), before)


def test_a_run_starts_from_another_and_resumes_from_itself(tmp_path):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    tiny.run(tmp_path, workdir=first, total_steps=2)
    size = tiny.vocabulary(tmp_path)[1]
    options = {
        "workdir": second,
        "initialize_from": first,
        "initialize_parts": ["vision_encoder"],
        "frozen_parts": ["vision_encoder"],
        # With dropout in the frozen part, were it trained.
        "model": lambda: tiny.make_model(size, dropout=0.1),
    }
    tiny.run(tmp_path, total_steps=2, **options)
    encoder = load_model(first).vision_encoder
    started = load_model(second)
    assert_same(started.vision_encoder, encoder)
    assert started.vision_encoder.trainable_variables  # In the file: all.
    log = (tmp_path / "second" / "train.log").read_text()
    assert log.count("initialized from") == 1 and "frozen" in log
    (tmp_path / "first").rename(tmp_path / "gone")
    tiny.run(tmp_path, total_steps=4, **options)
    log = (tmp_path / "second" / "train.log").read_text()
    assert log.count("initialized from") == 1 and "resuming from" in log
    assert_same(load_model(second).vision_encoder, encoder)


def test_another_vocabulary_of_the_same_size_is_refused(tmp_path, source):
    data = tiny.Data(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(b"other pieces")
    all_parts = WeightSettings(initialize_from=str(folder))
    with pytest.raises(ValueError, match="text_decoder.*differs from.*run"):
        check_vocabulary(source, all_parts, data)
    encoder = WeightSettings(
        initialize_from=str(folder), initialize_parts=["vision_encoder"]
    )
    check_vocabulary(source, encoder, data)
    with open(data.tokenizer.path, "rb") as file:
        (folder / "tokenizer.model").write_bytes(file.read())
    check_vocabulary(source, all_parts, data)
