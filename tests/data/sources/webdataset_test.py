"""Tar shards: their contents, and the handling of damaged ones."""

import io
import os
import tarfile

import pytest
import tensorflow as tf

from cappa_tf.data import schema
from cappa_tf.data.sources import shard_index, webdataset
from cappa_tf.data.stream import bad_records, shuffling


def write(path, samples):
    """Writes a shard of {key: {name: contents}}."""
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for name, content in files.items():
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def picture(i):
    """In place of an image, as reading does not decode it."""
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
                    "txt": b"image %d" % i,
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
        schema.Example(
            f"train-{i // 40}.tar/some.folder/{i:04d}",
            picture(i),
            [f"image {i}"],
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
            schema.deserialize(record).captions[0]
            for record in found.as_numpy_iterator()
        ] == [f"image {40 + skip + i}" for i in range(count)]


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
        "label is not an integer": [1, "train-0.tar/e"],
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
    monkeypatch.setattr(shard_index, "_SECONDS_BETWEEN_SAVES", -1)
    monkeypatch.setattr(shard_index, "_THREADS", 1)
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
    """Opens a data set as training does; returns the skipped counts."""
    records = webdataset.WebDataset(folder).split("train")
    counter = bad_records.SkipCounter(
        max_fraction, records.num_examples, "tars"
    )
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
    lost = schema.Example("", b"", [])
    assert read(shards) == [lost] * 40 + whole[40:]
    with pytest.raises(ValueError, match="train-0.tar had .* delete the index"):
        check(shards, 0.1)
    check(shards, 0.6)
    records = webdataset.WebDataset(shards).split("train")
    first = next(shuffling.in_sequence(records).as_numpy_iterator())[1]
    assert first == shuffling.LOST + str(path).encode()


