"""Tables of questions and answers become records with prompts."""

import json

import pytest
from PIL import Image

from cappa_tf.data import schema
from cappa_tf.data.sources import image_folder, image_rows
from cappa_tf.data.stream import bad_records


@pytest.fixture
def folder(tmp_path):
    """A folder with three small images."""
    for i in range(3):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{i}.jpg")
    return tmp_path


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path, captions=None, **options):
    """{key: (`Question`s, split)} as stored, and (reason, name) of the rest."""
    skipped = image_rows.Skipped()
    found = {}
    for row in image_rows.read_rows(path, captions, skipped):
        example, reasons = image_rows.read_example(
            row, image_rows.Options(**options), {}
        )
        for reason in reasons:
            skipped.add(*reason)
        if example is not None:
            stored = schema.deserialize(schema.serialize(example))
            found[row.key] = (schema.questions(stored), row.split)
    return found, [tuple(line.split("\t", 1)) for line in skipped.lines]


def test_every_form_of_questions_and_answers(folder):
    write_jsonl(
        folder / "vqa.jsonl",
        {"image": "0.jpg", "question": "q1", "answers": ["a", "b"]},
        {"image": "0.jpg", "question": "q2", "answer": 2, "split": "train"},
        {
            "image": "0.jpg",
            "qa": [["q3", "c"], {"question": "q4", "answer": 1}],
        },
        {
            "image": "1.jpg",
            "Question": " q ",
            "answers": [{"answer": "yes", "answer_confidence": "maybe"}],
            "answer_type": "yes/no",
        },
        {
            "image": "1.jpg",
            "questions": ["r", "s"],
            "answers": ["x", ["y", "z"]],
        },
        {"image": "1.jpg", "question": "q", "answer": "no", "title": "a book"},
        {"image": "2.jpg", "caption": "c", "question": "q", "answer": "a"},
    )
    found, reasons = read(folder)
    question = schema.Question
    assert found == {
        "0.jpg": (
            [
                question("q1", ["a", "b"]),
                question("q2", ["2"]),
                question("q3", ["c"]),
                question("q4", ["1"]),
            ],
            "train",
        ),
        "1.jpg": (
            [
                question("q", ["yes", "no"], "yes/no"),
                question("r", ["x"]),
                question("s", ["y", "z"]),
            ],
            None,
        ),
        "2.jpg": ([question("q", ["a"])], None),
    }
    assert reasons == []


@pytest.mark.parametrize(
    ("columns", "reason", "name"),
    [
        ({"question": "q"}, "no answer", "t.jsonl:1: q"),
        ({"question": "q", "answers": []}, "no answer", "t.jsonl:1: q"),
        ({"question": "q", "answers": ["", None]}, "no answer", "t.jsonl:1: q"),
        ({"qa": [["q", "a"], ["r", " "]]}, "no answer", "t.jsonl:1: r"),
        ({"question": " ", "answer": "a"}, "empty question", "t.jsonl:1"),
        ({"answer": "a"}, "empty question", "t.jsonl:1"),
        (
            {"question": "q", "answers": ["a", " "]},
            "empty answer",
            "t.jsonl:1: q",
        ),
        (
            {"question": 5, "answer": "a"},
            "malformed question",
            "t.jsonl:1: the question is a number, 5",
        ),
        (
            {"qa": [["q"]]},
            "malformed question",
            "t.jsonl:1: the question is a list, ['q']",
        ),
        (
            {"question": "q", "answer": True},
            "malformed answer",
            "t.jsonl:1: q: the answer is a bool, True",
        ),
        (
            {"question": "q", "answer": "\ud800"},
            "answer is not valid Unicode",
            "t.jsonl:1: q",
        ),
        (
            {"question": "\ud800", "answer": "a"},
            "question is not valid Unicode",
            "t.jsonl:1",
        ),
        (
            {"question": "q", "answer": "a" * 51},
            "answer of more than 50 characters",
            "0.jpg: q",
        ),
        (
            {"question": "q" * 51, "answer": "a"},
            "question of more than 50 characters",
            "0.jpg",
        ),
        (
            {"questions": ["q"], "answers": "a"},
            "malformed row",
            "t.jsonl:1: 'questions' and 'answers' are not lists of the same "
            "length",
        ),
    ],
)
def test_what_cannot_be_used_is_named(folder, columns, reason, name):
    good = {"image": "1.jpg", "question": "q", "answer": "a"}
    write_jsonl(folder / "t.jsonl", {"image": "0.jpg", **columns}, good)
    found, reasons = read(folder, max_caption_characters=50)
    assert reasons == [(reason, name)]
    assert found["1.jpg"] == ([schema.Question("q", ["a"])], None)


