"""Tables of every format: rows are read as intended, or reported."""

import json
import os
import sys

import pytest
from PIL import Image

from cappa_tf.data import text
from cappa_tf.data.images import image_files
from cappa_tf.data.sources import image_rows

NAMES = [f"{i}.jpg" for i in range(4)]


@pytest.fixture
def folder(tmp_path):
    """A folder with four small images."""
    for name in NAMES:
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    return tmp_path


def read(path, captions=None):
    """{key: (captions, split, label)} and the `Skipped`."""
    skipped = image_rows.Skipped()
    rows = image_rows.read_rows(path, captions, skipped)
    for row in rows:
        for reason, name in row.refused:
            skipped.add(reason, name)
    return {r.key: (r.captions, r.split, r.label) for r in rows}, skipped


def captions(path, **options):
    """{key: captions} and the lines of the skipped rows."""
    found, skipped = read(path, **options)
    return {key: row[0] for key, row in found.items()}, skipped.lines


def write(path, content):
    if not isinstance(content, bytes):
        content = content.encode()
    path.write_bytes(content)


def write_jsonl(path, *rows):
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xef\xbb\xbfa", "a"),
        ("é\n".encode("utf-16"), "é\n"),
        (b"\xfe\xff" + "é".encode("utf-16-be"), "é"),
        ("é".encode("utf-32"), "é"),
        (b"\0\0\xfe\xff" + "é".encode("utf-32-be"), "é"),
        ("é".encode(), "é"),
        (b"", ""),
    ],
)
def test_text_is_decoded_alike_in_python_and_in_a_graph(content, expected):
    assert text.decode(content) == expected
    (found,) = text.decode_in_graph([content]).numpy()
    assert found.decode() == expected
    both = text.decode_in_graph([b"plain", content]).numpy()
    assert both.tolist() == [b"plain", expected.encode()]


@pytest.mark.parametrize("content", [b"caf\xe9", b"\xff\xfea\0\0"])
def test_other_bytes_are_refused(content):
    with pytest.raises(ValueError, match="the text is not UTF-"):
        text.decode(content)
    with pytest.raises(Exception, match="Invalid formatting|Invalid"):
        text.decode_in_graph([b"plain", content])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl", "0.txt"])
def test_one_rule_for_the_text_of_all_files(folder, name, encoding):
    line = {
        "captions.csv": "0.jpg,un café\n",
        "captions.jsonl": '{"image": "0.jpg", "caption": "un café"}\n',
        "0.txt": "un café\n",
    }[name]
    write(folder / name, line.encode(encoding))
    assert captions(folder)[0]["0.jpg"] == ["un café"]
    write(folder / name, (line + line).encode("latin-1"))
    if name == "0.txt":
        assert captions(folder)[1] == [
            f"caption is not valid Unicode\t0.txt:{i}" for i in (1, 2)
        ]
    else:
        found, lines = captions(folder)
        assert found == {"0.jpg": []}
        assert lines == [
            f"caption is not valid Unicode\t{name}:{i}" for i in (1, 2)
        ]


def test_text_beside_images_of_other_names(folder):
    write(folder / "0.TXT", "a\rb\r\nc\u2028d\x0be")
    write(folder / "1.jpg.txt", "one")
    write(folder / "2.caption", "two")
    write(folder / "3.txt", b"\xff\xfea")
    write(folder / "._3.jpg", b"resource fork")
    found, lines = captions(folder)
    assert found == {
        "0.jpg": ["a", "b", "c\u2028d\x0be"],
        "1.jpg": ["one"],
        "2.jpg": ["two"],
        "3.jpg": [],
    }
    assert len(lines) == 1 and "3.txt: the text is not UTF-16LE" in lines[0]


