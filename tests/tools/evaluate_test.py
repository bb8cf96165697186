"""tools/evaluate.py measures features on folders and TFRecords alike."""

import json

import numpy as np
import numpy_reference as reference
import pytest
import tensorflow as tf
from absl import flags
from PIL import Image

from cappa_tf.data import tfrecord
from cappa_tf.evaluation.labelled import LabelledImages
from cappa_tf.export import big_vision
from tools import evaluate

COLOURS = ((250, 20, 20), (20, 250, 20), (20, 20, 250))


def run(**values):
    """Parses flags like the program; returns what the JSON file says."""
    flag_values = flags.FlagValues()
    evaluate.define_flags(flag_values)
    arguments = [f"--{name}={value}" for name, value in values.items()]
    flag_values(["evaluate", "--task=fewshot", *arguments])
    with open(evaluate.evaluate(flag_values)) as file:
        return json.load(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures in the colour of their class, some bad ones, a checkpoint."""
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
    assert report["results"][3]["mean"] == 1.0  # The colours are far apart.
    assert len(report["results"][3]["accuracies"]) == 2
    printed = capsys.readouterr().out
    assert "100.00%" in printed and "skipped of train: 1 x no label" in printed


def test_records_give_the_same_pictures(folder, tmp_path):
    examples = [
        tfrecord.Example(str(i), (folder / f"{i}.png").read_bytes(), [], i % 3)
        for i in range(24, 36)
    ]
    tfrecord.write_dataset({"test": examples}, tmp_path / "records", "colours")
    both = []
    for path in (folder, tmp_path / "records"):
        data = LabelledImages(path, "test", (8, 6))
        both.append([np.concatenate(p) for p in zip(*data.batches(5))])
    assert both[0][0].shape == (12, 8, 6, 3)
    assert -1 <= both[0][0].min() < both[0][0].max() <= 1
    # Shards are read one after the other: bring both into one order.
    order = [np.lexsort(images.reshape(12, -1).T) for images, _ in both]
    for first, second in zip(*both):
        np.testing.assert_array_equal(first[order[0]], second[order[1]])


def test_middle_of_the_picture_keeps_its_aspect_ratio(folder):
    data = LabelledImages(folder, "test", 7, "resize_small")
    images, _ = next(data.batches(12))
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