def test_images_without_a_file_are_named(folder):
    write_jsonl(
        folder / "t.jsonl",
        {"image": "gone.jpg", "question": "q", "answer": "a"},
        {"image": "0.jpg", "question": "q", "answer": "a"},
    )
    found, reasons = read(folder)
    assert list(found) == ["0.jpg"]
    assert reasons == [("image missing", "gone.jpg")]


def test_questions_in_csv(folder):
    (folder / "qa.csv").write_text(
        "image,question,answers,question type\n"
        '0.jpg,"what, exactly?","[""red"", ""dark red""]",colour\n'
        "0.jpg,how many?,2,number\n"
        "0.jpg,how many?,[two],number\n"
        "1.jpg,why?,,\n"
        "1.jpg,short\n"
    )
    found, reasons = read(folder)
    assert found["0.jpg"][0] == [
        schema.Question("what, exactly?", ["red", "dark red"], "colour"),
        schema.Question("how many?", ["2", "[two]"], "number"),
    ]
    assert [reason for reason, _ in reasons] == ["malformed row", "no answer"]
    assert reasons[1] == ("no answer", "qa.csv:5: why?")


def _vqav2(folder, number):
    """Writes VQAv2's two files of one split, of one image with a question."""
    subtype = ("train2014", "val2014")[number]
    questions = [
        {"image_id": number, "question": "q", "question_id": 10},
        {"image_id": number, "question": "r", "question_id": 11},
        {"question": "s", "question_id": 12},
    ]
    answers = [{"answer": a, "answer_id": i} for i, a in enumerate("aab")]
    annotations = [
        {
            "question_id": 10,
            "image_id": number,
            "answers": answers,
            "answer_type": "other",
            "question_type": "what is",
        }
    ]
    stem = f"mscoco_{subtype}"
    (folder / f"v2_OpenEnded_{stem}_questions.json").write_text(
        json.dumps({"questions": questions, "data_subtype": subtype})
    )
    (folder / f"v2_{stem}_annotations.json").write_text(
        json.dumps({"annotations": annotations, "data_subtype": subtype})
    )
    (folder / subtype).mkdir()
    name = f"COCO_{subtype}_{number:012}.jpg"
    (folder / f"{number}.jpg").rename(folder / subtype / name)
    return f"{subtype}/{name}"


def test_vqav2(folder):
    images = [_vqav2(folder, number) for number in (0, 1)]
    found, reasons = read(folder)
    expected = [schema.Question("q", ["a", "a", "b"], "other")]
    assert found == {
        images[0]: (expected, "train"),
        images[1]: (expected, "validation"),
    }
    assert [reason for reason, _ in reasons].count("no answer") == 2
    assert "questions item 2: r" in dict(reasons)["no answer"]
    assert "no 'image_id'" in dict(reasons)["malformed row"]
    # Either file stands for both, wherever the images are.
    names = "OpenEnded_mscoco_val2014_questions", "mscoco_val2014_annotations"
    for name in names:
        chosen, _ = read(folder, folder / f"v2_{name}.json")
        assert chosen == {images[1]: (expected, "validation")}
    (folder / f"v2_{names[1]}.json").unlink()
    with pytest.raises(ValueError, match="no such file of annotations"):
        read(folder, folder / f"v2_{names[0]}.json")


