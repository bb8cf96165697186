"""Cached features are those of the images, in the same order, or none."""

import json
import os
import shutil

import numpy as np
import pytest
import small_run
import tensorflow as tf
from small_run import LENGTH, SIDE

from cappa_tf.data import schema
from cappa_tf.data.caption_dataset import CaptionDataset
from cappa_tf.data.sources.base import Reading
from cappa_tf.data.sources.mixture import Mixture
from cappa_tf.data.sources.prepared import PreparedData
from cappa_tf.data.stream import shuffling
from cappa_tf.data.stream.features import diagnose
from cappa_tf.data.tokenizer import Tokenizer
from cappa_tf.inference import feature_cache
from cappa_tf.inference.feature_cache import FeatureCache
from cappa_tf.models.vision_encoder import VisionEncoder
from cappa_tf.utils import files

BAD = 5
ROW_TYPES = (
    *(tf.bfloat16, tf.string, tf.string),
    *(tf.int64, tf.bool, tf.string),
)


def make_encoder(**kwargs):
    small = {"hidden_dim": 8, "num_layers": 1, "num_heads": 2, "mlp_dim": 16}
    sizes = {"patch_size": 8, "image_size": SIDE, "pooling": "map"}
    encoder = VisionEncoder(**small, **{**sizes, **kwargs})
    encoder.build()
    return encoder


@pytest.fixture(scope="module", name="encoder")
def _encoder():
    # What it would drop in training, it does not.
    return make_encoder(dropout=0.5, patch_dropout=0.5)


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory):
    """37 examples, of which one is damaged and one has no caption."""
    folder = str(tmp_path_factory.mktemp("data"))
    small_run.write_data(folder)
    examples = [small_run._example(i) for i in range(37)]
    examples[BAD] = schema.Example("bad", b"\xff\xd8\xff", ["red box"])
    examples[20] = schema.Example("mute", examples[20].image, [" "])
    shutil.rmtree(f"{folder}/shards", ignore_errors=True)
    schema.write_dataset({"train": examples}, f"{folder}/shards", "small", 3)
    return folder


def make_data(folder, source=None, **options):
    return CaptionDataset(
        source or f"{folder}/shards",
        "train",
        Tokenizer(folder, LENGTH),
        SIDE,
        max_skipped_fraction=0.2,
        **options,
    )


