"""Behavior common to all sources, whatever their files."""

import io
import tarfile

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from cappa_tf.data import caption_dataset, schema
from cappa_tf.data.sources import (
    class_captions,
    mixture,
    prepared,
    tfds_source,
    tfrecords,
    webdataset,
)
from cappa_tf.data.stream import bad_records, shuffling

COUNT = 21
SHARDS = 3
SIZE = 8


def image(number):
    """A PNG whose pixels tell which example it is."""
    file = io.BytesIO()
    Image.new("L", (SIZE, SIZE), 10 * number).save(file, "PNG")
    return file.getvalue()


EXAMPLES = [
    schema.Example(f"k{i:02d}", image(i), [f"image {i}"], i)
    for i in range(COUNT)
]


def shard(number):
    """The examples of a shard."""
    return EXAMPLES[number::SHARDS]


def write_prepared(path):
    schema.write_dataset({"train": EXAMPLES}, path, "d", SHARDS)
    return prepared.PreparedData(path)


def write_tars(path):
    for number in range(SHARDS):
        with tarfile.open(path / f"train-{number}.tar", "w") as tar:
            for e in shard(number):
                for name, content in (
                    ("png", e.image),
                    ("txt", e.captions[0].encode()),
                    ("cls", str(e.label).encode()),
                ):
                    info = tarfile.TarInfo(f"{e.key}.{name}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return webdataset.WebDataset(path)


def write_img2dataset(path):
    """Writes like img2dataset 1.45, which calls any image jpg."""
    for number in range(SHARDS):
        name = str(path / f"{number:05d}.tfrecord")
        with tf.io.TFRecordWriter(name) as writer:
            for e in shard(number):
                feature = {
                    name: tf.train.Feature(
                        bytes_list=tf.train.BytesList(value=[value])
                    )
                    for name, value in {
                        "key": e.key.encode(),
                        "jpg": e.image,
                        "txt": e.captions[0].encode(),
                        "status": b"success",
                    }.items()
                }
                feature["width"] = tf.train.Feature(
                    int64_list=tf.train.Int64List(value=[e.label])
                )
                features = tf.train.Features(feature=feature)
                writer.write(
                    tf.train.Example(features=features).SerializeToString()
                )
    return tfrecords.TFRecords(
        {"train": str(path / "{00000..00002}.tfrecord")}, label="width"
    )


def write_tfds(path):
    """A data set of TFDS with nested captions, like COCO's; its folder."""
    import tensorflow_datasets
    from tensorflow_datasets.core import dataset_info

    features = tensorflow_datasets.features
    folder = path / "tiny_captions" / "1.0.0"
    folder.mkdir(parents=True)
    info = dataset_info.DatasetInfo(
        builder=dataset_info.DatasetIdentity(
            name="tiny_captions",
            version=tensorflow_datasets.core.Version("1.0.0"),
            data_dir=str(folder),
            module_name="",
        ),
        features=features.FeaturesDict(
            {
                "image": features.Image(encoding_format="png"),
                "image/filename": features.Text(),
                "captions": features.Sequence(
                    {"id": np.int64, "text": np.str_}
                ),
                "label": features.ClassLabel(num_classes=COUNT),
            }
        ),
    )
    writer = tensorflow_datasets.core.SequentialWriter(
        info, max_examples_per_shard=COUNT // SHARDS
    )
    writer.initialize_splits(["train"])
    rows = [
        {
            "image": io.BytesIO(e.image),
            "image/filename": e.key,
            "captions": [{"id": 1, "text": e.captions[0]}],
            "label": e.label,
        }
        for e in EXAMPLES
    ]
    writer.add_examples({"train": rows})
    writer.close_all()
    return folder


def open_tfds(path, **options):
    """A source over the data set of `write_tfds`."""
    return tfds_source.TFDS(
        path,
        label="label",
        key="image/filename",
        **{"captions": "captions/text", **options},
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same 21 examples in every format."""
    path = tmp_path_factory.mktemp
    folder = write_tfds(path("tfds"))
    return {
        "prepared": write_prepared(path("prepared")),
        "webdataset": write_tars(path("tars")),
        "img2dataset": write_img2dataset(path("records")),
        "tfds folder": open_tfds(folder),
        "tfds name": open_tfds(
            "tiny_captions", data_dir=str(folder.parents[1])
        ),
    }


SOURCES = ("prepared", "webdataset", "img2dataset", "tfds folder")


def make(source, **options):
    """A `CaptionDataset` without captions."""
    options = {"batch_size": 7, "cache": "stream", **options}
    return caption_dataset.CaptionDataset(
        source, "train", None, SIZE, **options
    )


def numbers(batches):
    """Which examples some batches hold, read off their pixels."""
    pixels = np.concatenate([b["image"][:, 0, 0, 0] for b in batches])
    return np.round((pixels + 1) * 12.75).astype(int).tolist()


def take(dataset, count):
    return list(dataset.take(count).as_numpy_iterator())


@pytest.mark.parametrize("name", [*SOURCES, "tfds name"])
def test_the_examples_are_what_was_written(sources, name):
    found = list(sources[name].split("train").read_examples())
    assert sorted(found, key=lambda e: e.label) == [
        e if name != "webdataset" else _named_by_shard(e) for e in EXAMPLES
    ]


def _named_by_shard(example):
    number = example.label % SHARDS
    return schema.Example(
        f"train-{number}.tar/{example.key}",
        example.image,
        example.captions,
        example.label,
    )


@pytest.mark.parametrize("name", SOURCES)
def test_epochs_starts_and_labels(sources, name):
    data = make(sources[name], num_readers=2, shuffle_buffer=8)
    whole = take(data.train(), 6)
    seen = numbers(whole)
    assert sorted(seen[:COUNT]) == sorted(seen[COUNT:]) == list(range(COUNT))
    assert seen[:COUNT] not in (seen[COUNT:], list(range(COUNT)))
    assert np.concatenate([b["label"] for b in whole]).tolist() == seen
    later = take(data.train(start_index=10), 3)
    assert numbers(later) == seen[10:31]
    assert later[0]["index"].tolist() == list(range(10, 17))
    assert data.skipped == {}


def test_pixels_in_memory(sources):
    held = take(make(sources["webdataset"], cache="images").train(), 3)
    assert sorted(numbers(held)) == list(range(COUNT))
    labels = np.concatenate([batch["label"] for batch in held])
    assert labels.tolist() == numbers(held)


@pytest.mark.parametrize("name", ["prepared", "webdataset"])
@pytest.mark.parametrize(("batch_size", "num_hosts"), [(5, 3)])
def test_evaluation_counts_all(sources, name, batch_size, num_hosts):
    data = make(sources[name])
    seen, lengths = {}, set()
    for host in range(num_hosts):
        batches = take(data.evaluate(batch_size, host, num_hosts), -1)
        lengths.add(len(batches))
        for batch in batches:
            assert batch["image"].shape[0] == batch_size
            real = batch["_mask"] == 1
            assert not (batch["index"][real] % num_hosts - host).any()
            for index, label in zip(batch["index"][real], batch["label"][real]):
                assert index not in seen
                seen[index] = label
    assert lengths == {-(-COUNT // (num_hosts * batch_size))}
    written = [e.label for e in data.read_examples()]
    assert [seen[i] for i in range(COUNT)] == written
    assert sorted(written) == list(range(COUNT))


def test_a_part_of_a_split_of_tfds(sources):
    source = sources["tfds folder"]
    whole = [e.key for e in source.split("train").read_examples()]
    parts = [
        [e.key for e in source.split(split).read_examples()]
        for split in ("train[:5]", "train[5:]")
    ]
    assert [len(part) for part in parts] == [5, 16]
    assert parts[0] + parts[1] == whole


def test_what_tfds_has_not_is_named(sources, tmp_path):
    source = sources["tfds folder"]
    with pytest.raises(ValueError, match=r"\['train'\].*split='val'"):
        source.split("val")
    builder = source.builder
    with pytest.raises(ValueError, match="captions='captions/words'"):
        open_tfds(builder.data_dir, captions="captions/words").split("train")
    with pytest.raises(ValueError, match="path='no_such_data'"):
        tfds_source.TFDS("no_such_data").split("train")
    with pytest.raises(ValueError, match="tfds build mnist"):
        tfds_source.TFDS("mnist", data_dir=str(tmp_path)).split("train")


def test_records_of_other_features_are_named(sources):
    source = sources["img2dataset"]
    plain = tfrecords.TFRecords(source._path).split("train")
    assert {e.label for e in plain.read_examples()} == {None}
    source = tfrecords.TFRecords(source._path, image=["png"])
    data = make(source)
    with pytest.raises((tf.errors.OpError, ValueError)):
        take(data.train(), 1)
    with pytest.raises(ValueError, match=r"\['png'\], but \['jpg', 'key'"):
        raise data.failure


def write_foreign(path, *examples):
    """A shard of {name: values}: bytes, integers or floats."""
    with tf.io.TFRecordWriter(str(path)) as writer:
        for example in examples:
            feature = {}
            for name, values in example.items():
                kind = {
                    bytes: ("bytes_list", tf.train.BytesList),
                    int: ("int64_list", tf.train.Int64List),
                    float: ("float_list", tf.train.FloatList),
                }[type(values[0])]
                feature[name] = tf.train.Feature(
                    **{kind[0]: kind[1](value=values)}
                )
            features = tf.train.Features(feature=feature)
            writer.write(
                tf.train.Example(features=features).SerializeToString()
            )


def test_keys_of_any_type_and_captions_of_any_encoding(tmp_path):
    said = [
        ([7], b"plain"),
        ([7, 8], b"\xef\xbb\xbfmark"),
        ([0.5], "é".encode("utf-16")),
        ([b"a", b"b"], "é".encode("utf-32")),
    ]
    write_foreign(
        tmp_path / "train-0.tfrecord",
        *(
            {"jpg": [image(i)], "key": key, "txt": [caption], "n": [i]}
            for i, (key, caption) in enumerate(said)
        ),
    )
    split = tfrecords.TFRecords(tmp_path, label="n").split("train")
    expected = ["plain", "mark", "é", "é"]
    examples = list(split.read_examples())
    assert [e.key for e in examples] == ["7", "7,8", "0.5", "a,b"]
    assert [e.captions for e in examples] == [[c] for c in expected]
    for i, (_, record) in enumerate(
        shuffling.in_sequence(split).as_numpy_iterator()
    ):
        parsed = split.parse(tf.constant(record))
        assert parsed["captions"].numpy().tolist() == [expected[i].encode()]
        assert (int(parsed["label"]), parsed["image/encoded"]) == (i, image(i))


OF_ANOTHER_KIND = [
    ({"txt": [5]}, "5: the feature 'txt' must be a bytes_list.*int64"),
    ({"jpg": [1.0]}, "5: the feature 'jpg' must be a bytes_list.*float"),
    ({"n": [b"cat"]}, "5: the feature 'n' must be a int64_list.*bytes"),
    ({"n": [1, 2]}, "5: the feature 'n' holds 2 numbers"),
    ({"txt": [b"caf\xe9"]}, "5: the text is not UTF-8 .byte 0xe9 at 3"),
]


def test_features_of_another_kind_are_named(tmp_path):
    good = {"jpg": [image(1)], "key": [5], "txt": [b"c"], "n": [1]}
    wrong = [{**good, **features} for features, _ in OF_ANOTHER_KIND]
    write_foreign(tmp_path / "train-0.tfrecord", good, *wrong)
    split = tfrecords.TFRecords(tmp_path, label="n").split("train")
    first, *others = (
        r for _, r in shuffling.in_sequence(split).as_numpy_iterator()
    )
    split.parse(tf.constant(first))
    for record, (_, message) in zip(others, OF_ANOTHER_KIND, strict=True):
        with pytest.raises(ValueError, match=message):
            split.deserialize(record)
        with pytest.raises(tf.errors.OpError):
            split.parse(tf.constant(record))


@pytest.mark.parametrize("damage", ["cut", "cut in a length", "overwritten"])
@pytest.mark.parametrize("alone", [True, False])
def test_what_a_damaged_shard_lost_is_counted(tmp_path, damage, alone):
    rows = [{"jpg": [bytes(100)], "txt": [b"c"]}] * 10
    for number in range(1 if alone else 2):
        write_foreign(tmp_path / f"train-{number}.tfrecord", *rows)
    path = tmp_path / "train-0.tfrecord"
    content = path.read_bytes()
    end = len(content) * 4 // 10
    path.write_bytes(
        {
            "cut": content[: end + 50],
            "cut in a length": content[: end + 7],
            "overwritten": content[:end] + b"\xff" * (len(content) - end),
        }[damage]
    )
    split = tfrecords.TFRecords(tmp_path).split("train")
    counter = bad_records.SkipCounter(10.0, split.num_examples, "data")
    split.check(counter)
    # A single truncated shard counts as many lost records as it still has.
    expected = 4 if alone and damage != "overwritten" else 6
    assert counter.counts == {"damaged shard": expected}
    strict = bad_records.SkipCounter(0.05, split.num_examples, "data")
    with pytest.raises(ValueError, match=f"{expected} records were skipped"):
        split.check(strict)


def test_a_mixture_of_all_of_them(sources):
    mixed = mixture.Mixture([sources[name] for name in SOURCES], [1] * 4)
    data = make(mixed)
    assert data.num_examples == 4 * COUNT
    seen = [n for b in take(data.evaluate(), -1) for n in b["label"]]
    assert sorted(seen) == sorted(4 * list(range(COUNT)))
    batches = take(data.train(), 12)
    assert numbers(batches) == [n for b in batches for n in b["label"]]
    assert [e.label for e in data.read_examples()] == seen


def test_what_is_no_source_is_refused():
    with pytest.raises(ValueError, match="Received: 3"):
        make(3)


def test_captions_of_labels(sources):
    source = class_captions.LabelCaptions(
        sources["tfds folder"],
        [f"class {i}" for i in range(COUNT - 1)],
        ["a {}", "the {}"],
    )
    split = source.split("train")
    assert split.max_captions == 2
    serialized = [
        s for _, s in shuffling.in_sequence(split).as_numpy_iterator()
    ]
    for record, example in zip(serialized, split.read_examples()):
        i = example.label
        expected = [f"a class {i}", f"the class {i}"] if i < COUNT - 1 else []
        assert example.captions == expected
        parsed = split.parse(tf.constant(record))["captions"].numpy()
        assert [c.decode() for c in parsed] == expected
    with pytest.raises(ValueError, match="templates="):
        class_captions.LabelCaptions("here", ["a"], ["no place"])
