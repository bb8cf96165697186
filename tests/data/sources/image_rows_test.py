"""Reading users' folders: three layouts, nothing dropped silently."""

import io
import json

import pytest
import tensorflow as tf
from PIL import Image

from cappa_tf.data.images import decode_resize, image_files
from cappa_tf.data.sources import image_rows


def picture(path, size=(20, 12), mode="RGB", file_format=None, **options):
    """Writes an image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.linear_gradient("L").resize(size).convert(mode)
    image.save(path, file_format, **options)


def write_jsonl(path, rows):
    """Writes a captions file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path, options=None, **arguments):
    """Valid (row, example) pairs, and the skipped items."""
    skipped = image_rows.Skipped()
    rows = image_rows.read_rows(path, skipped=skipped, **arguments)
    classes = {name: i for i, name in enumerate(image_rows.class_names(rows))}
    pairs = []
    for row in rows:
        example, reasons = image_rows.read_example(
            row, options or image_rows.Options(), classes
        )
        for reason, name in reasons:
            skipped.add(reason, name)
        if example is not None:
            pairs.append((row, example))
    return pairs, skipped


def summary(pairs):
    """(split, key, captions, label) of each pair."""
    return [(row.split, e.key, e.captions, e.label) for row, e in pairs]


def test_jsonl(tmp_path):
    picture(tmp_path / "a/1.jpg")
    picture(tmp_path / "2.png")
    write_jsonl(
        tmp_path / "captions.jsonl",
        [
            {"image": "a/1.jpg", "captions": [" one ", "two"], "split": "x"},
            {
                "image": "2.png",
                "caption": "three",
                "split": "y",
                "label": 7,
                "key": "second",
            },
        ],
    )
    (tmp_path / "captions_extra.jsonl").write_text("{}")
    pairs, skipped = read(tmp_path)
    assert summary(pairs) == [
        ("x", "a/1.jpg", ["one", "two"], None),
        ("y", "second", ["three"], 7),
    ]
    assert pairs[0][1].image == (tmp_path / "a/1.jpg").read_bytes()
    assert not skipped.counts


@pytest.mark.parametrize("header", ["image,caption,label\n", ""])
def test_csv_rows_of_one_image_belong_together(tmp_path, header):
    for name in ("1.jpg", "2.jpg"):
        picture(tmp_path / name)
    rows = ['1.jpg,"a, b"', "2.jpg,c", "1.jpg,d"]
    if header:
        rows = [row + ",cat" for row in rows]
    (tmp_path / "some.csv").write_text(header + "\n".join(rows) + "\n")
    pairs, _ = read(tmp_path)
    label = 0 if header else None
    assert [row[1:] for row in summary(pairs)] == [
        ("1.jpg", ["a, b", "d"], label),
        ("2.jpg", ["c"], label),
    ]


def test_text_beside_images(tmp_path):
    picture(tmp_path / "b/2.JPG", file_format="JPEG")
    picture(tmp_path / "1.webp")
    picture(tmp_path / "3.png")
    (tmp_path / "b/2.txt").write_text("one\n\ntwo\n")
    (tmp_path / "1.txt").write_text("zero")
    (tmp_path / "notes.md").write_text("no image")
    pairs, skipped = read(tmp_path)
    assert [row[1:3] for row in summary(pairs)] == [
        ("1.webp", ["zero"]),
        ("b/2.JPG", ["one", "two"]),
    ]
    assert skipped.lines == ["no caption\t3.png"]


def test_each_kind_of_bad_input_is_skipped_and_counted(tmp_path):
    picture(tmp_path / "good.jpg")
    content = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(content[:-80])
    (tmp_path / "corrupt.jpg").write_bytes(b"\xff\xd8\xff" + b"x" * 99)
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    picture(tmp_path / "dot.png", size=(1, 1))
    picture(tmp_path / "huge.png", size=(6000, 5000))
    names = ["truncated", "corrupt", "text", "empty"]
    rows = [{"image": f"{n}.jpg", "caption": "c"} for n in names]
    rows += [{"image": f"{n}.png", "caption": "c"} for n in ("dot", "huge")]
    rows += [
        {"image": "absent.jpg", "caption": "c"},
        {"image": "good.jpg", "key": "none"},
        {"image": "good.jpg", "key": "blank", "captions": ["", " "]},
        {"image": "good.jpg", "key": "long", "caption": "c" * 1001},
        {"image": "good.jpg", "captions": ["", "kept", "c" * 1001]},
        {"caption": "no image"},
        ["a list"],
    ]
    write_jsonl(tmp_path / "captions.jsonl", rows)
    with open(tmp_path / "captions.jsonl", "a") as file:
        file.write("{not json\n")
    pairs, skipped = read(tmp_path)
    assert [row[1:3] for row in summary(pairs)] == [("good.jpg", ["kept"])]
    assert skipped.counts == {
        "malformed row": 3,
        "image cannot be decoded": 4,
        "image with a side below 8 pixels": 1,
        "image of more than 25000000 pixels": 1,
        "image missing": 1,
        "no caption": 1,
        "empty caption": 3,
        "caption of more than 1000 characters": 2,
    }
    assert "image cannot be decoded\ttruncated.jpg" in skipped.lines
    assert any("captions.jsonl:14" in line for line in skipped.lines)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1", "I;16"])
