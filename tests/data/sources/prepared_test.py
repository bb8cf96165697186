"""`Folder`: the kind of data that a path leads to."""

import tensorflow as tf
from PIL import Image

from cappa_tf.data import description, schema
from cappa_tf.data.sources import prepared


def kind(path):
    return type(prepared.Folder(path).source).__name__


def write_data(folder):
    image = tf.io.encode_png(tf.zeros([9, 9, 3], tf.uint8)).numpy()
    example = schema.Example("k", image, ["a caption"], label=1)
    splits = {"train": [example], "test": [example]}
    schema.write_dataset(splits, folder, "some", metadata={})


def test_prepared_data_name_their_splits(tmp_path):
    write_data(tmp_path / "some")
    assert kind(tmp_path / "some") == "PreparedData"
    assert prepared.Folder(tmp_path / "some").splits == ["train", "test"]
    # Before they are written, too.
    assert kind(tmp_path / "none") == "PreparedData"


def test_usual_names_of_features_are_found_in_tfds(tmp_path):
    write_data(tmp_path)
    (tmp_path / description.FILE_NAME).unlink()
    source = prepared.Folder(tmp_path)
    assert kind(tmp_path) == "TFDS"
    assert sorted(source.splits) == ["test", "train"]
    (example,) = source.split("train").read_examples()
    assert (example.key, example.captions) == ("k", ["a caption"])
    assert example.label == 1 and example.image


def test_shards_are_read_in_place(tmp_path):
    for number, name in enumerate(
        ("train-00000.tar", "train-0-of-8.tar", "train/anything.tar")
    ):
        path = tmp_path / str(number) / name
        path.parent.mkdir(parents=True)
        path.touch()
        assert kind(tmp_path / str(number)) == "WebDataset"
        assert prepared.Folder(tmp_path / str(number)).splits is None
    assert kind(tmp_path / "{split}-*.tar") == "WebDataset"
    assert kind(tmp_path / "{split}" / "*.tfrecord") == "TFRecords"
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "train-00000.tfrecord").touch()
    assert kind(tmp_path / "3") == "TFRecords"


def test_an_archive_beside_images_changes_nothing(tmp_path):
    """Such as the one that the images came in."""
    for name in ("table", "above", "below"):
        (tmp_path / name / "images").mkdir(parents=True)
    (tmp_path / "table" / "captions.csv").write_text("image,caption\n")
    (tmp_path / "table" / "images-00000.tar").touch()
    Image.new("RGB", (9, 9)).save(tmp_path / "above" / "1.png")
    (tmp_path / "above" / "images-1.tar").touch()
    Image.new("RGB", (9, 9)).save(tmp_path / "below" / "images" / "1.png")
    (tmp_path / "below" / "all-images.tar").touch()
    for name in ("table", "above", "below"):
        assert kind(tmp_path / name) == "ImageFolder"


def test_splits_of_a_folder_of_images(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "1.png")
    (tmp_path / "captions.jsonl").write_text(
        '{"image": "1.png", "caption": "a", "split": "dev"}'
    )
    assert prepared.Folder(tmp_path).splits == ["dev"]