@pytest.fixture(scope="module", name="caches")
def _caches(folder, encoder, tmp_path_factory):
    """Caches of both kinds, each in parts of ten records."""
    where = str(tmp_path_factory.mktemp("caches"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_cache, "_PART_RECORDS", 10)
        return {
            kind: FeatureCache.open_or_compute(
                encoder, make_data(folder), kind, folder=where, batch_size=4
            )
            for kind in feature_cache.KINDS
        }


READERS = {"cache": "stream", "shuffle_buffer": 8, "num_readers": 4}
STREAMS = {
    "in memory": {"max_words": 2, "captions_per_image": 2},
    "as pixels": {"cache": "images"},
}


@pytest.mark.parametrize("options", STREAMS.values(), ids=STREAMS)
def test_training_batches_are_those_with_images(
    folder, encoder, caches, options
):
    """Also from deep inside the second epoch on, on one host of two."""
    where = {"batch_size": 4, "start_index": 42, "host": 1, "num_hosts": 2}
    plain = make_data(folder, **options)
    cached = make_data(folder, **options).with_features(caches["pre_logits"])
    pairs = zip(plain.train(**where).take(8), cached.train(**where))
    for one, other in pairs:
        assert other.keys() == {"index", "labels", "image_features"}
        np.testing.assert_array_equal(one["index"], other["index"])
        np.testing.assert_array_equal(one["labels"], other["labels"])
        features = encoder(one["image"], training=False)["pre_logits"]
        np.testing.assert_allclose(other["image_features"], features, atol=1e-5)
    assert sum(cached.skipped.values()) == sum(plain.skipped.values()) > 0


def test_evaluation_batches_are_those_with_images(folder, encoder, caches):
    plain, other = (make_data(folder, captions_per_image="all") for _ in "12")
    cached = other.with_features(caches["encoded"])
    batches = [list(data.evaluate(4, 1, 2)) for data in (plain, cached)]
    assert len(batches[0]) == len(batches[1]) == 5
    for one, other in zip(*batches, strict=True):
        for name in ("index", "labels", "_mask"):
            np.testing.assert_array_equal(one[name], other[name])
        real = one["_mask"].numpy() > 0
        features = encoder(one["image"], training=False)["encoded"]
        np.testing.assert_allclose(
            other["image_features"][real], features[real], atol=1e-5
        )
    assert cached.skipped == plain.skipped != {}


@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("options", [{}, READERS], ids=["memory", "readers"])
def test_the_order_of_numbers_is_that_of_records(folder, is_mixed, options):
    source = PreparedData(f"{folder}/shards")
    if is_mixed:
        splits = {"train": ["train", "val"]}
        source = Mixture([source, folder], [3, 1], splits)
    records = source.split("train")
    stored = [r.numpy() for _, r in shuffling.in_sequence(records)]
    for host in range(3):
        reading = Reading(seed=7, host=host, num_hosts=3, **options)
        numbers = records.order(reading, 42).take(30)
        for one, other in zip(numbers, records.stream(reading, 42)):
            assert one[0] == other[0]
            assert stored[int(one[1])] == other[1].numpy()


# What belongs to a cache, and what happens to it.


class Images:
    """37 images in memory, as `CaptionDataset.records_with_images` has them."""

    path, split, num_examples = "images", "train", 37

    def __init__(self, version=0):
        self.identity = {"data": version, "split": "train"}
        random = np.random.default_rng(version)
        self._images = random.normal(size=(37, SIDE, SIDE, 3)).astype("float32")

    def records_with_images(self, first, count, batch_size):
        numbers = tf.data.Dataset.range(first, first + count)
        padding = tf.data.Dataset.from_tensors(tf.constant(-1, tf.int64))

        def record(number):
            return {
                "image": tf.gather(self._images, tf.maximum(number, 0)),
                "captions": [tf.strings.as_string(number), ""],
                "prompts": [tf.strings.as_string(100 + number), ""],
                "label": number,
                "ok": number != BAD,
                "raw": "raw",
            }

        numbers = numbers.concatenate(padding.repeat(-count % batch_size))
        return numbers.map(record).batch(batch_size, drop_remainder=True)

    def diagnose(self, raw):
        return raw.decode(), "name"


class Counting:
    """An encoder that counts the images it is given."""

    def __init__(self, encoder):
        self._encoder, self.count = encoder, 0

    def __call__(self, images, training):
        tf.py_function(self._add, [tf.shape(images)[0]], [])
        return self._encoder(images, training=training)

    def _add(self, count):
        self.count += int(count)

    def __getattr__(self, name):
        return getattr(self._encoder, name)


def count_computed(encoder, where, data=None, **options):
    counting = Counting(encoder)
    cache = FeatureCache.open_or_compute(
        counting, data or Images(), folder=str(where), batch_size=1, **options
    )
    return counting.count, cache


@pytest.fixture(name="small_parts")
def _small_parts(monkeypatch):
    monkeypatch.setattr(feature_cache, "_PART_RECORDS", 10)


def test_what_is_complete_is_not_computed_again(encoder, tmp_path, small_parts):
    count, cache = count_computed(encoder, tmp_path)
    assert count == 37 and "37 computed" in cache.origin
    with open(os.path.join(cache.path, "cache.json")) as file:
        described = json.load(file)
    assert described["complete"] and described["row_shape"] == [8]
    assert described["key"]["data"] == 0
    assert count_computed(encoder, tmp_path)[0] == 0
    # A killed process leaves parts out, and one that was half written.
    os.remove(os.path.join(cache.path, "part-00001.npz"))
    with open(os.path.join(cache.path, "part-00003.npz"), "wb") as file:
        file.write(b"PK\x03")
    count, again = count_computed(encoder, tmp_path)
    assert count == 17
    rows = again.rows(np.array([7, BAD, -1]))
    np.testing.assert_array_equal(rows[0][0], cache.rows(np.array([7]))[0][0])
    assert rows[1].tolist() == [[b"7"], [b"5"], [b""]]
    assert rows[2].tolist() == [[b"107"], [b"105"], [b""]]
    assert rows[3].tolist() == [7, 5, 0]
    assert rows[4].tolist() == [True, False, False]
    assert diagnose(rows[5][1]) == ("raw", "name")


@pytest.mark.parametrize("damage", ["cut", "changed", "foreign"])
def test_damage_is_found_and_mended(encoder, tmp_path, small_parts, damage):
    _, cache = count_computed(encoder, tmp_path)
    rows = cache.rows(np.arange(37))[0]
    path = os.path.join(cache.path, "rows")
    if damage == "cut":
        os.truncate(path, 40 * 32 - 130)  # In the last part.
    elif damage == "changed":
        with open(path, "r+b") as file:
            file.seek(5)
            file.write(b"\x01\x02")
    else:
        other = make_encoder()
        foreign = count_computed(other, tmp_path / "other")[1]
        shutil.copy(f"{foreign.path}/part-00002.npz", cache.path)
    count, again = count_computed(encoder, tmp_path)
    assert count == {"cut": 7, "changed": 10, "foreign": 10}[damage]
    np.testing.assert_array_equal(again.rows(np.arange(37))[0], rows)


def test_other_weights_or_data_have_another_cache(encoder, tmp_path):
    paths = {count_computed(encoder, tmp_path)[1].path}
    other = make_encoder()
    paths.add(count_computed(other, tmp_path)[1].path)
    small = count_computed(other, tmp_path, dtype="bfloat16")[1]
    paths.add(small.path)
    paths.add(count_computed(other, tmp_path, Images(1))[1].path)
    assert len(paths) == 4 == len(os.listdir(tmp_path))
    # Read in a graph, as `features.batches` does.
    first = tf.numpy_function(
        small.rows, [tf.range(2, dtype=tf.int64)], Tout=ROW_TYPES
    )[0]
    exact = count_computed(other, tmp_path)[1].rows(np.arange(2))[0]
    assert first.dtype == tf.bfloat16
    np.testing.assert_allclose(tf.cast(first, tf.float32), exact, rtol=1e-2)


def test_data_is_known_by_its_files_and_its_preprocessing(folder, tmp_path):
    """Wherever it lies."""
    data = make_data(folder)
    moved = shutil.copytree(f"{folder}/shards", tmp_path / "moved")
    assert make_data(folder, moved).identity == data.identity
    for other in (
        small_run.data(folder),
        small_run.data(folder, "val"),
        make_data(folder, reduced_decode=False),
    ):
        assert other.identity != data.identity


def test_what_does_not_change_features_keeps_the_cache(encoder):
    def key(encoder, kind):
        return feature_cache.cache_key(encoder, Images(), kind, "float32")

    def same_weights(**kwargs):
        other = make_encoder(**kwargs)
        weights = {v.path.split("/", 1)[1]: v for v in encoder.weights}
        for v in other.weights:
            v.assign(weights[v.path.split("/", 1)[1]])
        return other

    assert key(same_weights(), "pre_logits") == key(encoder, "pre_logits")
    # Encoded patches do not depend on the pooling.
    assert key(same_weights(pooling="gap"), "encoded") == key(
        encoder, "encoded"
    )


def test_a_renamed_cache_is_refused(encoder, tmp_path):
    mine = count_computed(encoder, tmp_path)[1].path
    foreign = count_computed(make_encoder(), tmp_path)[1].path
    shutil.rmtree(mine)
    os.rename(foreign, mine)
    with pytest.raises(ValueError, match="another weights .*FEATURE_CACHE"):
        count_computed(encoder, tmp_path)


def test_a_full_disk_leaves_nothing_that_looks_usable(
    encoder, tmp_path, monkeypatch, small_parts
):
    free = shutil.disk_usage(tmp_path)._replace(free=100)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: free)
        with pytest.raises(ValueError, match="FEATURE_CACHE.*more room"):
            count_computed(encoder, tmp_path)
    write = files.write_bytes

    def write_until_full(path, content):
        if path.endswith("part-00001.npz"):
            raise OSError(28, "No space left on device")
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_bytes", write_until_full)
        with pytest.raises(ValueError, match="FEATURE_CACHE.*No space left"):
            count_computed(encoder, tmp_path)
    (left,) = os.listdir(tmp_path)
    parts = [n for n in os.listdir(tmp_path / left) if n.startswith("part")]
    assert parts == ["part-00000.npz"]
    described = json.loads((tmp_path / left / "cache.json").read_text())
    assert not described["complete"]
    assert count_computed(encoder, tmp_path)[0] == 27


