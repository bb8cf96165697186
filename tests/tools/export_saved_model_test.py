"""tools/export.py --what=saved_model: from the folder of a run to a server."""

import os
import shutil

import pytest
from absl import flags

from tools import export

pytest.importorskip("tensorflow_serving", reason="pip install '.[serving]'")


def _export(*arguments):
    values = flags.FlagValues()
    export.define_flags(values)
    values(["export.py", *arguments])
    return export.export(values)


def test_it_writes_a_version_and_what_starts_a_server(served, tmp_path):
    said = _export(
        "--what=saved_model",
        f"--checkpoint={served.run}",
        f"--output={tmp_path}",
        "--name=photos",
        "--version=3",
        "--max_length=4",
        "--max_batch_size=5",
    )
    assert said.startswith(f"{tmp_path}/3: captioner for TensorFlow Serving")
    assert "images of 16 x 16 pixels" in said
    assert sorted(os.listdir(tmp_path)) == [
        "3",
        "batching_parameters.txt",
        "docker-compose.yaml",
        "kubernetes.yaml",
        "models.config",
    ]
    batching = (tmp_path / "batching_parameters.txt").read_text()
    assert "max_batch_size { value: 5 }" in batching
    assert 'name: "photos"' in (tmp_path / "models.config").read_text()


@pytest.mark.parametrize(
    "what, flag, message",
    [
        ("backbone", "--version=2", "--version does not go with"),
        ("saved_model", "--image_size=32", "--image_size does not go with"),
        ("saved_model", "--name=Two words", "must consist of lower-case"),
        ("saved_model", "--max_length=9", "at most the decoder's 8"),
    ],
)
def test_flags_that_do_not_fit(served, tmp_path, what, flag, message):
    with pytest.raises(ValueError, match=message):
        _export(
            f"--what={what}",
            f"--checkpoint={served.run}",
            f"--output={tmp_path}/out.keras",
            flag,
        )
    assert os.listdir(tmp_path) == []


def test_a_file_without_its_vocabulary_is_not_enough(served, tmp_path):
    shutil.copy(f"{served.run}/model.keras", tmp_path)
    with pytest.raises(ValueError, match="it has no tokenizer"):
        _export(
            "--what=saved_model",
            f"--checkpoint={tmp_path}/model.keras",
            f"--output={tmp_path}/out",
        )
    assert os.listdir(tmp_path) == ["model.keras"]
