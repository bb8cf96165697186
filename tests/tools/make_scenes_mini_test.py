"""tools/make_scenes_mini.py: a run becomes the preset, if float16 will do."""

import pytest
import scoring

from cappa_tf.data.scenes import world
from cappa_tf.saving import preset_folder, run_folder
from tools import make_scenes_mini as tool


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained run with the vocabulary of other images."""
    vocabulary = tmp_path_factory.mktemp("vocabulary")
    return scoring.save_run(tmp_path_factory.mktemp("run"), vocabulary)


def test_the_preset_says_how_it_was_made(run, tmp_path):
    (run / "results.json").write_text('{"step": 4}')
    tool.train(run, [])  # It is done.
    # An older one is replaced.
    encoder = run_folder.load_model(run).vision_encoder
    preset_folder.save(tmp_path / "mini", encoder, {"image_size": [16, 16]})
    said = tool.make(run, tmp_path / "mini", 3)
    assert "of 3 held-out captions right, 0 changed by float16" in said
    assert [path.name for path in tmp_path.iterdir()] == ["mini"]
    metadata = preset_folder.check(tmp_path / "mini")
    assert metadata["dtype"] == "float16"
    card = (tmp_path / "mini" / "README.md").read_text()
    assert "# scenes_mini\n" in card and "license: apache-2.0" in card
    assert "`python tools/make_scenes_mini.py`" in card
    assert "of those captions changed by float16 | 0 |" in card


def test_nothing_is_written_if_float16_changes_captions(
    run, tmp_path, monkeypatch
):
    saved = preset_folder._rounded
    monkeypatch.setattr(
        preset_folder, "_rounded", lambda name, item: -saved(name, item)
    )
    with pytest.raises(ValueError, match="at most 1% .* Received: 3 of 3"):
        tool.make(run, tmp_path / "mini", 3)
    assert not [*tmp_path.iterdir()]


def test_demo_images_are_held_out(tmp_path):
    paths = world.write_pictures(tmp_path, 3, 32)
    wanted = [*world.captions("heldout", 3)]
    names = [path.rpartition("/")[2] for path in paths]
    assert names == [f"{text.replace(' ', '_')}.jpg" for text in wanted]