def test_an_unclosed_quote_costs_its_own_row(folder):
    rows = [f"{i % 4}.jpg,c {i}" for i in range(12)]
    rows[2] = '2.jpg,"Stop says a sign'
    rows[5] = '1.jpg,"two\nlines, ""quoted"""'
    rows[7] = '3.jpg,"closed" too early'
    rows[9] = '1.jpg,"not closed, either'
    write(folder / "captions.csv", "image,caption\n" + "\n".join(rows) + "\n")
    found, lines = captions(folder)
    assert found == {
        "0.jpg": ["c 0", "c 4", "c 8"],
        "1.jpg": ["c 1", 'two\nlines, "quoted"'],
        "3.jpg": ["c 3", "c 11"],
        "2.jpg": ["c 6", "c 10"],
    }
    assert [line.partition(": ")[0] for line in lines] == [
        f"malformed row\tcaptions.csv:{i}" for i in (4, 10, 12)
    ]
    assert lines[0].endswith("a quote is not closed")


def test_an_unclosed_quote_does_not_end_at_that_of_a_later_row(folder):
    """Rows between two stray quotes are not the text of one caption."""
    rows = ['0.jpg,"never closed', "1.jpg,plain", '2.jpg,ends so"']
    write(folder / "captions.csv", "\n".join(["image,caption", *rows]) + "\n")
    found, lines = captions(folder)
    assert found == {"1.jpg": ["plain"], "2.jpg": ['ends so"']}
    assert lines == ["malformed row\tcaptions.csv:2: a quote is not closed"]


@pytest.mark.parametrize("quote", ['"', ""])
def test_an_endless_field_is_named(folder, quote):
    row = f"0.jpg,{quote}{'x' * 140_000}\n"
    write(folder / "captions.csv", row + 140_000 * "y" + "\n1.jpg,kept\n")
    found, lines = captions(folder)
    assert found == {"1.jpg": ["kept"]}
    assert "captions.csv:1: " in lines[0] and "captions.csv:2: " in lines[1]


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|", "| "])
@pytest.mark.parametrize("header", [True, False])
def test_the_delimiter_is_found(folder, delimiter, header):
    rows = [["0.jpg", '"a, b; c"'], ["1.jpg", "d"]]
    if header:
        rows = [["File name", "Text"], *rows]
    content = "\r".join(delimiter.join(row) for row in rows)
    write(folder / "list.csv", content)
    assert captions(folder) == ({"0.jpg": ["a, b; c"], "1.jpg": ["d"]}, [])


def test_kaggle_and_flickr_and_openclip(folder):
    write(folder / "captions.txt", 'image,caption\n0.jpg,"a, b"\n0.jpg,c\n')
    write(folder / "README.txt", "image\nnothing else\n")
    assert captions(folder) == ({"0.jpg": ["a, b", "c"]}, [])
    (folder / "captions.txt").unlink()
    write(
        folder / "results.csv",
        "image_name| comment_number| comment\n"
        '0.jpg| 0| A man , "so-called" .\n'
        "1.jpg| 4   A dog runs .\n"
        '2.jpg| 0| "Two" men .\n',
    )
    assert captions(folder) == (
        {"0.jpg": ['A man , "so-called" .'], "2.jpg": ['"Two" men .']},
        ["malformed row\tresults.csv:3: 2 fields for 3 columns: no 'comment'"],
    )
    (folder / "results.csv").unlink()
    write(
        folder / "Flickr8k.token.txt",
        '0.jpg#0\tA child .\n0.jpg#1\t"A girl .\n1.jpg#0\tA dog .\n',
    )
    found = {"0.jpg": ["A child .", '"A girl .'], "1.jpg": ["A dog ."]}
    assert captions(folder) == (found, [])
    (folder / "Flickr8k.token.txt").unlink()
    write(folder / "cc3m.tsv", "title\tfilepath\nA dog\t0.jpg\n")
    assert captions(folder) == ({"0.jpg": ["A dog"]}, [])


