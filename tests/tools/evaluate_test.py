"""tools/evaluate.py: the same results from folders and TFRecords."""

import json
import types

import numpy as np
import numpy_reference as reference
import pytest
import scoring
import tensorflow as tf
import tiny
from absl import flags
from PIL import Image

from cappa_tf.data import schema
from cappa_tf.evaluation import caption_metrics
from cappa_tf.evaluation.evaluator import Report
from cappa_tf.evaluation.features import extract_features, preprocessing
from cappa_tf.evaluation.images import EvaluationImages
from cappa_tf.saving import big_vision
from cappa_tf.utils import files
from tools import evaluate

COLOURS = ((250, 20, 20), (20, 250, 20), (20, 20, 250))


def run(task="fewshot", **values):
    """Parses flags like the program; returns the contents of the JSON file."""
    flag_values = flags.FlagValues()
    evaluate.define_flags(flag_values)
    if task is not None:
        values["task"] = task
    arguments = [f"--{name}={value}" for name, value in values.items()]
    flag_values(["evaluate", *arguments])
    with open(evaluate.evaluate(flag_values)) as file:
        return json.load(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images in the color of their class, some bad ones, a checkpoint."""
    folder = tmp_path_factory.mktemp("labelled")
    rng, lines = np.random.default_rng(0), []
    for i in range(36):
        colour = np.array(COLOURS[i % 3]) + rng.normal(
            scale=20, size=(14, 9, 3)
        )
        picture = Image.fromarray(colour.clip(0, 255).astype(np.uint8))
        picture.save(folder / f"{i}.png")
        split = "test" if i >= 24 else "train"
        line = {"image": f"{i}.png", "label": i % 3, "split": split}
        lines.append(json.dumps(line))
    lines.append('{"image": "lost.png", "label": 0, "split": "train"}')
    lines.append('{"image": "0.png", "key": "x", "split": "train"}')
    (folder / "labels.jsonl").write_text("\n".join(lines))
    arrays = reference.random_captioner(reference.Sizes(width=16))
    captioner = big_vision.load_captioner(arrays)
    captioner.save(folder / "captioner.keras")
    return folder


def test_flags_of_questions_and_of_reading(folder):
    flag_values = flags.FlagValues()
    evaluate.define_flags(flag_values)
    given = ["--checkpoint=c", f"--data={folder}", "--prompt=read: {question}"]
    answers = f"--answers={folder / 'labels.jsonl'}"
    flag_values(["evaluate", "--task=vqa", answers, *given])
    (vqa,) = evaluate._evaluators(flag_values)
    assert vqa.needs == ("autoregressive",)
    vqa.open()
    flag_values(["evaluate", "--task=ocr", "--test_split=dev", *given])
    (ocr,) = evaluate._evaluators(flag_values)
    assert ocr.needs == ("generate",)
    with pytest.raises(ValueError, match="split='dev'"):
        ocr.open()


def test_fewshot_on_a_folder(folder, capsys):
    report = run(
        checkpoint=folder / "captioner.keras",
        data=folder,
        shots="1,4",
        l2="1,1024",
        num_seeds=2,
        batch_size=7,
    )
    assert (folder / "captioner.fewshot.json").exists()
    assert report["classes"] == 3
    assert report["examples"] == {"train": 24, "test": 12}
    assert report["skipped"]["train"] == {"image missing": 1, "no label": 1}
    settings = [(r["shots"], r["l2"]) for r in report["results"]]
    assert settings == [(1, 1), (1, 1024), (4, 1), (4, 1024)]
    assert report["results"][3]["mean"] == 1.0  # The colors are far apart.
    assert len(report["results"][3]["accuracies"]) == 2
    printed = capsys.readouterr().out
    assert "100.00%" in printed and "skipped in train: 1 x no label" in printed


def test_records_give_the_same_pictures(folder, tmp_path):
    examples = [
        schema.Example(str(i), (folder / f"{i}.png").read_bytes(), [], i % 3)
        for i in range(24, 36)
    ]
    schema.write_dataset({"test": examples}, tmp_path / "records", "colours")
    both = []
    for path in (folder, tmp_path / "records"):
        data = EvaluationImages(path, "test")
        read = zip(*data.labelled(preprocessing((8, 6)), 5))
        both.append([np.concatenate(part) for part in read][:2])
    assert both[0][0].shape == (12, 8, 6, 3)
    assert -1 <= both[0][0].min() < both[0][0].max() <= 1
    # Shards are read one after the other: bring both into one order.
    order = [np.lexsort(images.reshape(12, -1).T) for images, _ in both]
    for first, second in zip(*both):
        np.testing.assert_array_equal(first[order[0]], second[order[1]])


@pytest.mark.parametrize("scheme", ["", "ram:/"])
def test_what_is_not_defined_is_null(tmp_path, scheme):
    report = Report(
        {"tau": float("nan"), "top_1": 0.5},
        [],
        {"shots": [(1, np.float64("inf"))]},
        [{"score": -float("inf")}],
    )
    flag_values = flags.FlagValues()
    evaluate.define_flags(flag_values)
    folder = f"{scheme}{tmp_path}"
    files.write_text(f"{folder}/captioner.keras", "")
    needed = ["--task=caption", f"--checkpoint={folder}", "--data=none"]
    flag_values(["evaluate", *needed])
    hub = evaluate.default_output("hf://user/name@v1", "caption")
    assert hub == "user_name@v1.caption.json"  # Beside the hub nobody writes.
    path = evaluate.default_output(folder, "caption")
    evaluate.write_report(report, "caption", flag_values, path)

    def strict(text):
        return json.loads(text, parse_constant=pytest.fail)

    assert path == f"{folder}/caption.json"
    found = strict(files.read_text(path))
    assert found["metrics"] == {"tau": None, "top_1": 0.5}
    assert found["shots"] == [[1, None]]
    rows = files.read_text(f"{folder}/caption.jsonl")
    assert strict(rows) == {"score": None}


class _Part:
    """One host of two, which receives the values of the other."""

    count = 2

    def __init__(self, index, others=()):
        self.index, self._others = index, others

    def gather(self, value):
        self.given = value
        return [value, *self._others]


def test_two_hosts_have_the_features_of_one(folder, tmp_path):
    examples = [
        schema.Example(str(i), (folder / f"{i}.png").read_bytes(), [], i % 3)
        for i in range(24)
    ]
    schema.write_dataset({"train": examples}, tmp_path, "colours")

    def encode(images):
        return images.mean(axis=1)[:, 0]

    model = types.SimpleNamespace(features=encode, image_size=(7, 7))

    for path in (folder, tmp_path):
        data = EvaluationImages(path, "train")
        whole = extract_features(model, data, batch_size=5)
        skipped = dict(data.skipped)
        second = _Part(1)
        extract_features(model, data, batch_size=5, hosts=second)
        shared = extract_features(
            model, data, batch_size=5, hosts=_Part(0, [second.given])
        )
        assert 0 < len(second.given[0]) < len(whole[1])
        for one, other in zip(whole, shared, strict=True):
            np.testing.assert_array_equal(one, other)
        assert dict(data.skipped) == skipped


def test_middle_of_the_picture_keeps_its_aspect_ratio(folder):
    data = EvaluationImages(folder, "test")
    images, *_ = next(data.labelled(preprocessing(7, "resize_small"), 12))
    # 14 x 9 becomes 12 x 8, of which rows 2-8 and columns 0-6 are kept.
    with Image.open(folder / "24.png") as picture:
        pixels = tf.constant(np.asarray(picture))
    expected = tf.image.resize(pixels, (12, 8))[2:9, :7]
    found = (images[0] + 1) * 127.5
    np.testing.assert_allclose(found, expected, atol=0.51)


def test_wrong_values_are_named(folder):
    good = {"checkpoint": folder / "captioner.keras", "data": folder}
    with pytest.raises(ValueError, match="--shots"):
        run(**good, shots="1,many")
    with pytest.raises(ValueError, match="--l2"):
        run(**good, l2="0")
    with pytest.raises(ValueError, match="test.*validation"):
        run(**good, test_split="validation")
    with pytest.raises(ValueError, match="nowhere"):
        run(**{**good, "checkpoint": "nowhere"})


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    vocabulary = tmp_path_factory.mktemp("vocabulary")
    return scoring.save_run(tmp_path_factory.mktemp("run"), vocabulary)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    return scoring.write_colours(tmp_path_factory.mktemp("colours"))


def test_zero_shot_of_a_run(run_folder, colours, capsys):
    report = run(
        "zero_shot",
        checkpoint=run_folder,
        data=colours / "labels",
        templates="{} square",
        parallel=True,
        limit=4,
    )
    assert report["num_images"] == 4
    assert report["class_names"] == ["red", "green", "blue"]
    assert {"top_1", "parallel/top_1", "minus_blind/top_1"} <= {
        *report["metrics"]
    }
    assert "4 images, 3 classes" in capsys.readouterr().out
    assert (run_folder / "zero_shot.json").exists()


def test_captions_leave_their_rows_and_sheets(run_folder, colours, monkeypatch):
    pytest.importorskip("pycocoevalcap", reason="pip install '.[test]'")
    # METEOR takes several seconds to start.
    monkeypatch.setattr(caption_metrics, "has_java", lambda: False)
    report = run(
        "caption",
        checkpoint=run_folder / "model.keras",
        data=colours / "captions",
        output=run_folder / "told.json",
    )
    assert report["metrics"]["num_images"] == 6
    lines = (run_folder / "told.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"][-5] for line in lines] == [*"012345"]
    for name in ("worst", "best"):
        assert Image.open(run_folder / f"told_{name}.png").width > 100


@pytest.mark.parametrize("task", ["perplexity", "retrieval"])
def test_tasks_on_captions(run_folder, colours, task):
    report = run(
        task, checkpoint=run_folder, data=colours / "captions", limit=3
    )
    assert report["num_images"] == 3
    assert all(value >= 0 for value in report["metrics"].values())


def test_captions_by_beams(run_folder, colours):
    pytest.importorskip("pycocoevalcap", reason="pip install '.[test]'")
    values = {"checkpoint": run_folder, "data": colours / "captions"}
    found = run("caption", beams=2, length_penalty=0.5, **values)
    assert found["metrics"]["num_images"] == 6
    with pytest.raises(ValueError, match="--length_penalty is that of --beams"):
        run("caption", length_penalty=0.5, **values)


def test_hard_negatives_and_what_they_need(run_folder, colours, tmp_path):
    items = [
        {
            "image_path": f"{i}.png",
            "true_caption": "red square",
            "false_caption": "blue square",
        }
        for i in (0, 3, 77)
    ]
    (tmp_path / "colour.json").write_text(json.dumps(items))
    values = {"checkpoint": run_folder, "data": tmp_path / "colour.json"}
    with pytest.raises(ValueError, match="--pictures"):
        run("aro", **values)
    report = run("aro", **values, pictures=colours)
    assert report["num_choices"] == 2
    assert report["left_out"] == {"image missing": 1}
    rows = (run_folder / "aro.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["texts"] == ["red square", "blue square"]


def test_a_model_file_alone_cannot_score_texts(folder, colours):
    with pytest.raises(ValueError, match="preprocessing.json"):
        run(
            "perplexity",
            checkpoint=folder / "captioner.keras",
            data=colours / "captions",
        )


@pytest.fixture(scope="module")
def contrastive_run(tmp_path_factory):
    vocabulary = tmp_path_factory.mktemp("vocabulary")
    model = tiny.make_contrastive(tiny.vocabulary(vocabulary)[1])
    model.build()
    folder = tmp_path_factory.mktemp("contrastive")
    return scoring.save_run(folder, vocabulary, model)


@pytest.mark.parametrize(
    "task, data, values, metric",
    [
        ("zero_shot", "labels", {"templates": "clip_best"}, "top_1"),
        ("retrieval", "captions", {}, "text_to_image/recall@10"),
        ("geometry", "captions", {"limit": 4}, "modality_gap"),
    ],
)
def test_tasks_by_cosine(contrastive_run, colours, task, data, values, metric):
    found = run(task, checkpoint=contrastive_run, data=colours / data, **values)
    assert 0 <= found["metrics"][metric] <= 2
    assert found["num_images"] == values.get("limit", 6)
    assert not [name for name in found["metrics"] if "blind" in name]


@pytest.mark.parametrize("task", ["caption", "perplexity"])
def test_what_needs_tokens_is_refused(contrastive_run, colours, task):
    with pytest.raises(ValueError, match="Contrastive.*predicts no tokens"):
        run(task, checkpoint=contrastive_run, data=colours / "captions")


def test_several_evaluators_of_a_gin_file(run_folder, colours, tmp_path):
    values = {
        "checkpoint": run_folder,
        "data": colours / "labels",
        "gin_file": "gin/evaluation/labelled.gin",
    }
    report = run(
        None,
        **values,
        output=tmp_path / "found",
        gin_param="fewshot.Fewshot.train_split='test'",
    )
    assert report["task"] == "zero_shot" and report["num_images"] == 6
    few = json.loads((tmp_path / "found" / "fewshot.json").read_text())
    assert [*few["metrics"]] == ["10_shot"]
    # What the same file binds for training is not read here, nor refused;
    # what nobody reads is.
    with pytest.raises(ValueError, match="SHOT is set, but nothing"):
        run(None, **values, gin_param="SHOT=[1]")
    with pytest.raises(ValueError, match="--shots does not go with --gin_file"):
        run(None, **values, shots="1")
    with pytest.raises(ValueError, match="--task with --data, or --gin_file"):
        run(None, checkpoint=run_folder)
