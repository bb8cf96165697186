"""tar shards: what is read of them, and what happens to damaged ones."""

import io
import os
import tarfile

import pytest
import tensorflow as tf

from cappa_tf.data import index, order, skips, tfrecord, webdataset


def write(path, samples):
    """Writes a shard of {key: {name: contents}}."""
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for name, content in files.items():
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def picture(i):
    """Stands for an image; reading does not look at it."""
    return b"image %d " % i * (40 + i)


@pytest.fixture
def shards(tmp_path):
    """Two shards of 40 samples; a folder in the names, dots in them."""
    for shard in range(2):
        write(
            tmp_path / f"train-{shard}.tar",
            {
                f"some.folder/{i:04d}": {
                    "jpg": picture(i),
                    "seg.png": b"another image",
                    "txt": b"picture %d" % i,
                }
                for i in range(40 * shard, 40 * shard + 40)
            },
        )
    return tmp_path


def read(folder, **options):
    source = webdataset.WebDataset(folder, **options)
    return list(source.split("train").read_examples())


def test_samples(shards):
    found = read(shards)
    assert found == [
        tfrecord.Example(
            f"train-{i // 40}.tar/some.folder/{i:04d}",
            picture(i),
            [f"picture {i}"],
        )
        for i in range(80)
    ]
    again = read(shards, image=["seg.png"])
    assert {e.image for e in again} == {b"another image"}


def test_any_part_of_a_shard(shards):
    records = webdataset.WebDataset(shards).split("train")
    for skip, count in ((0, 40), (39, 1), (5, 20), (17, 16)):
        found = records.read(
            *(tf.constant(x, tf.int64) for x in (1, skip, count))
        )
        assert [
            tfrecord.deserialize(record).captions[0]
            for record in found.as_numpy_iterator()
        ] == [f"picture {40 + skip + i}" for i in range(count)]


def test_captions_and_labels_of_json(tmp_path):
    write(
        tmp_path / "train-0.tar",
        {
            "a": {"JPG": b"1", "json": b'{"caption": "one", "label": 7}'},
            "b": {"jpg": b"2", "json": b'{"caption": ["two", " ", "2"]}'},
            "c": {"jpg": b"3", "json": b"no json", "txt": b" three\nlines "},
            "d": {"jpg": b"4", "cls": b"5"},
            "e": {"jpg": b"5", "cls": b"cat", "txt": b"caf\xc3\xa9"},
        },
    )
    options = {"captions": ("txt", "json:caption")}
    found = {
        e.key[-1]: (e.captions, e.label) for e in read(tmp_path, **options)
    }
    assert found == {
        "a": (["one"], 7),
        "b": (["two", "2"], None),
        "c": (["three\nlines"], None),
        "d": ([], 5),
        "e": (["café"], None),
    }
    lines = read(tmp_path, **options, caption_per_line=True)
    assert lines[2].captions == ["three", "lines"]
    (shard,) = webdataset.WebDataset(tmp_path, **options).split("train")
    assert shard.max_captions == 2
    assert shard.problems == {
        "json cannot be read": [1, "train-0.tar/c"],
        "label is no integer": [1, "train-0.tar/e"],
    }


def test_the_index_is_written_once_and_may_move(shards, monkeypatch):
    first = read(shards)
    monkeypatch.setattr(
        webdataset.WebDataset, "_scan", lambda *_: pytest.fail("a second scan")
    )
    assert read(shards) == first
    moved = shards.with_name("moved")
    os.rename(shards, moved)
    assert read(moved) == first


def test_an_interrupted_index_is_finished(shards, monkeypatch):
    scanned = []
    real = webdataset.WebDataset._scan

    def scan(self, path, output):
        scanned.append(os.path.basename(path))
        if path.endswith("train-1.tar") and len(scanned) == 2:
            raise KeyboardInterrupt
        return real(self, path, output)

    monkeypatch.setattr(webdataset.WebDataset, "_scan", scan)
    monkeypatch.setattr(index, "_SECONDS_BETWEEN_SAVES", -1)
    monkeypatch.setattr(index, "_THREADS", 1)
    with pytest.raises(KeyboardInterrupt):
        read(shards)
    assert len(read(shards)) == 80
    assert scanned == ["train-0.tar", "train-1.tar", "train-1.tar"]