def test_pictures_of_every_kind_are_stored_readable(tmp_path, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    path = tmp_path / f"x.{suffix}"
    picture(path, mode=mode)
    stored = image_files.read(path)
    assert stored == path.read_bytes()
    assert decode_resize.decode(stored).shape == (12, 20, 3)
    small = image_files.read(path, resize=6)
    assert decode_resize.decode(small).shape == (6, 10, 3)


def test_turned_photos_become_jpeg_and_foreign_pictures_png(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture(tmp_path / "turned.jpg", exif=exif)
    picture(tmp_path / "x.tiff", mode="RGBA")
    for name, file_format, size in (
        ("turned.jpg", "JPEG", (12, 20)),
        ("x.tiff", "PNG", (20, 12)),
    ):
        stored = Image.open(io.BytesIO(image_files.read(tmp_path / name)))
        assert (stored.format, stored.size) == (file_format, size)


def test_resize_shrinks_only(tmp_path):
    picture(tmp_path / "x.jpg", size=(300, 200))
    stored = image_files.read(tmp_path / "x.jpg", resize=50, max_pixels=100)
    assert Image.open(io.BytesIO(stored)).size == (75, 50)
    same = image_files.read(tmp_path / "x.jpg", resize=200)
    assert same == (tmp_path / "x.jpg").read_bytes()


def test_splits(tmp_path):
    rows = [image_rows.Row(str(i), tmp_path, ["c"]) for i in range(2000)]
    drawn = [image_rows.choose_split(row) for row in rows]
    assert 0.88 < drawn.count("train") / 2000 < 0.92
    assert set(drawn) == {"train", "validation"}
    own = image_rows.Row("k", tmp_path, ["c"], split="dev")
    assert image_rows.choose_split(own) == "dev"
    assert image_rows.choose_split(own, {"all": 2}) == "all"
    # An image keeps its split when others are added.
    assert drawn[:9] == [image_rows.choose_split(row) for row in rows[:9]]


def test_class_names_become_numbers(tmp_path):
    picture(tmp_path / "1.jpg")
    rows = [
        {"image": "1.jpg", "key": str(i), "label": label}
        for i, label in enumerate(["dog", "cat", "dog"])
    ]
    write_jsonl(tmp_path / "labels.jsonl", rows)
    options = image_rows.Options(require_captions=False)
    pairs, skipped = read(tmp_path, options)
    assert [e.label for _, e in pairs] == [1, 0, 1]
    assert not skipped.counts


def test_errors_name_the_input(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        image_rows.read_rows(tmp_path)
    with pytest.raises(ValueError, match="nowhere, which does not exist"):
        image_rows.read_rows(tmp_path / "nowhere")
    (tmp_path / "captions.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="lists none in captions.jsonl"):
        image_rows.read_rows(tmp_path)
    write_jsonl(tmp_path / "captions.jsonl", [{"image": "x", "caption": "c"}])
    (tmp_path / "captions.csv").write_text("")
    with pytest.raises(ValueError, match=r"captions.csv, captions.jsonl"):
        image_rows.read_rows(tmp_path)
    with pytest.raises(ValueError, match="captions="):
        image_rows.read_rows(tmp_path, tmp_path / "gone.csv")


@pytest.mark.parametrize("form", ["jsonl", "csv", "txt"])
def test_a_bucket_is_read_like_a_folder(tmp_path, form):
    picture(tmp_path / "a/1.jpg")
    if form == "jsonl":
        row = {"image": "a/1.jpg", "caption": "één, two"}
        write_jsonl(tmp_path / "captions.jsonl", [row])
    elif form == "csv":
        (tmp_path / "captions.csv").write_text('a/1.jpg,"één, two"\n')
    else:
        (tmp_path / "a/1.txt").write_text("één, two\n")
    # A file system of TensorFlow's that Python's own functions cannot read.
    bucket = f"ram://bucket-{form}"
    for path in filter(lambda p: p.is_file(), tmp_path.rglob("*")):
        copy = f"{bucket}/{path.relative_to(tmp_path)}"
        tf.io.gfile.makedirs(copy.rpartition("/")[0])
        tf.io.gfile.copy(str(path), copy)
    (here,), _ = read(tmp_path)
    (there,), skipped = read(bucket)
    assert here[1] == there[1]
    assert here[1].captions == ["één, two"]
    assert there[0].path == f"{bucket}/a/1.jpg"
    with pytest.raises(ValueError, match="nowhere, which does not exist"):
        image_rows.read_rows("ram://nowhere")
    gone = image_rows.Row("k", f"{bucket}/gone.jpg", ["c"])
    _, reasons = image_rows.read_example(gone, image_rows.Options(), {})
    assert reasons == [("image missing", "k")]


def test_what_is_no_unicode_is_skipped_and_named(tmp_path):
    picture(tmp_path / "1.jpg")
    (tmp_path / "captions.jsonl").write_bytes(
        b'{"image": "1.jpg", "captions": ["caf\xe9", "\\ud800", "kept"]}\n'
        b'{"image": "caf\xe9.jpg", "caption": "c"}\n'
        b'{"image": "1.jpg", "key": "2", "caption": "c", "label": "\\ud800"}\n'
    )
    pairs, skipped = read(tmp_path)
    assert [row[2] for row in summary(pairs)] == [["kept"]]
    assert skipped.counts == {
        "caption is not valid Unicode": 2,
        "malformed row": 2,
    }
    assert "captions.jsonl:2" in skipped.lines[0]
