"""A photo stored sideways is read upright from every source."""

import io
import tarfile

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from cappa_tf.data import schema
from cappa_tf.data.images import decode_resize, image_files
from cappa_tf.data.preprocessing import ImagePreprocessing
from cappa_tf.data.sources import (
    image_folder,
    prepared,
    tfds_source,
    tfrecords,
    webdataset,
)
from cappa_tf.data.stream.decoding import RecordDecoder
from cappa_tf.export import request_images

H, W = 40, 64  # as it is stored


@pytest.fixture(scope="module")
def photo():
    """A JPEG with orientation 6: dark at the top of what the sensor saw."""
    random = np.random.RandomState(0)
    pixels = random.randint(256, size=(3, 4, 3)).astype("uint8")
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image = Image.fromarray(pixels).resize((W, H), Image.Resampling.BICUBIC)
    image.save(file, "JPEG", exif=exif)
    return file.getvalue()


@pytest.fixture(scope="module")
def sources(photo, tmp_path_factory):
    """The photo in a tar, in foreign TFRecords, in TFDS and prepared."""
    folder = tmp_path_factory.mktemp("photo")
    with tarfile.open(folder / "train-0.tar", "w") as tar:
        for name, content in (("1.jfif", photo), ("1.txt", b"a caption")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    values = {"jpg": photo, "txt": b"a caption", "key": b"k"}
    feature = {
        name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        for name, value in values.items()
    }
    example = tf.train.Example(features=tf.train.Features(feature=feature))
    with tf.io.TFRecordWriter(str(folder / "train-0.tfrecord")) as writer:
        writer.write(example.SerializeToString())
    found = {
        "tar": webdataset.WebDataset(folder),
        "tfrecord": tfrecords.TFRecords(folder),
    }
    for name, content in (
        ("as it is", photo),
        ("prepared", image_files.check(photo)),
    ):
        examples = [schema.Example("k", content, ["a caption"])]
        path = folder / name.replace(" ", "_")
        schema.write_dataset({"train": examples}, path, "d")
        found[name] = prepared.PreparedData(path)
        if name == "as it is":
            found["tfds"] = tfds_source.TFDS(
                path, image="image/encoded", captions="captions"
            )
    (folder / "plain").mkdir()
    (folder / "plain" / "1.jpg").write_bytes(photo)
    row = '{"image": "1.jpg", "caption": "a caption", "split": "train"}'
    (folder / "plain" / "captions.jsonl").write_text(row)
    found["folder"] = image_folder.ImageFolder(folder / "plain")
    return found


PREPROCESSING = ImagePreprocessing((W, H), max_pixels=10_000)


@pytest.fixture(scope="module")
def requested(photo):
    """The pixels that a server decodes."""
    pixels, errors = request_images.decode_request(
        tf.constant([photo]), PREPROCESSING
    )
    assert errors.numpy().tolist() == [b""]
    return pixels[0].numpy()


@pytest.mark.parametrize(
    "name", ["tar", "tfrecord", "as it is", "tfds", "folder", "prepared"]
)
def test_read_upright(photo, sources, requested, name):
    split = sources[name].split("train")
    decoder = RecordDecoder(PREPROCESSING, 1, None, records=split)
    batches = decoder.batches(
        split.read(tf.constant(0, tf.int64), 0, 1).enumerate(), 1
    )
    (batch,) = batches.as_numpy_iterator()
    assert batch["ok"].all()
    upright = np.rot90(tf.io.decode_jpeg(photo), 3)
    np.testing.assert_array_equal(requested, upright)
    difference = batch["image"][0].astype(int) - upright
    # Prepared images were encoded as JPEG a second time.
    assert np.abs(difference).max() <= (24 if name == "prepared" else 0)
    assert np.abs(difference).mean() < 4


def test_a_file_is_read_upright(photo, requested, tmp_path):
    """Reads the file like tools/caption.py and the evaluation of files."""
    expected = decode_resize.to_model_range(tf.constant(requested))
    (tmp_path / "1.jpg").write_bytes(photo)
    for pixels in (
        PREPROCESSING.read(tmp_path / "1.jpg"),
        PREPROCESSING.read_bytes(photo),
        PREPROCESSING(tf.constant(photo)),
        # A box is in pixels of the upright image.
        PREPROCESSING.read_bytes(photo, (0, 0, H, W)),
    ):
        np.testing.assert_array_equal(pixels, expected)
    top = PREPROCESSING.read_bytes(photo, (-3, -5, H + 3, W // 2 + 5))
    half = decode_resize.resize(requested[: W // 2], (W, H))
    expected = decode_resize.to_model_range(half)
    np.testing.assert_array_equal(top, expected)
