"""tools/export.py: from a run's folder to files for other programs."""

import json
import re
import shutil
import sys

import keras
import numpy as np
import pytest
import tiny
from absl import flags
from harness import randomize
from random_contrastive import make_contrastive

import cappa_tf
from cappa_tf.export import keras_backbone
from cappa_tf.models.vision_encoder import VisionEncoder
from cappa_tf.saving import run_folder as saving
from cappa_tf.saving import siglip
from cappa_tf.utils import files
from tools import export


def run(**values):
    """Parses flags like the program and exports."""
    flag_values = flags.FlagValues()
    export.define_flags(flag_values)
    flag_values(["export", *(f"--{n}={v}" for n, v in values.items())])
    return export.export(flag_values)


@pytest.fixture(scope="module")
def captioner():
    model = tiny.make_model(40)
    model.build()
    randomize(model)
    return model


@pytest.fixture(scope="module")
def run_folder(captioner, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    saving.save_model(str(folder), captioner)
    return folder


def images(size=16):
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, (2, size, size, 3)).astype("float32")


def test_backbone_is_the_encoder_of_the_run(captioner, run_folder, tmp_path):
    path = tmp_path / "encoder.keras"
    said = run(what="backbone", checkpoint=run_folder, output=path)
    assert "16 x 16" in said and "encoder.keras" in said
    encoder = keras.saving.load_model(path)
    expected = captioner.vision_encoder(images())
    for name, value in encoder(images()).items():
        np.testing.assert_array_equal(value, expected[name])


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_backbone_of_another_precision(
    captioner, run_folder, tmp_path, precision
):
    path = tmp_path / "encoder.keras"
    said = run(
        what="backbone",
        checkpoint=run_folder,
        output=path,
        precision=precision,
    )
    found = re.search(
        r"in (\w+): cosine .* ([\d.]+) on average, ([\d.]+)", said
    )
    assert found[1] == precision
    mean, least = float(found[2]), float(found[3])
    assert 0.99 < least <= mean < 1.0
    encoder = keras_backbone.load_backbone(path)
    expected = captioner.vision_encoder(images())["pre_logits"]
    actual = keras.ops.cast(encoder(images())["pre_logits"], "float32")
    np.testing.assert_allclose(actual, expected, atol=0.1)
    assert any(precision in str(w.dtype) for w in encoder.weights)
    if precision == "int8":
        with pytest.raises(ValueError, match="A quantized encoder keeps"):
            keras_backbone.load_backbone(path, image_size=32)
        again = VisionEncoder.from_config(encoder.get_config())
        assert again.quantization == "int8"


def test_precision_is_for_backbones(run_folder, tmp_path):
    with pytest.raises(ValueError, match="--precision does not go with"):
        run(
            what="timm",
            checkpoint=run_folder,
            output=tmp_path / "timm",
            precision="int8",
        )


def test_another_size_at_export_or_on_load(run_folder, tmp_path):
    same, larger = tmp_path / "same.keras", tmp_path / "larger.keras"
    given = {"what": "backbone", "checkpoint": run_folder}
    run(output=same, **given)
    run(output=larger, image_size="32", **given)
    first = keras.saving.load_model(larger)(images(32))
    second = cappa_tf.load_backbone(same, image_size=32)(images(32))
    assert first["encoded"].shape == (2, 16, 16)
    np.testing.assert_array_equal(first["encoded"], second["encoded"])


def test_a_run_in_a_bucket_to_a_bucket(captioner, tmp_path):
    needs_safetensors()
    bucket = f"ram:/{tmp_path}"
    saving.save_model(f"{bucket}/run", captioner)
    run(what="siglip", checkpoint=f"{bucket}/run", output=f"{bucket}/siglip")
    assert sorted(files.listdir(f"{bucket}/siglip")) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    path = f"{bucket}/encoder.keras"
    run(what="backbone", checkpoint=f"{bucket}/run", output=path)
    encoder = cappa_tf.load_backbone(path)
    expected = captioner.vision_encoder(images())
    for name, value in encoder(images()).items():
        np.testing.assert_array_equal(value, expected[name])
    with pytest.raises(ValueError, match="'none' not implemented"):
        run(what="backbone", checkpoint="nowhere", output="none://b/f.keras")


def test_a_preset_with_its_licence(captioner, run_folder, tmp_path):
    said = run(
        what="preset",
        checkpoint=run_folder,
        output=tmp_path / "p",
        license="mit",
        dtype="float16",
    )
    assert "preset of a Captioner, " in said
    card = (tmp_path / "p" / "README.md").read_text()
    assert "license: mit" in card and "float16" in card
    encoder = cappa_tf.load_backbone(tmp_path / "p")
    for one, other in zip(encoder.weights, captioner.vision_encoder.weights):
        half = other.numpy().astype("float16")
        np.testing.assert_array_equal(one, half.astype("float32"))
    with pytest.raises(ValueError, match="--license does not go with"):
        run(what="timm", checkpoint=run_folder, output="x", license="mit")


