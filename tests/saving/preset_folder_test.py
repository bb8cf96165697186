"""A preset opens with the same weights, or says what is wrong with it."""

import json
import shutil

import keras
import numpy as np
import pytest
import scoring
import tiny

from cappa_tf.data.preprocessing import ImagePreprocessing
from cappa_tf.inference.predictor import Predictor
from cappa_tf.models.classifier import Classifier
from cappa_tf.models.vision_encoder import VisionEncoder
from cappa_tf.presets import save_preset
from cappa_tf.saving import model_card, preset_folder, run_folder
from cappa_tf.saving.encoders import open_encoder
from cappa_tf.training.initialize import check_vocabulary, initialize
from cappa_tf.training.settings import WeightSettings

IMAGE = ImagePreprocessing(16).to_json()


def make_encoder():
    sizes = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32}
    encoder = VisionEncoder(patch_size=8, image_size=16, **sizes)
    encoder.build()
    return encoder


def make(kind):
    if kind == "encoder":
        return make_encoder()
    if kind == "classifier":
        model = Classifier(make_encoder(), 3)
    elif kind == "headless":
        model = Classifier(make_encoder())
    else:
        model = getattr(tiny, f"make_{kind}")(40)
    model.build()
    return model


def arrays(model):
    """Arrays by number and name; the same architecture has the same order."""
    names = [f"{i} {v.name}" for i, v in enumerate(model.weights)]
    return {name: v.numpy() for name, v in zip(names, model.weights)}


def assert_same(found, wanted):
    assert type(found) is type(wanted)
    found, wanted = arrays(found), arrays(wanted)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, name)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return tmp_path_factory.mktemp("vocabulary")


@pytest.fixture(scope="module")
def predictor(vocabulary):
    return scoring.tiny_predictor(vocabulary)


@pytest.fixture(scope="module")
def whole(predictor, tmp_path_factory):
    """The preset of a captioner."""
    folder = tmp_path_factory.mktemp("presets") / "whole"
    save_preset(predictor, folder, facts={"steps": 7})
    return folder


