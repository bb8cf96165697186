"""gin/transfer/decoder.gin: a decoder with prompts on a frozen encoder."""

import json
import os
import random

import keras
import numpy as np
import pytest
import small_run
import tiny
from absl import flags
from harness import randomize
from small_run import SIDE
from tool_flags import defined

from cappa_tf import config
from cappa_tf.data import schema
from cappa_tf.data.tokenizer import train_tokenizer
from cappa_tf.inference.predictor import Predictor
from cappa_tf.models.vision_encoder import VisionEncoder
from cappa_tf.saving import siglip
from tools import caption
from tools.benchmarks import features

LENGTH = 24
STEPS = 20
PROMPTS = ("caption:", "answer: {question}", "classify:")
PARAMS = {
    "WEIGHTS": [2, 2, 1],
    "VOCABULARY_SIZE": 60,
    "MAX_LENGTH": LENGTH,
    "IMAGE_SIZE": SIDE,
    "DECODER_LAYERS": 1,
    "DECODER_WIDTH": 16,
    "DECODER_HEADS": 2,
    "DECODER_MLP": 32,
    "TOTAL_STEPS": STEPS,
    "WARMUP_STEPS": 2,
    "BATCH_SIZE": 8,
    "LEARNING_RATE": 0.01,
    "LOG_STEPS": 5,
    "STEPS_PER_LOOP": 5,
    "EVAL_STEPS": 20,
    "CHECKPOINT_STEPS": 20,
    "FEATURE_TYPE": "float32",
    "PRECISION": "float32",
    "CaptionDataset.length_buckets": [16],
    "STRATEGY": "one",
    "EvaluationSettings.sample_images": 2,
    "EvaluationSettings.sheet_images": 2,
}


def _example(i):
    """An image with a caption, one with a question, one with a label."""
    example = small_run._example(i)
    return schema.Example(f"{i}", example.image, example.captions[:1], i % 2)