def test_gqa(folder):
    (folder / "images").mkdir()
    (folder / "0.jpg").rename(folder / "images" / "n7.jpg")
    for split, answer in (("train", {"answer": "yes"}), ("test", {})):
        question = {
            "imageId": "n7",
            "question": f"is it {split}?",
            "types": {"structural": "verify", "semantic": "attr"},
            **answer,
        }
        content = {"05": question, "06": {"imageId": "n7"}}
        path = folder / f"{split}_balanced_questions.json"
        path.write_text(json.dumps(content))
    found, reasons = read(folder, folder / "train_balanced_questions.json")
    question = schema.Question("is it train?", ["yes"], "verify")
    assert found == {"images/n7.jpg": ([question], "train")}
    assert reasons[0][0] == "malformed row" and "question 06" in reasons[0][1]
    name = "test_balanced_questions.json"
    _, reasons = read(folder, folder / name)
    assert ("no answer", f"{name}, question 05: is it test?") in reasons


def test_ocr_vqa(folder):
    (folder / "images").mkdir()
    (folder / "0.jpg").rename(folder / "images" / "158.jpg")
    book = {
        "title": "No caption",
        "imageURL": "http://host/a/51.jpg",
        "questions": ["Who wrote this?", "Is it a romance?"],
        "answers": ["A. Person", "No"],
        "split": 2,
    }
    # It has the name of our own descriptions.
    (folder / "dataset.json").write_text(
        json.dumps({"158": book, "159": {**book, "answers": ["one"]}})
    )
    found, reasons = read(folder)
    assert found == {
        "images/158.jpg": (
            [
                schema.Question("Who wrote this?", ["A. Person"]),
                schema.Question("Is it a romance?", ["No"]),
            ],
            "validation",
        )
    }
    assert [reason for reason, _ in reasons] == ["malformed row"]


def test_a_folder_of_questions_is_a_source(folder):
    write_jsonl(
        folder / "vqa.jsonl",
        {"image": "0.jpg", "qa": [["q", "a"], ["r", "b"]], "split": "train"},
        {"image": "0.jpg", "question": "s", "split": "train"},
        {"image": "1.jpg", "caption": "c", "split": "test"},
    )
    source = image_folder.ImageFolder(folder)
    records = source.split("train")
    assert records.has_prompts and not source.split("test").has_prompts
    (example,) = records.read_examples()
    assert example.prompts == ["q", "r"] and example.captions == ["a", "b"]
    counter = bad_records.SkipCounter(1.0, 1, "train")
    records.check(counter)
    assert counter.counts == {"no answer": 1}
    (serialized,) = records.read(0, 0, 1)
    assert records.parse(serialized)["prompts"].numpy().tolist() == [b"q", b"r"]


def test_parquet_stores_the_image_of_several_questions_once(folder):
    pa = pytest.importorskip("pyarrow", reason="pip install '.[parquet]'")
    from pyarrow import parquet

    images = [{"bytes": (folder / "0.jpg").read_bytes(), "path": None}] * 3
    answers = [[{"answer": a, "answer_id": 1}] for a in "abc"]
    columns = {
        "image_id": [7, 7, 8],
        "image": images,
        "question": ["q", "r", "q"],
        "answers": answers,
        "answer_type": ["other", "yes/no", "other"],
    }
    path = folder / "train.parquet"
    parquet.write_table(pa.table(columns), path, row_group_size=2)
    found, reasons = read(path)
    question = schema.Question
    assert [questions for questions, _ in found.values()] == [
        [question("q", ["a"], "other"), question("r", ["b"], "yes/no")],
        [question("q", ["c"], "other")],
    ]
    assert reasons == []