@pytest.fixture
def preset(whole, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(whole, tmp_path / "preset")


@pytest.mark.parametrize(
    "kind",
    "model self_critical contrastive contrastive_captioner bag_of_tokens "
    "classifier headless encoder".split(),
)
def test_every_kind_of_model_comes_back(kind, tmp_path):
    model = make(kind)
    preset_folder.save(tmp_path / "p", model, IMAGE)
    assert_same(preset_folder.load_model(tmp_path / "p"), model)
    encoder = getattr(model, "vision_encoder", model)
    assert_same(preset_folder.load_encoder(tmp_path / "p"), encoder)


def test_all_that_a_model_needs_is_in_it(predictor, whole):
    found = Predictor.open(whole)
    assert found.tokenizer.path.startswith(str(whole))
    assert found.preprocessing == predictor.preprocessing
    texts = ["red circle", "blue square"]
    images = np.zeros((2, 16, 16, 3), "float32")
    np.testing.assert_array_equal(
        found.score(images, texts), predictor.score(images, texts)
    )
    assert preset_folder.facts(whole) == {"steps": 7}
    assert_same(open_encoder(whole), predictor.encoder)


def test_kerashub_itself_reads_the_layout(predictor, whole):
    """Its loader of presets opens the backbone, which has no class there."""
    from keras_hub.src.utils import preset_utils

    loader = preset_utils.get_preset_loader(str(whole))
    assert loader.check_backbone_class() is VisionEncoder
    backbone = loader.load_backbone(VisionEncoder, load_weights=True)
    assert_same(backbone, predictor.encoder)
    preset_utils._validate_backbone(str(whole))


def test_pretraining_stays_behind(tmp_path):
    model = tiny.make_model(40, dropout=0.3, patch_dropout=0.5)
    model.build()
    preset_folder.save(tmp_path / "p", model, IMAGE)
    encoder = preset_folder.load_encoder(tmp_path / "p")
    assert (encoder.dropout, encoder.patch_dropout) == (0.0, 0.0)


def test_shards(tmp_path):
    model = make("model")
    preset_folder.save(tmp_path / "p", model, IMAGE, max_shard_size=13e-6)
    shards = [*(tmp_path / "p").glob("model_*.weights.h5")]
    assert len(shards) >= 2 and (tmp_path / "p/model.weights.json").exists()
    assert_same(preset_folder.load_model(tmp_path / "p"), model)


def test_float16_rounds_each_weight_once(tmp_path):
    model = make("model")
    preset_folder.save(tmp_path / "p", model, IMAGE, dtype="float16")
    preset_folder.save(tmp_path / "q", model, IMAGE)
    found = arrays(preset_folder.load_model(tmp_path / "p"))
    for name, value in arrays(model).items():
        rounded = value.astype("float16").astype("float32")
        np.testing.assert_array_equal(found[name], rounded)
    sizes = [
        (tmp_path / x / preset_folder._WEIGHTS).stat().st_size for x in "pq"
    ]
    assert sizes[0] < sizes[1]


def test_float16_refuses_what_it_cannot_hold(tmp_path):
    model = make("encoder")
    model.weights[0].assign(np.full(model.weights[0].shape, 1e5))
    with pytest.raises(ValueError, match="below 65,504. Received: 100000"):
        preset_folder.save(tmp_path / "p", model, IMAGE, dtype="float16")
    assert not [*tmp_path.iterdir()]


def test_all_or_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("disk is full")

    model = make("encoder")
    preset_folder.save(tmp_path / "old", model, IMAGE)
    monkeypatch.setattr(model_card, "card", full)
    for name in ("new", "old"):
        with pytest.raises(OSError, match="disk is full"):
            preset_folder.save(tmp_path / name, model, IMAGE, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert_same(preset_folder.load_model(tmp_path / "old"), model)


def test_nothing_is_overwritten_unasked(tmp_path):
    model, other = make("encoder"), make("encoder")
    preset_folder.save(tmp_path / "p", model, IMAGE)
    with pytest.raises(ValueError, match="must not exist or"):
        preset_folder.save(tmp_path / "p", other, IMAGE)
    preset_folder.save(tmp_path / "p", other, IMAGE, overwrite=True)
    assert_same(preset_folder.load_model(tmp_path / "p"), other)
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match="hold a preset"):
        preset_folder.save(tmp_path / "photos", other, IMAGE, overwrite=True)
    assert [x.name for x in tmp_path.iterdir() if x.name[0] == "."] == []


def test_in_a_bucket(predictor):
    folder = "ram://presets/captioner"
    save_preset(predictor, folder)
    found = Predictor.open(folder)
    assert_same(found.model, predictor.model)
    assert found.tokens(["red circle"]).tolist() == (
        predictor.tokens(["red circle"]).tolist()
    )


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_newer_version_is_named(preset):
    change(
        preset / "metadata.json",
        format=preset_folder.FORMAT + 1,
        cappa_tf_version="9.1",
    )
    with pytest.raises(
        ValueError, match="upgrade it .* of format 2, written by cappa_tf 9.1"
    ):
        Predictor.open(preset)


@pytest.mark.parametrize(
    "name",
    "config.json task.json model.weights.h5 task.weights.h5 preprocessor.json "
    "tokenizer.json assets/tokenizer/vocabulary.spm".split(),
)
def test_half_a_folder(preset, name):
    (preset / name).unlink()
    with pytest.raises(ValueError, match=f"which lacks {name}"):
        Predictor.open(preset)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_without_metadata(preset, content):
    path = preset / "metadata.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match="copied or downloaded in part"):
        Predictor.open(preset)


def test_a_changed_file_is_named_but_the_card_may_be_edited(preset):
    (preset / "README.md").write_text("# Mine")
    Predictor.open(preset)
    path = preset / "model.weights.h5"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for load in (Predictor.open, preset_folder.load_encoder):
        with pytest.raises(
            ValueError, match="SHA-256 .* Received: .*model.weights.h5 .*again"
        ):
            load(preset)


def test_what_keras_cannot_read_is_named(preset):
    """Such as arguments that only another version has."""
    path = preset / "config.json"
    config = json.loads(path.read_text())
    config["config"]["colour"] = 1
    path.write_text(json.dumps(config))
    metadata = json.loads((preset / "metadata.json").read_text())
    digests = {**metadata["files"], "config.json": None}
    digests["config.json"] = preset_folder.files.sha256(path)
    change(preset / "metadata.json", files=digests)
    with pytest.raises(ValueError, match="can read. Received: .*config.json"):
        preset_folder.load_encoder(preset)


def test_a_preset_has_one_set_of_weights(whole):
    with pytest.raises(ValueError, match="one set .*weights='best'"):
        Predictor.open(whole, "best")


def test_names(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(preset_folder, "SHIPPED", whole.parent)
    assert preset_folder.shipped() == ["whole"]
    assert preset_folder.locate("whole") == str(whole)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "whole").mkdir()  # What is there comes first.
    assert preset_folder.locate("whole") == "whole"
    with pytest.raises(ValueError, match="hf://user/name or whole"):
        run_folder.load_model("hole")
    assert not preset_folder.is_preset(tmp_path)


def test_a_run_starts_from_one(whole, predictor, vocabulary, tmp_path):
    model = scoring.random_model(vocabulary)
    said = initialize(model, str(whole))
    assert_same(model, predictor.model)
    assert "vision_encoder, text_decoder" in said
    weights = WeightSettings(initialize_from=str(whole))
    check_vocabulary(model, weights, tiny.Data(vocabulary))
    other = tiny.Data(tmp_path)
    with open(other.tokenizer.path, "ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match="must be the one it was trained"):
        check_vocabulary(model, weights, other)


def test_other_models_are_refused(tmp_path):
    model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
    with pytest.raises(ValueError, match="Received: a Sequential"):
        preset_folder.save(tmp_path / "p", model, IMAGE)
    assert not [*tmp_path.iterdir()]