def test_rows_of_an_image_are_put_together(folder):
    write_jsonl(
        folder / "captions.jsonl",
        {"image": "0.jpg", "caption": "a"},
        {"image": "0.jpg", "captions": ["b", None], "split": "x"},
        {"image": "0.jpg", "caption": "c", "split": "y"},
        {"image": "1.jpg", "caption": "d", "key": "0.jpg"},
        {"image": "1.jpg", "caption": "e", "key": 0},
    )
    found, skipped = read(folder)
    assert found == {
        "0.jpg": (["a", "b"], "x", None),
        "0": (["e"], None, None),
    }
    assert skipped.counts == {"empty caption": 1, "malformed row": 2}


@pytest.mark.parametrize(
    "wrong",
    [
        {"caption": {"en": "a dog"}},
        {"captions": [{"raw": "a dog"}]},
        {"caption": 5},
        {"caption": True},
        {"caption": float("nan")},
        {"label": True},
        {"label": 3.0},
        {"label": 1 << 63},
        {"label": -2},
        {"label": ["a"]},
        {"key": {"a": 1}},
        {"split": 1},
        {"class_name": 1},
        {"image": {"path": "0.jpg"}},
        {"image": None},
    ],
)
def test_wrong_values_are_malformed_rows(folder, wrong):
    good = {"image": "1.jpg", "caption": "kept", "label": 1}
    row = {"image": "0.jpg", "caption": "c", "label": 2, **wrong}
    write_jsonl(folder / "captions.jsonl", row, good)
    found, skipped = read(folder)
    assert found == {"1.jpg": (["kept"], None, 1)}
    assert skipped.counts == {"malformed row": 1}
    assert skipped.lines[0].startswith("malformed row\tcaptions.jsonl:1: ")


@pytest.mark.parametrize("label", ["1.5", "-3", "9" * 20, "9" * 9999])
def test_wrong_labels_of_a_csv(folder, label):
    write(folder / "labels.csv", f"image,label\n0.jpg,{label}\n1.jpg,7\n")
    found, skipped = read(folder)
    assert found == {"1.jpg": ([], None, 7)}
    assert "labels.csv:2: 'label' " in skipped.lines[0]


def test_words_and_numbers_in_one_set(folder):
    write(folder / "labels.csv", "image,label\n0.jpg,7\n1.jpg,a\n2.jpg,b\n")
    found, skipped = read(folder)
    assert [row[2] for row in found.values()] == ["a", "b"]
    assert skipped.lines == [
        "malformed row\tlabels.csv:2: 'label' is a number, 7, but most are "
        "a word"
    ]
    write(folder / "labels.csv", "image,label\n0.jpg,\u00b2\n1.jpg,-1\n")
    assert [row[2] for row in read(folder)[0].values()] == ["\u00b2", None]


def test_imagefolder_of_hugging_face(folder):
    rows = [{"file_name": name, "text": f"t {name}"} for name in NAMES]
    write_jsonl(folder / "metadata.jsonl", *rows)
    write(folder / "other.csv", "image,caption\n0.jpg,other\n")
    assert captions(folder)[0] == {name: [f"t {name}"] for name in NAMES}
    (folder / "metadata.jsonl").unlink()
    (folder / "other.csv").unlink()
    for split, name in (("train", "0.jpg"), ("val", "1.jpg")):
        (folder / split).mkdir()
        (folder / name).rename(folder / split / "x.jpg")
        table = f"file_name,text\nx.jpg,{split}\nx.jpg,{5 * ','}\n"
        write(folder / split / "metadata.csv", table)
    found, skipped = read(folder)
    assert found == {
        "train/x.jpg": (["train"], "train", None),
        "val/x.jpg": (["val"], "validation", None),
    }
    assert "\tval/metadata.csv:3: " in skipped.lines[1]


