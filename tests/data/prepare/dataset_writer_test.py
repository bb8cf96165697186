"""TFDS reads the data sets written here, and only these are replaced."""

import io

import pytest
import tensorflow_datasets as tfds
from PIL import Image

from cappa_tf.data import schema
from cappa_tf.data.images import decode_resize

IMAGE = "image/encoded"


def examples(count, labelled, start=0):
    """Examples with 0, 1 or 2 captions; `labelled(i)` is the label of i."""
    result = []
    for i in range(start, start + count):
        stored = io.BytesIO()
        Image.new("RGB", (9 + i, 8), (i, 0, 0)).save(stored, "PNG")
        captions = [f"caption {i}", "deux é"][: i % 3]
        example = schema.Example(
            f"k{i}é", stored.getvalue(), captions, labelled(i)
        )
        result.append(example)
    return result


def read(builder, split):
    """(key, image bytes, captions, label) as read by TFDS."""
    decoders = {IMAGE: tfds.decode.SkipDecoding()}
    found = []
    for record in builder.as_dataset(split=split, decoders=decoders):
        label = record["label"].numpy().tolist() if "label" in record else []
        found.append(
            (
                record["key"].numpy().decode(),
                record[IMAGE].numpy(),
                [c.decode() for c in record["captions"].numpy()],
                label if isinstance(label, list) else [label],
            )
        )
    return sorted(found)


@pytest.mark.parametrize(
    "labelled, classes",
    [
        (lambda i: None, None),
        (lambda i: i % 2, ["cat", "dog"]),
        (lambda i: i, None),
        (lambda i: 1 if i % 2 else None, ["cat", "dog"]),
        (lambda i: i if i % 2 else None, None),
    ],
    ids=["none", "classes", "numbers", "some classes", "some numbers"],
)
def test_tfds_reads_the_same(tmp_path, labelled, classes):
    splits = {
        "train": examples(7, labelled),
        "dev-2": examples(2, labelled, 20),
    }
    description = schema.write_dataset(
        splits, tmp_path, "My-pets.v1", 3, {"classes": classes}
    )
    builder = tfds.builder_from_directory(tmp_path)
    assert builder.name == "My-pets.v1"
    assert set(builder.info.splits) == set(splits)
    for split, expected in splits.items():
        info = builder.info.splits[split]
        shards = description.shards(split)
        assert info.shard_lengths == [s.num_examples for s in shards]
        assert info.num_bytes == sum(s.num_bytes for s in shards)
        assert [str(path) for path in info.filepaths] == [
            shard.path for shard in shards
        ]
        assert read(builder, split) == sorted(
            (
                e.key,
                e.image,
                e.captions,
                [] if e.label is None else [e.label],
            )
            for e in expected
        )
    if classes:
        label = builder.info.features["label"]
        assert getattr(label, "feature", label).names == classes


def test_tfds_decodes_the_same_picture(tmp_path):
    (example,) = examples(1, lambda i: None)
    schema.write_dataset({"train": [example]}, tmp_path, "d")
    builder = tfds.builder_from_directory(tmp_path)
    (record,) = builder.as_dataset(split="train")
    expected = decode_resize.decode(example.image).numpy()
    assert (record[IMAGE].numpy() == expected).all()


def test_a_data_set_of_tfds_is_not_replaced(tmp_path):
    (tmp_path / "mnist-train.tfrecord-00000-of-00001").write_text("precious")
    (tmp_path / "dataset_info.json").write_text('{"description": "digits"}')
    with pytest.raises(ValueError, match="which holds.*dataset_info.json"):
        schema.write_dataset(
            {"train": examples(1, lambda i: None)},
            tmp_path,
            "d",
            overwrite=True,
        )
    assert len(list(tmp_path.iterdir())) == 2


def test_split_names_that_tfds_cannot_read_are_refused(tmp_path):
    some = examples(2, lambda i: None)
    for split in ("v1.0", "all", "a/b"):
        with pytest.raises(ValueError, match=f"split='{split}'"):
            schema.write_dataset({split: some}, tmp_path, "d")
    assert not list(tmp_path.iterdir())