def test_an_index_goes_to_the_cache_where_data_cannot_be_written(
    shards, monkeypatch, tmp_path_factory
):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    # A file of that name, since root may write anywhere.
    (shards / ".cappa_index").write_text("")
    assert len(read(shards)) == 80
    assert list(cache.glob("cappa_tf/index-*/index.json"))


def check(folder, max_fraction):
    """Opens a data set as training does; returns what was skipped."""
    records = webdataset.WebDataset(folder).split("train")
    counter = skips.SkipCounter(max_fraction, records.num_examples, "tars")
    records.check(counter)
    return counter.counts


@pytest.mark.parametrize("damage", ["vanish", "truncate"])
def test_a_shard_that_changed_loses_its_records_only(shards, damage):
    whole = read(shards)
    path = shards / "train-0.tar"
    if damage == "vanish":
        path.unlink()
    else:
        os.truncate(path, 3000)
    lost = tfrecord.Example("", b"", [])
    assert read(shards) == [lost] * 40 + whole[40:]
    with pytest.raises(ValueError, match="train-0.tar had .* delete the index"):
        check(shards, 0.1)
    check(shards, 0.6)
    records = webdataset.WebDataset(shards).split("train")
    first = next(order.in_sequence(records).as_numpy_iterator())[1]
    assert first == order.LOST + str(path).encode()


def test_new_and_grown_shards_are_refused(shards):
    read(shards)
    with open(shards / "train-0.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(ValueError, match=r"train-0.tar had \d+ bytes and has"):
        check(shards, 1.0)
    write(shards / "train-2.tar", {"x": {"jpg": b"1"}})
    with pytest.raises(ValueError, match="1 shards came.*train-2.tar"):
        check(shards, 1.0)


def test_half_written_and_damaged_shards(shards):
    os.truncate(shards / "train-0.tar", 30_000)
    content = (shards / "train-1.tar").read_bytes()
    broken = content[:20480] + b"\xff" * 512 + content[20992:]
    (shards / "train-1.tar").write_bytes(broken)
    write(
        shards / "train-2.tar", {"x": {"txt": b"no image"}, "y": {"jpg": b"1"}}
    )
    found = read(shards)
    assert 10 < len(found) < 80
    assert {e.image for e in found[:-1]} <= {picture(i) for i in range(80)}
    assert check(shards, 0.5) == {"damaged shard": 2, "no image": 1}
    with pytest.raises(ValueError, match="records were skipped"):
        check(shards, 0.01)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{folder}/train-0.tar", "must say which shards a split has"),
        ("{folder}/{{split}}-none-*.tar", "has no shards"),
        ({"validation": "x"}, r"one of \['validation'\]. Received: 'train'"),
    ],
)
def test_shards_that_are_not_there(shards, path, message):
    if isinstance(path, dict):
        path = {k: v.format(folder=shards) for k, v in path.items()}
    else:
        path = path.format(folder=shards)
    with pytest.raises(ValueError, match=message):
        webdataset.WebDataset(path).split("train")


def test_ways_to_name_shards(shards):
    for path in (
        f"{shards}/{{split}}-*.tar",
        f"{shards}/{{split}}-{{0..1}}.tar",
        {"train": f"{shards}/train-{{0..1}}.tar"},
        {"train": str(shards)},
        str(shards),
    ):
        found = index.find_files(path, "train", ".tar")
        assert found.paths == [f"{shards}/train-{i}.tar" for i in range(2)]
        assert found.root == str(shards)


def test_no_records_at_all(tmp_path):
    (tmp_path / "train-0.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match="must hold records.*damaged shard"):
        webdataset.WebDataset(tmp_path).split("train")


def test_captions_under_another_name(shards):
    source = webdataset.WebDataset(shards, captions=("caption", "json:text"))
    assert len(list(source.split("train").read_examples())) == 80
    message = (
        "no record has a caption. They are looked for in caption, json:text; "
        "the first sample, train-0.tar/some.folder/0000, has jpg, seg.png, txt"
    )
    with pytest.raises(ValueError, match=message):
        source.split("train").check_captions()