def test_coco_and_karpathy(folder):
    coco = {
        "images": [
            {"id": 7, "file_name": "0.jpg"},
            {"id": 8, "file_name": "1.jpg"},
            {"id": 9},
        ],
        "annotations": [
            {"image_id": 7, "caption": "a"},
            {"image_id": 7, "caption": "b"},
            {"image_id": 1, "caption": "c"},
            {"image_id": 8, "caption": None},
            "d",
        ],
    }
    write(folder / "captions_val.json", json.dumps(coco))
    found, lines = captions(folder)
    assert found == {"0.jpg": ["a", "b"], "1.jpg": []}
    assert [line.split(":")[0].split(", ")[1] for line in lines] == [
        *("images item 3", "annotations item 3"),
        *("annotations item 4", "annotations item 5"),
    ]
    coco["annotations"] = [{"image_id": 7, "bbox": [0, 0, 1, 1]}]
    write(folder / "captions_val.json", json.dumps(coco))
    with pytest.raises(ValueError, match="no 'caption': COCO's captions are"):
        read(folder)
    (folder / "captions_val.json").unlink()
    images = [
        {"filename": name, "split": split, "sentences": [{"raw": split}]}
        for name, split in zip(NAMES, ("train", "restval", "val", "test"))
    ]
    images[0]["filepath"] = "sub"
    images.append({"filename": "x.jpg", "sentences": [{"tokens": ["a"]}]})
    write(folder / "dataset_coco.json", json.dumps({"images": images}))
    found, skipped = read(folder)
    assert found == {
        "sub/0.jpg": (["train"], "train", None),
        "1.jpg": (["restval"], "train", None),
        "2.jpg": (["val"], "validation", None),
        "3.jpg": (["test"], "test", None),
    }
    assert skipped.counts == {"malformed row": 1}


@pytest.mark.parametrize("name", ["captions.json", "captions.jsonl"])
def test_a_list_of_objects(folder, name):
    rows = [{"image": "0.jpg", "caption": "a"}, 5]
    write(folder / name, json.dumps(rows, indent=1))
    found, lines = captions(folder)
    assert found == {"0.jpg": ["a"]}
    assert lines[0].startswith(f"malformed row\t{name}, item 2: not an object")


@pytest.mark.parametrize(
    "content", ['{"a": [1]}', "[1, 2]", "null", "{", "[" * 100_000, ""]
)
def test_other_json_is_named(folder, content):
    write(folder / "captions.json", content)
    with pytest.raises(ValueError, match=r"captions\.json"):
        read(folder)


def test_a_stray_table_does_not_hide_text_files(folder):
    write(folder / "0.txt", "beside")
    write(folder / "download_stats.csv", "shard,count\n0,100\n")
    write(folder / "more.jsonl", '{"image": "1.jpg", "caption": "c"}\n')
    write(folder / "0.json", '{"about": "0.jpg"}')
    found, lines = captions(folder)
    assert found["0.jpg"] == ["beside"] and found["1.jpg"] == []
    assert [line.partition("\t")[0] for line in lines] == 2 * [
        "table beside text files"
    ]
    assert "more.jsonl (--captions=" in lines[0]
    assert "download_stats.csv:1: neither a header" in lines[1]
    more = folder / "more.jsonl"
    assert captions(folder, captions=more) == ({"1.jpg": ["c"]}, [])
    # Without text files, the table of a known format is used.
    (folder / "0.txt").unlink()
    found, lines = captions(folder)
    assert found == {"1.jpg": ["c"]}
    assert lines[0].startswith("table not understood\tdownload_stats.csv:1")
    more.unlink()
    with pytest.raises(ValueError, match="no table of a known format.*stats"):
        read(folder)


def test_links_are_followed_once_and_loops_end(tmp_path):
    real = tmp_path / "elsewhere"
    real.mkdir()
    Image.new("RGB", (9, 9)).save(real / "0.jpg")
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "back").symlink_to(root)
    (root / "a").symlink_to(real)
    (root / "b").symlink_to(real)
    (root / "gone").symlink_to(tmp_path / "nowhere")
    assert list(captions(root)[0]) == ["a/0.jpg"]
    assert image_files.find_pictures([str(root)]) == [f"{root}/a/0.jpg"]