@pytest.mark.parametrize("what", ["siglip", "timm"])
def test_other_libraries_get_a_model_card(what, run_folder, tmp_path):
    needs_safetensors()
    copy = shutil.copytree(run_folder, tmp_path / "run")
    (copy / "results.json").write_text('{"step": 9, "loss": 0.5}')
    run(what=what, checkpoint=copy, output=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    library = {"siglip": "transformers", "timm": "timm"}[what]
    assert f"library_name: {library}\n" in card
    assert "pipeline_tag: image-feature-extraction" in card
    assert "- Steps: 9\n" in card and "| loss | 0.5 |" in card


def test_parents_of_the_output_are_made(run_folder, tmp_path):
    path = tmp_path / "new" / "folder" / "encoder.keras"
    run(what="backbone", checkpoint=run_folder, output=path)
    assert [p.name for p in path.parent.iterdir()] == ["encoder.keras"]


@pytest.mark.parametrize(
    ("what", "package", "extra"),
    [
        ("siglip", "safetensors", "interop"),
        ("timm", "safetensors", "interop"),
        ("saved_model", "tensorflow_serving", "serving"),
    ],
)
def test_a_missing_extra_is_found_first(
    what, package, extra, tmp_path, monkeypatch
):
    """Flags are refused before the checkpoint is read; nothing is written."""
    monkeypatch.setitem(sys.modules, package, None)
    message = f"needs {package}: pip install 'cappa-tf\\[{extra}\\]'"
    with pytest.raises(ImportError, match=message):
        run(what=what, checkpoint="nowhere", output=tmp_path / "new" / "x")
    assert not list(tmp_path.iterdir())


def needs_safetensors():
    return pytest.importorskip(
        "safetensors.numpy", reason="pip install '.[interop]'"
    )


@pytest.mark.parametrize("what", ["backbone", "timm"])
def test_what_cannot_be_written_is_found_first(what, tmp_path):
    if what == "timm":
        needs_safetensors()
    file, folder = tmp_path / "file", tmp_path / "folder.keras"
    file.write_text("")
    folder.mkdir()
    wrong = {"backbone": folder, "timm": file}[what]
    with pytest.raises(ValueError, match=f"--output must be a .*{wrong}"):
        run(what=what, checkpoint="nowhere", output=wrong)
    with pytest.raises(ValueError, match="folder that can be written to"):
        run(what=what, checkpoint="nowhere", output=file / "x.keras")


@pytest.mark.parametrize("what", ["siglip", "timm"])
def test_folders_for_pytorch(what, run_folder, tmp_path):
    safetensors = needs_safetensors()
    folder = tmp_path / what
    encoder = tmp_path / "encoder.keras"
    # From a run, or from an encoder that was exported before.
    run(what="backbone", checkpoint=run_folder, output=encoder)
    run(what=what, checkpoint=encoder, output=folder, image_size="24")
    json.loads((folder / "config.json").read_text())
    tensors = safetensors.load_file(folder / "model.safetensors")
    size = keras.saving.load_model(encoder).count_params()
    # 9 patches in place of 4, of width 16.
    assert sum(t.size for t in tensors.values()) == size + 5 * 16


def test_a_contrastive_model_for_transformers(tmp_path):
    needs_safetensors()
    model = make_contrastive()
    model.save(tmp_path / "towers.keras")
    given = {"what": "siglip", "checkpoint": tmp_path / "towers.keras"}
    said = run(output=tmp_path / "hf", **given)
    assert "SiglipModel" in said and "without vocabulary" in said
    found = siglip.load_siglip(str(tmp_path / "hf"))
    for one, other in zip(found.weights, model.weights, strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match="--image_size=24"):
        run(output=tmp_path / "hf", image_size=24, **given)
    # Back from transformers, and on to what a folder of a run can become.
    run(
        what="backbone",
        checkpoint=tmp_path / "hf",
        output=tmp_path / "encoder.keras",
        image_size=24,
    )
    encoder = keras.saving.load_model(tmp_path / "encoder.keras")
    assert encoder.pooling == "map" and encoder.grid == (3, 3)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"what": "backbone", "output": "x.h5"}, "--output=x.h5"),
        ({"what": "backbone", "output": "x.keras", "image_size": "a"}, "=a$"),
        ({"what": "siglip", "output": "x", "checkpoint": "nowhere"}, "nowhere"),
        ({"what": "timm", "output": "x", "image_size": "20"}, r"\(20, 20\)"),
    ],
)
def test_wrong_flags_are_named(values, named, run_folder):
    if values["what"] != "backbone":
        needs_safetensors()
    with pytest.raises(ValueError, match=named):
        run(**{"checkpoint": run_folder, **values})


def test_what_is_not_in_the_table_is_refused(run_folder):
    with pytest.raises(flags.IllegalFlagValueError, match="backbone"):
        run(what="onnx", checkpoint=run_folder, output="x")