@pytest.mark.parametrize(
    "options",
    [{"flip": True}, {"crop_scale": (0.5, 1.0)}, {"shift": 2}],
    ids=str,
)
def test_augmentation_is_refused(folder, caches, options):
    data = make_data(folder, **options)
    with pytest.raises(ValueError, match=f"CaptionDataset.{[*options][0]}"):
        data.with_features(caches["pre_logits"])


def test_what_cannot_be_cached_is_refused(encoder, tmp_path):
    for options, message in (
        ({"kind": "logits"}, "kind"),
        ({"dtype": "int8"}, "dtype"),
        ({"folder": "gs://bucket/features"}, "FEATURE_CACHE.*on a disk"),
    ):
        with pytest.raises(ValueError, match=message):
            FeatureCache.open_or_compute(
                encoder,
                Images(),
                **{"folder": str(tmp_path), **options},
            )
    with pytest.raises(ValueError, match="pre_logits.*none"):
        FeatureCache.open_or_compute(
            make_encoder(pooling="none"),
            Images(),
            folder=str(tmp_path),
        )


def test_two_hosts_compute_a_part_each(encoder, tmp_path, small_parts):
    import threading

    class Host:
        """One of two threads that exchange values."""

        count = 2
        barrier, given = threading.Barrier(2), [None, None]

        def __init__(self, index):
            self.index = index

        def gather(self, value):
            self.given[self.index] = value
            self.barrier.wait(60)
            found = list(self.given)
            self.barrier.wait(60)
            return found

    results = [None, None]

    def work(index):
        results[index] = count_computed(encoder, tmp_path, hosts=Host(index))

    threads = [threading.Thread(target=work, args=[i]) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (one, first), (other, second) = results
    assert (one, other) == (20, 17)
    numbers = np.arange(37)
    for found in zip(first.rows(numbers), second.rows(numbers), strict=True):
        np.testing.assert_array_equal(*found)
