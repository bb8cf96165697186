"""The run folder: missing, damaged and old files."""

import shutil
import zipfile

import keras
import pytest
import tiny

from cappa_tf.saving import run_folder as saving


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    vocabulary = tmp_path_factory.mktemp("vocabulary")
    folder = tmp_path_factory.mktemp("run")
    model = tiny.make_model(tiny.vocabulary(vocabulary)[1])
    model.build()
    saving.describe_run(str(folder), model, tiny.Data(vocabulary))
    saving.save_model(str(folder), model)
    return folder


def _file(run_folder, tmp_path, change):
    """The run's model file, changed."""
    path = tmp_path / "model.keras"
    content = (run_folder / "model.keras").read_bytes()
    if change == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif change == "text":
        path.write_text("no model")
    else:
        with (
            zipfile.ZipFile(run_folder / "model.keras") as old,
            zipfile.ZipFile(path, "w") as new,
        ):
            for name in old.namelist():
                data = old.read(name)
                if name == change:
                    data = data[: len(data) // 2]
                new.writestr(name, data)
    return path


@pytest.mark.parametrize(
    "change", ["cut", "text", "config.json", "model.weights.h5"]
)
def test_a_damaged_file_is_named(run_folder, tmp_path, change):
    path = _file(run_folder, tmp_path, change)
    with pytest.raises(ValueError, match="by Keras. Received: .*model.kera"):
        saving.load_model(path)


def test_another_kind_of_model_is_refused(run_folder, tmp_path):
    path = tmp_path / "other.keras"
    keras.Sequential([keras.Input([2]), keras.layers.Dense(1)]).save(path)
    with pytest.raises(ValueError, match="which holds a Sequential"):
        saving.load_model(path)
    encoder = saving.load_model(run_folder).vision_encoder
    encoder.save(path)
    assert saving.load_model(path).image_size == encoder.image_size


def test_a_damaged_description_is_named(run_folder, tmp_path):
    (tmp_path / "preprocessing.json").write_text('{"image": ')
    with pytest.raises(ValueError, match="must be JSON.*preprocessing.json"):
        saving.load_preprocessing(str(tmp_path))


def test_a_run_of_version_0_1_0_opens_and_takes_the_new_names(
    run_folder, tmp_path
):
    shutil.copytree(run_folder, tmp_path, dirs_exist_ok=True)
    for suffix in ("json", "keras"):
        (tmp_path / f"model.{suffix}").rename(tmp_path / f"captioner.{suffix}")
    old = saving.load_model(tmp_path)
    model = saving.load_model(run_folder)
    assert len(old.weights) == len(model.weights)
    # Written by a resumed run; the old file must not hide its weights.
    saving.save_model(str(tmp_path), model)
    names = {path.name for path in tmp_path.iterdir()}
    assert "model.keras" in names and "captioner.keras" not in names