def test_new_and_grown_shards_are_refused(shards):
    read(shards)
    with open(shards / "train-0.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(ValueError, match=r"train-0.tar had \d+ bytes and has"):
        check(shards, 1.0)
    write(shards / "train-2.tar", {"x": {"jpg": b"1"}})
    with pytest.raises(ValueError, match="1 shards were added.*train-2.tar"):
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
    # The second one's rest is there, but not to be read: 34 samples and the
    # zeros of the end, by the size of those before.
    first = webdataset._Shard(str(shards / "train-1.tar"))
    assert len(list(first.samples(()))) == 6
    assert 34 <= first.problems["damaged shard"][0] <= 42
    assert set(check(shards, 10.0)) == {"damaged shard", "no image"}
    with pytest.raises(ValueError, match="records were skipped"):
        check(shards, 0.01)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{folder}/train-0.tar", "must tell the shards of a split"),
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
        found = shard_index.find_files(path, "train", ".tar")
        assert found.paths == [f"{shards}/train-{i}.tar" for i in range(2)]
        assert found.root == str(shards)


def test_hidden_files_are_no_shards(shards):
    found = shard_index.find_files(shards, "train", ".tar").paths
    below = shards / "train"
    below.mkdir()
    for path in found:
        os.rename(path, below / os.path.basename(path))
    (below / "._train-0.tar").write_text("of macOS")
    (below / ".incomplete-host-1-a.tar").write_text("half")
    there = shard_index.find_files(shards, "train", ".tar").paths
    assert [os.path.basename(path) for path in there] == [
        os.path.basename(path) for path in found
    ]


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


def sample_begin(path, number):
    """Position of a sample in a shard of `shards`."""
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        # Behind the last one, in whole blocks.
        end = -(-(members[-1].offset_data + members[-1].size) // 512) * 512
        return [*(m.offset for m in members), end][3 * number]


def test_what_a_cut_shard_lost_is_counted_by_the_others(shards):
    path = shards / "train-0.tar"
    os.truncate(path, sample_begin(path, 25) + 1000)
    assert len(read(shards)) == 65
    assert check(shards, 0.5) == {"damaged shard": 15}
    with pytest.raises(ValueError, match="15 records were skipped.*holds 40"):
        check(shards, 0.1)


@pytest.mark.parametrize("more", [1000, 100, 0])
def test_a_cut_shard_alone_stops_the_run(shards, more):
    (shards / "train-1.tar").unlink()
    path = shards / "train-0.tar"
    os.truncate(path, sample_begin(path, 25) + more)
    assert len(read(shards)) == 25
    with pytest.raises(ValueError, match="25 records count as lost"):
        check(shards, 0.5)


def test_tars_that_all_end_without_a_mark_are_whole(shards):
    for path in shards.glob("*.tar"):
        os.truncate(path, sample_begin(path, 40))
    assert len(read(shards)) == 80
    assert check(shards, 0) == {}


def test_files_of_macos_are_no_samples(tmp_path):
    write(
        tmp_path / "train-0.tar",
        {
            "._a": {"jpg": b"resource"},
            "a": {"jpg": b"1"},
            "__MACOSX/._a": {"txt": b"\xff\xfe"},
            "": {"DS_Store": b"x"},
        },
    )
    (example,) = read(tmp_path)
    assert (example.key, example.image) == ("train-0.tar/a", b"1")
    assert check(tmp_path, 0) == {}


def test_text_of_every_encoding_and_other_values_of_json(tmp_path):
    utf16 = '{"caption": "é"}'.encode("utf-16")
    write(
        tmp_path / "train-0.tar",
        {
            "bom": {"jpg": b"1", "txt": b"\xef\xbb\xbfa dog"},
            "utf16": {"jpg": b"1", "txt": "a cat".encode("utf-16")},
            "json16": {"jpg": b"1", "json": utf16},
            "latin": {"jpg": b"1", "txt": b"caf\xe9"},
            "nulls": {"jpg": b"1", "json": b'{"caption": ["ok", null, ""]}'},
            "null": {"jpg": b"1", "json": b'{"caption": null}'},
            "mixed": {"jpg": b"1", "json": b'{"caption": ["ok", {"a": 1}]}'},
            "object": {"jpg": b"1", "json": b'{"caption": {"en": "a"}}'},
            "number": {"jpg": b"1", "json": b'{"caption": 5, "label": 3}'},
            "half": {"jpg": b"1", "json": b'{"caption": "\\ud800"}'},
            "float": {"jpg": b"1", "txt": b"f", "json": b'{"label": 1.5}'},
            "bool": {"jpg": b"1", "txt": b"b", "json": b'{"label": true}'},
            "large": {"jpg": b"1", "txt": b"l", "cls": b"9" * 20},
            "caf\udce9": {"jpg": b"1", "txt": b"name"},
        },
    )
    found = {
        e.key.partition("/")[2]: (e.captions, e.label) for e in read(tmp_path)
    }
    assert found == {
        "bom": (["a dog"], None),
        "utf16": (["a cat"], None),
        "json16": (["é"], None),
        "nulls": (["ok"], None),
        "null": ([], None),
        "mixed": (["ok"], None),
        "number": ([], 3),
        "float": (["f"], None),
        "bool": (["b"], None),
        "large": (["l"], None),
        "caf\\udce9": (["name"], None),
    }
    assert check(tmp_path, 1.0) == {
        "text is not UTF-8": 1,
        "caption is not text": 4,
        "label is not an integer": 3,
    }


def test_brackets_in_the_name_of_a_folder(shards):
    folder = shards / "br[1]*{split}"
    folder.mkdir()
    for path in shards.glob("*.tar"):
        path.rename(folder / path.name)
    for path in (
        {"train": str(folder)},
        {"train": f"{folder}/train-*.tar"},
        {"train": f"{folder}/train-{{0..1}}.tar"},
    ):
        found = shard_index.find_files(path, "train", ".tar")
        assert found.paths == [f"{folder}/train-{i}.tar" for i in range(2)]
        assert found.root == str(folder)
        source = webdataset.WebDataset(path)
        assert len(list(source.split("train").read_examples())) == 80
    plain = shards / "br[1]"
    folder.rename(plain)
    for path in (plain, f"{plain}/{{split}}-*.tar"):
        assert len(read(path)) == 80
