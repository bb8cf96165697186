"""Label numbers: gaps, classes without images, labels beyond the head."""

import json
import logging

import pytest
import small_run
import tensorflow as tf

from cappa_tf.data import schema
from cappa_tf.data.description import DatasetDescription
from cappa_tf.models.data_checks import check_labels
from cappa_tf.utils.arguments import ranges


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """37 records with the labels 0, 2, 5 in turn."""
    path = str(tmp_path_factory.mktemp("labelled"))
    small_run.write_labelled(path, (0, 2, 5))
    return path


def test_a_data_set_counts_its_labels(folder):
    counts = {0: 13, 2: 12, 5: 12}
    assert DatasetDescription.load(folder).label_counts("train") == counts
    assert small_run.labelled(folder).records.label_counts() == counts


def test_labels_of_an_older_data_set_are_counted_by_reading_it(
    folder, tmp_path
):
    for file in tf.io.gfile.listdir(folder):
        tf.io.gfile.copy(f"{folder}/{file}", f"{tmp_path}/{file}")
    path = tmp_path / "dataset.json"
    content = json.loads(path.read_text())
    for split in content["splits"].values():
        del split["labels"]
    path.write_text(json.dumps(content))
    records = small_run.labelled(tmp_path).records
    assert records.label_counts() == {0: 13, 2: 12, 5: 12}


def test_a_folder_of_images_counts_its_labels(tmp_path):
    rows = []
    for i, label in enumerate(("cat", "dog", "cat")):
        image = small_run._example(i).image
        (tmp_path / f"{i}.png").write_bytes(image)
        rows.append({"image": f"{i}.png", "label": label, "split": "train"})
    text = "\n".join(map(json.dumps, rows))
    (tmp_path / "labels.jsonl").write_text(text)
    assert small_run.labelled(tmp_path).records.label_counts() == {0: 2, 1: 1}


def test_classes_without_images_are_named_in_the_log(folder, caplog):
    """Gaps in the numbers, and a head that is larger than the last."""
    with caplog.at_level(logging.WARNING, "absl"):
        check_labels(small_run.labelled(folder), 8)
    assert f"{folder} train: no image of class 1, 3-4, 6-7 (of 8)" in (
        caplog.text
    )


@pytest.mark.parametrize("num_classes", [5, 3])
def test_labels_beyond_the_head_are_refused(folder, num_classes):
    with pytest.raises(ValueError, match="below NUM_CLASSES") as error:
        check_labels(small_run.labelled(folder), num_classes)
    assert "train 12 record(s) with label 5" in str(error.value)


def test_data_without_labels_is_refused(tmp_path):
    examples = {"train": [small_run._example(i) for i in range(3)]}
    schema.write_dataset(examples, tmp_path, "small", 1)
    with pytest.raises(ValueError, match="needs images with labels"):
        check_labels(small_run.labelled(tmp_path), 3)


def test_a_stream_of_unknown_labels_stops_at_one_beyond(folder, monkeypatch):
    data = small_run.labelled(folder)
    monkeypatch.setattr(data.records, "label_counts", lambda: None)
    check_labels(data, 5)
    with pytest.raises(tf.errors.OpError):
        for _ in data.train(8).take(2):
            pass
    assert "with label 5" in str(data.failure)


def test_ranges_name_many_numbers_briefly():
    assert ranges([3]) == "3"
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges(range(0, 40, 2)).endswith("16, 18 and 10 more")
