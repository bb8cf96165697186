"""Image folder: a plain folder of images as a source."""

import json

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from cappa_tf.data.caption_dataset import CaptionDataset
from cappa_tf.data.sources import image_folder, image_rows, mixture
from cappa_tf.data.tokenizer import Tokenizer, train_tokenizer

COUNT = 7


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("vocabulary") / "v.model")
    words = [f"{a} square {b}" for a in "ab" for b in range(COUNT)]
    train_tokenizer(words, path, 30)
    return Tokenizer(path, max_length=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven noisy images of "train"; one is missing, one has no caption."""
    path = tmp_path_factory.mktemp("folder")
    random, rows = np.random.RandomState(0), []
    for i in range(COUNT):
        name = f"{i}.{'jpg' if i % 2 else 'png'}"
        pixels = random.randint(256, size=(12, 16, 3)).astype("uint8")
        if i != 3:
            Image.fromarray(pixels).save(path / name)
        captions = [] if i == 5 else [f"a square {i}", f"b square {i}"]
        rows.append({"image": name, "captions": captions, "label": "ab"[i % 2]})
    rows[0]["captions"].append(" ")
    rows = [row | {"split": "train"} for row in rows]
    lines = [json.dumps(row) for row in rows] + ["{"]
    (path / "captions.jsonl").write_text("\n".join(lines))
    return path


def make(path, tokenizer, **options):
    options = {"max_skipped_fraction": 1.0, "batch_size": 4, **options}
    return CaptionDataset(path, "train", tokenizer, 12, **options)


def test_bad_ones_are_skipped_and_counted(folder, tokenizer):
    data = make(str(folder), tokenizer)
    assert (data.num_examples, data.max_captions) == (COUNT, 2)
    batches = list(data.evaluate().as_numpy_iterator())
    mask = np.concatenate([batch["_mask"] for batch in batches])
    assert mask.tolist() == [1, 1, 1, 0, 1, 0, 1, 0]
    assert data.skipped == {
        "malformed row": 1,
        "empty caption": 1,
        "image missing": 1,
        "no caption": 1,
    }
    assert data.noted == {"malformed row": 1, "empty caption": 1}
    examples = list(data.read_examples())
    assert [bool(e.captions) for e in examples] == [
        i not in (3, 5) for i in range(COUNT)
    ]
    assert examples[0].key == "0.png"
    assert examples[0].captions == ["a square 0", "b square 0"]
    with Image.open(folder / "0.png") as image:
        expected = tf.image.resize(np.asarray(image), (12, 12))
    found = (batches[0]["image"][0] + 1) * 127.5
    np.testing.assert_allclose(found, expected, atol=0.51)
    # Few may be skipped in training, by default.
    with pytest.raises(Exception, match="max_skipped_fraction"):
        list(make(folder, tokenizer, max_skipped_fraction=0.001).evaluate())


def test_labels_are_those_of_all_splits(folder):
    source = image_folder.ImageFolder(folder)
    assert source.class_names == ["a", "b"]
    batch = next(make(source, None).evaluate().as_numpy_iterator())
    assert batch["label"][[0, 1, 2]].tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="one of .'train'.*Received: .*'test'"):
        source.split("test")


def _stream(data, count, **options):
    batches = data.train(**options).take(count).as_numpy_iterator()
    return [batch["image"] for batch in batches]


def test_the_stream_is_a_function_of_the_position(folder, tokenizer):
    """The same with any cache, from any start, and on several hosts."""
    whole = _stream(make(folder, tokenizer), 4)
    for cache in ("records", "images"):
        again = _stream(make(folder, tokenizer, cache=cache), 4)
        np.testing.assert_array_equal(whole, again)
    later = _stream(make(folder, tokenizer), 1, start_index=8)
    np.testing.assert_array_equal(later[0], whole[2])
    parts = [
        _stream(make(folder, tokenizer, batch_size=2), 1, host=h, num_hosts=2)
        for h in (0, 1)
    ]
    first = np.stack([part[0] for part in parts], 1).reshape(whole[0].shape)
    good = (whole[0] == first).all((1, 2, 3))
    # A bad record is replaced by a neighbor in its own batch.
    assert good.sum() >= 2


def test_the_cells_of_a_parquet_file_are_images(tmp_path, folder, tokenizer):
    pyarrow = pytest.importorskip("pyarrow", reason="pip install '.[parquet]'")
    from pyarrow import parquet

    content = (folder / "0.png").read_bytes()
    image = [{"bytes": content, "path": "x.png"}] * 2
    table = pyarrow.table({"image": image, "caption": ["a 1", "b 2"]})
    parquet.write_table(table, tmp_path / "train.parquet")
    data = make(tmp_path / "train.parquet", tokenizer)
    rows = image_rows.read_rows(tmp_path / "train.parquet")
    data.split = image_rows.choose_split(rows[0])
    batch = next(data.evaluate().as_numpy_iterator())
    expected = next(make(folder, tokenizer).evaluate().as_numpy_iterator())
    np.testing.assert_array_equal(batch["image"][0], expected["image"][0])


def test_in_a_mixture(folder, tokenizer):
    sources = [image_folder.ImageFolder(folder)] * 2
    data = make(mixture.Mixture(sources, [1, 1]), tokenizer)
    (images,) = _stream(data, 1)
    assert images.shape == (4, 12, 12, 3)


def test_a_small_image_is_a_bad_record(tmp_path):
    Image.new("RGB", (30, 7)).save(tmp_path / "small.jpg")
    Image.new("RGB", (30, 8)).save(tmp_path / "large.jpg")
    rows = [{"image": f"{n}.jpg", "split": "train"} for n in ("small", "large")]
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "captions.jsonl").write_text(lines)
    data = make(tmp_path, None)
    batch = next(data.evaluate().as_numpy_iterator())
    assert batch["_mask"].tolist() == [0, 1, 0, 0]
    assert data.skipped == {"image with a side below 8 pixels": 1}