def _asked(i):
    example = _example(i)
    question = ["what is it", "which colour"][i % 2]
    return schema.Example(
        f"q{i}", example.image, example.captions, None, [question]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("decoder")
    for name, make in (("plain", _example), ("asked", _asked)):
        splits = {
            split: [make(i) for i in numbers]
            for split, numbers in (
                ("train", range(12)),
                ("validation", range(20, 24)),
            )
        }
        schema.write_dataset(
            splits, path / name, name, 1, {"classes": ["box", "sea"]}
        )
    words = [f"{a} {b}" for a in small_run.COLOURS for b in small_run.THINGS]
    words += ["caption: answer: classify:", "what is it", "which colour"] * 3
    size = train_tokenizer(words * 2, path / "tokenizer.model", 60)
    (path / "labels.gin").write_text(
        "from __gin__ import dynamic_registration\n"
        "from cappa_tf.data.sources import class_captions\n"
        f"DATA = ({str(path / 'plain')!r}, {str(path / 'asked')!r}, "
        "@class_captions.LabelCaptions())\n"
        f"class_captions.LabelCaptions.source = {str(path / 'plain')!r}\n"
        "class_captions.LabelCaptions.templates = ('{}',)\n"
    )
    return path, size


def _parse(folder, workdir, encoder):
    path, size = folder
    params = {
        **PARAMS,
        "ENCODER": encoder,
        "TOKENIZER": str(path / "tokenizer.model"),
        "VOCABULARY_SIZE": size,
        "PROMPTS": PROMPTS,
    }
    given = [f"{name}={value!r}" for name, value in params.items()]
    files = ["gin/transfer/decoder.gin", str(path / "labels.gin")]
    config.parse(files, given, workdir=str(workdir))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A Keras model of another library's kind: a map of features."""
    path = str(tmp_path_factory.mktemp("encoder") / "encoder.keras")
    keras.utils.set_random_seed(0)
    images = keras.Input((SIDE, SIDE, 3))
    x = keras.layers.Conv2D(12, 4, 4, activation="gelu")(images)
    x = keras.layers.BatchNormalization()(x)
    keras.Model(images, x).save(path)
    return path


@pytest.fixture(scope="module")
def trained(folder, encoder, tmp_path_factory):
    """The folder of a run, and its figures."""
    workdir = tmp_path_factory.mktemp("decoder_run")
    _parse(folder, workdir, encoder)
    return workdir, config.run(on_start=config.save_config)


def test_it_trains_on_images_as_on_features_beside_a_frozen_encoder(
    folder, encoder, tmp_path
):
    _parse(folder, tmp_path, encoder)
    found = config.arguments()
    losses, before = [], keras.saving.load_model(encoder).get_weights()
    for way in features.WAYS:
        random.seed(0)  # What Keras' initializers sample from.
        model = found["model"]()
        model.build()
        model.freeze(found["weights"].frozen_parts)
        streams, _ = features.make_streams(
            found["train_data"], model.vision_encoder, tmp_path, "encoded"
        )
        sums = features.make_steps(model, streams[way], 8)(STEPS)[0]
        total, weight = sums.figures["loss"]
        losses.append(total / weight)
        after = model.vision_encoder.get_weights()
        for one, other in zip(before, after, strict=True):
            np.testing.assert_array_equal(one, other)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_it_captions_answers_and_classifies(trained):
    workdir, figures = trained
    assert figures["step"] == STEPS
    predictor = Predictor.open(workdir)
    assert predictor.prompts == PROMPTS
    image = np.zeros((1, SIDE, SIDE, 3), "float32")
    asked = ("caption:", "answer: what is it", "classify:")
    said = [predictor.captions(image, [prompt]) for prompt in asked]
    assert all(isinstance(text, str) for (text,) in said)
    scores = predictor.score(image, ["box", "sea"], prompt="classify:")
    assert scores.shape == (1, 2) and np.isfinite(scores).all()
    # One caption for each validation image of the three sources.
    assert figures["num_images"] == 12
    assert os.path.exists(workdir / "sheet.png")
    config_json = json.loads((workdir / "model.json").read_text())
    assert config_json["config"]["prompts"] == list(PROMPTS)


@pytest.mark.parametrize("asked", ["answer: what is it", "what is it"])
def test_the_tool_asks_the_prompt(trained, tmp_path, capsys, asked):
    workdir, _ = trained
    (tmp_path / "a.png").write_bytes(_example(20).image)
    with defined(caption):
        flags.FLAGS(
            [
                "caption.py",
                f"--checkpoint={workdir}",
                "--format=jsonl",
                f"--prompt={asked}",
            ]
        )
        if asked == "what is it":
            with pytest.raises(
                SystemExit, match="--prompt=what is it: .* other prompts"
            ):
                caption.main(["", str(tmp_path / "a.png")])
            return
        assert caption.main(["", str(tmp_path / "a.png")]) == 0
    row = json.loads(capsys.readouterr().out)
    predictor = Predictor.open(workdir)
    image = predictor.preprocessing.read(str(tmp_path / "a.png"))
    assert [row["caption"]] == predictor.captions(image[None], [asked])
    assert row["prompt"] == asked


def test_a_head_for_a_siglip_folder_of_transformers(folder, tmp_path):
    """What was exported elsewhere is encoded as there, and captioned."""
    pytest.importorskip("safetensors", reason="pip install '.[interop]'")
    tower = VisionEncoder(
        hidden_dim=16,
        num_layers=1,
        num_heads=2,
        mlp_dim=32,
        patch_size=8,
        image_size=SIDE,
        pooling="map",
    )
    tower.build()
    randomize(tower)
    siglip.save_siglip_vision(tower, str(tmp_path / "siglip"))
    path, size = folder
    given = {
        **PARAMS,
        "ENCODER": str(tmp_path / "siglip"),
        "TOKENIZER": str(path / "tokenizer.model"),
        "VOCABULARY_SIZE": size,
        "DATA": [str(path / "plain")],
        "PROMPTS": PROMPTS[:1],
        "WEIGHTS": [1],
        "IMAGE_SIZE": SIDE,
    }
    config.parse(
        ["gin/transfer/decoder.gin"],
        [f"{name}={value!r}" for name, value in given.items()],
        workdir="unused",
    )
    found = config.arguments()
    model = found["model"]()
    model.build()
    model.freeze(found["weights"].frozen_parts)
    images = np.random.RandomState(0).uniform(-1, 1, (2, SIDE, SIDE, 3))
    images = images.astype("float32")
    np.testing.assert_allclose(
        model.encode(images),
        tower(images)["encoded"],
        atol=1e-5,
    )
    data = found["train_data"]
    model.check_data(data, "train_data")
    model.adopt(data)
    batch = next(iter(data.train(2)))
    assert np.isfinite(model.compute_losses(batch)["loss"]).all()
    prompts = data.tokenizer.encode_prompts(["caption:"] * 2)
    assert model.generate(images, prompts=prompts)["tokens"].shape[0] == 2


def test_prompts_of_data_must_be_those_of_training(tmp_path):
    size = tiny.vocabulary(tmp_path)[1]
    model = tiny.make_model(size)
    data, plain = tiny.Data(tmp_path), tiny.Data(tmp_path)
    data.prompts = ("caption:",)
    model.check_data(data, "train_data")
    model.adopt(data)
    model.check_data(data, "eval_data")
    plain.prompts = ()
    with pytest.raises(ValueError, match="prompts of `eval_data`.*'caption:'"):
        model.check_data(plain, "eval_data")
    with pytest.raises(ValueError, match="without prompts.*'caption:'"):
        tiny.make_contrastive(size).check_data(data, "train_data")