def test_names_that_are_not_utf8_are_named(folder):
    name = os.fsencode(folder) + b"/caf\xe9"
    (folder / "0.jpg").rename(os.fsdecode(name + b".jpg"))
    write(folder / "captions_not.md", "")
    with open(name + b".csv", "wb") as file:
        file.write(b"image,caption\n1.jpg,c\n")
    os.mkdir(name)
    (folder / "1.jpg").rename(os.fsdecode(name + b"/1.jpg"))
    found, lines = captions(folder)
    assert sorted(found) == ["2.jpg", "3.jpg"]
    assert lines == [
        "name is not valid Unicode\tcaf\\udce9.jpg",
        "name is not valid Unicode\tcaf\\udce9/1.jpg",
    ]
    pictures = image_files.find_pictures([str(folder)])
    assert len(pictures) == 4
    (bad,) = [p for p in pictures if "caf" in p and "/1.jpg" not in p]
    # Shown alone it is read: only the name of a record must be text.
    assert image_files.read(bad)
    with pytest.raises(ValueError, match="name of the input must be UTF-8"):
        read(os.fsdecode(name))


def parquet(path, **columns):
    pa = pytest.importorskip("pyarrow", reason="pip install '.[parquet]'")
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), path, row_group_size=2)


def images_of(path):
    """{key: (captions, the stored image)} as they would be converted."""
    found = {}
    skipped = image_rows.Skipped()
    for row in image_rows.read_rows(path, skipped=skipped):
        example, reasons = image_rows.read_example(
            row, image_rows.Options(), {}
        )
        for reason, name in reasons:
            skipped.add(reason, name)
        if example is not None:
            found[row.key] = (example.captions, example.image)
    return found, skipped


def test_parquet_of_paths_and_of_img2dataset(folder):
    parquet(folder / "captions.parquet", image=NAMES, caption=list("abcd"))
    assert captions(folder)[0] == dict(zip(NAMES, map(list, "abcd")))
    (folder / "captions.parquet").unlink()
    (folder / "00000").mkdir()
    (folder / "0.jpg").rename(folder / "00000/000000000.jpg")
    for name in NAMES[1:]:
        (folder / name).unlink()
    parquet(
        folder / "00000.parquet",
        url=["u", "u", "u"],
        caption=["a", "b", "c"],
        key=["000000000", "000000001", "000000002"],
        status=["success", "failed_to_download", "success"],
    )
    found, skipped = images_of(folder)
    image = (folder / "00000/000000000.jpg").read_bytes()
    assert found == {"000000000": (["a"], image)}
    assert skipped.counts == {"malformed row": 1, "image missing": 1}
    assert "00000.parquet, row 2: not downloaded" in skipped.lines[0]


def test_parquet_that_holds_the_images(folder):
    content = [(folder / name).read_bytes() for name in NAMES]
    for name in NAMES[1:]:
        (folder / name).unlink()
    cells = [{"bytes": c, "path": "x.jpg"} for c in content]
    cells[0] = {"bytes": None, "path": "0.jpg"}
    cells[2] = None
    texts = [["a", "b"], ["c"], ["d"], ["e"]]
    parquet(folder / "train-00000-of-00001.parquet", image=cells, text=texts)
    found, skipped = images_of(folder)
    assert found == {
        f"train-00000-of-00001.parquet/{i}": (texts[i], content[i])
        for i in (0, 1, 3)
    }
    assert skipped.counts == {"image missing": 1}
    # img2dataset's, several files and splits.
    for split in ("train", "test"):
        name = f"{split}-00000-of-00001.parquet"
        parquet(
            folder / name,
            jpg=content,
            caption=list("abcd"),
            key=[f"{split}{i}" for i in range(4)],
        )
    found, _ = read(folder)
    assert found["test0"] == (["a"], "test", None)
    assert found["train3"] == (["d"], "train", None)


def test_parquet_without_image_or_reader_is_named(folder, monkeypatch):
    parquet(folder / "captions.parquet", url=["u"], caption=["a"])
    with pytest.raises(ValueError, match="no column holds images.*img2dataset"):
        read(folder)
    write(folder / "captions.parquet", b"PAR1 not really")
    with pytest.raises(ValueError, match=r"captions\.parquet: "):
        read(folder)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'cappa-tf\[parquet\]'"):
        read(folder)
