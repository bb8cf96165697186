"""Choices won are counted correctly, on the images that are present."""

import json

import pytest
import scoring
from conftest import shared_data
from PIL import Image

from cappa_tf.data.scenes import world
from cappa_tf.evaluation.compositional import benchmarks


@pytest.fixture
def predictor(tmp_path):
    return scoring.knowing_predictor(tmp_path)


def write_sugar_crepe(folder):
    """Two subsets on red and green images; one image is missing."""
    for name in ("red", "green"):
        Image.new("RGB", (8, 8), scoring.COLOURS[name]).save(
            folder / f"{name}.png"
        )
    subsets = {
        "swap_att": [
            ("red.png", "red square", "blue square"),
            ("green.png", "red square", "green square"),
            ("lost.png", "red square", "green square"),
        ],
        "swap_obj": [("red.png", "red square", "blue square")],
        "add_obj": [
            ("red.png", "square", "Square"),  # the same tokens: a tie
            ("red.png", "square", "blue square"),
        ],
    }
    for subset, items in subsets.items():
        names = ("filename", "caption", "negative_caption")
        content = {str(i): dict(zip(names, t)) for i, t in enumerate(items)}
        (folder / f"{subset}.json").write_text(json.dumps(content))


def test_sugar_crepe_by_hand(tmp_path, predictor):
    write_sugar_crepe(tmp_path)
    evaluator = benchmarks.SugarCrepe(tmp_path, tmp_path)
    evaluator.open()
    report = evaluator.evaluate(predictor)
    wanted = {
        "swap_att": 1 / 2,
        "swap_obj": 1.0,
        "add_obj": 1 / 2,
        "swap": 3 / 4,
        "add": 1 / 2,
        "macro": 2 / 3,
        "micro": 3 / 5,
    }
    for name, value in wanted.items():
        for mode in ("autoregressive", "parallel", "minus_blind"):
            assert report.metrics[f"{mode}/{name}"] == pytest.approx(value)
        assert report.metrics[f"blind/{name}"] == 0.0  # all ties
    assert report.metrics["ceiling/add_obj"] == 0.5
    assert report.metrics["ceiling/swap"] == 1.0
    assert report.details["ties"]["autoregressive"] == 1 / 5
    assert report.details["ties"]["blind"] == 1.0
    assert report.details["left_out"] == {"image missing": 1}
    assert report.details["choices"] == {
        "swap_att": 2,
        "swap_obj": 1,
        "add_obj": 2,
    }
    assert report.details["num_images"] == 2
    assert report.lines[0] == "5 choices of 2 images"


def test_aro_takes_the_part_that_is_meant(tmp_path, predictor):
    picture = Image.new("RGB", (20, 10), scoring.COLOURS["red"])
    picture.paste(scoring.COLOURS["green"], (10, 0, 20, 10))
    picture.save(tmp_path / "both.png")
    item = {
        "image_path": "both.png",
        "true_caption": "green square",
        "false_caption": "red square",
        "relation_name": "above",
    }
    box = {"bbox_y": 0, "bbox_w": 10, "bbox_h": 10}
    content = [
        item | box | {"bbox_x": 10},
        item | box | {"bbox_x": 0, "relation_name": "left"},
        item | box | {"bbox_x": 40},  # outside
    ]
    (tmp_path / "relations.json").write_text(json.dumps(content))
    aro = benchmarks.Aro(tmp_path / "relations.json", tmp_path)
    report = aro.evaluate(predictor)
    assert report.metrics["autoregressive/above"] == 1.0
    assert report.metrics["autoregressive/left"] == 0.0
    assert report.metrics["autoregressive/macro"] == 0.5
    assert report.details["left_out"] == {"box outside of the image": 1}


def test_aros_order_has_several_wrong_ones(tmp_path, predictor):
    Image.new("RGB", (8, 8), scoring.COLOURS["red"]).save(tmp_path / "a.png")
    options = [
        ["red square", "blue square", "green square"],
        ["blue square", "green square", "red square"],
    ]
    content = [{"image_path": "a.png", "caption_options": o} for o in options]
    (tmp_path / "coco_order.json").write_text(json.dumps(content))
    aro = benchmarks.Aro(tmp_path / "coco_order.json", tmp_path)
    metrics = aro.evaluate(predictor).metrics
    assert metrics["autoregressive/coco_order"] == 0.5


def test_scenes_are_read_from_their_records(tmp_path):
    world.prepare(str(tmp_path / "scenes"), 60, 12, 32)
    predictor = scoring.tiny_predictor(tmp_path)
    evaluator = benchmarks.Scenes(tmp_path / "scenes", limit=10)
    report = evaluator.evaluate(predictor)
    assert report.details["num_images"] == 10
    assert {"autoregressive/swap_color", "blind/replace", "parallel/macro"} <= {
        *report.metrics
    }
    again = evaluator.evaluate(predictor)
    assert again.metrics == report.metrics and again.rows == report.rows


@pytest.mark.parametrize(
    "content, message",
    [
        ("nothing", "cannot be read as JSON"),
        ("{}", "must hold a JSON dict"),
        ('{"0": {"filename": "a.png", "caption": "x"}}', "item 0"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    (tmp_path / "swap_att.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        benchmarks.SugarCrepe(tmp_path, tmp_path).open()


def test_no_files_and_no_pictures(tmp_path):
    with pytest.raises(ValueError, match="replace_obj"):
        benchmarks.SugarCrepe(tmp_path, tmp_path).open()
    write_sugar_crepe(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="None of the 3 images"):
        benchmarks.SugarCrepe(tmp_path, tmp_path / "none").open()


def test_sugar_crepe_as_published(tmp_path):
    """The part whose images are available: 47 images, 211 choices."""
    pictures = shared_data("coco_mini/images")
    evaluator = benchmarks.SugarCrepe(shared_data("sugar_crepe"), pictures)
    assert len(evaluator.read()) == 7511
    report = evaluator.evaluate(scoring.tiny_predictor(tmp_path, batch_size=16))
    assert report.details["num_images"] == 47
    assert report.details["num_choices"] == 211
    assert set(report.details["choices"]) == {
        "replace_obj",
        "replace_att",
        "replace_rel",
        "swap_obj",
        "swap_att",
        "add_obj",
        "add_att",
    }
