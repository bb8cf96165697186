"""The model card says what the files of a run say, and no more."""

import json

import pytest
import tiny

from cappa_tf.saving import model_card

IMAGE = {"image_size": [16, 16]}


def write(run, config, results=None):
    (run / "config.gin").write_text(config)
    if results is not None:
        (run / "results.json").write_text(json.dumps(results))
    return model_card.run_facts(str(run))


def test_facts_of_prepared_data(tmp_path):
    data = tmp_path / "secret" / "pets"
    data.mkdir(parents=True)
    (data / "dataset.json").write_text(
        json.dumps(
            {
                "name": "oxford-pets",
                "splits": {"train": {"num_examples": 70}},
                "metadata": {"classes": ["cat", "dog"]},
            }
        )
    )
    config = f"DATA = {str(data)!r}\nBATCH_SIZE = 4\nIMAGE_SIZE = %X\n"
    results = {"step": 9, "loss": 0.5, "flag": True, "rows": [1], "bad": None}
    assert write(tmp_path, config, results) == {
        "data": "oxford-pets",
        "images": 70,
        "classes": ["cat", "dog"],
        "steps": 9,
        "batch_size": 4,
        "figures": {"loss": 0.5},
    }


@pytest.mark.parametrize(
    "value, wanted",
    [
        ("'gs://bucket/a/b/'", {"data": "b"}),
        ("['x/photos', 'x/vqa']", {"data": "photos, vqa"}),
        ("@tfds_source.Tfds()", {}),
        ("[", {}),
    ],
)
def test_other_data(tmp_path, value, wanted):
    assert write(tmp_path, f"DATA = {value}\n") == wanted


@pytest.mark.parametrize("kind", ["model", "self_critical"])
def test_a_captioner_captions(kind):
    model = getattr(tiny, f"make_{kind}")(40)
    model.build()
    text = model_card.card(model, {}, IMAGE, None)
    assert "pipeline_tag: image-to-text" in text
    assert "model.caption(" in text


def test_nothing_known_is_said(tmp_path):
    assert model_card.run_facts(str(tmp_path)) == {}
    model = tiny.make_contrastive(40)
    model.build()
    text = model_card.card(model, {}, IMAGE)
    assert text.startswith("---\nlicense: unknown\n")
    for line in (
        "pipeline_tag: zero-shot-image-classification",
        "Not known: the run's files were not there.",
        "None were computed at the end of its run.",
        "The author has not stated one.",
    ):
        assert line in text


@pytest.mark.parametrize("license", ["", "My licence", "mit\ntags: x", "MIT"])
def test_licences_are_identifiers(license):
    with pytest.raises(ValueError, match="`license` must be an identifier"):
        model_card.check_license(license)
    model_card.check_license("cc-by-nc-4.0")
