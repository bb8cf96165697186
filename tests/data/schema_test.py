"""The record schema and the writer."""

import json
import os

import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from cappa_tf.data import schema
from cappa_tf.utils import files


def _examples(count, start=0):
    return [
        schema.Example(
            key=f"k{i}",
            image=b"\xff\xd8" + bytes([i % 256]) * 5,
            captions=[f"caption {i}", f"another é {i}"][: 1 + i % 2],
            label=i if i % 3 == 0 else None,
        )
        for i in range(start, start + count)
    ]


def _read(description, split):
    """Examples of each shard, in order."""
    return [
        [
            schema.deserialize(record)
            for record in tf.data.TFRecordDataset(
                shard.path
            ).as_numpy_iterator()
        ]
        for shard in description.shards(split)
    ]


def test_deserialize_inverts_serialize():
    for example in _examples(4):
        serialized = schema.serialize(example)
        assert schema.deserialize(serialized) == example


def test_parse_gives_the_same_in_the_graph():
    for example in _examples(4):
        parsed = tf.function(schema.parse)(schema.serialize(example))
        assert parsed["image/encoded"].numpy() == example.image
        assert parsed["key"].numpy().decode() == example.key
        captions = [c.decode() for c in parsed["captions"].numpy()]
        assert captions == example.captions
        label = -1 if example.label is None else example.label
        assert parsed["label"].numpy() == label


def _questions():
    """A record with two questions, one of them with three answers."""
    return schema.Example(
        key="q",
        image=b"\xff\xd8",
        captions=["red", "a dog", "red", "dark red"],
        prompts=["what colour?", "", "what colour?", "what colour?"],
        question_types=["colour", "", "colour", "colour"],
    )


def test_prompts_survive_and_are_grouped_by_question():
    example = _questions()
    serialized = schema.serialize(example)
    assert schema.deserialize(serialized) == example
    parsed = schema.parse(tf.constant(serialized))
    prompts = [prompt.decode() for prompt in parsed["prompts"].numpy()]
    assert prompts == example.prompts
    answers = ["red", "red", "dark red"]
    assert schema.questions(example) == [
        schema.Question("what colour?", answers, "colour")
    ]


def test_a_record_without_prompts_has_the_same_bytes_as_before():
    (example,) = _examples(1)
    names = tf.train.Example.FromString(schema.serialize(example))
    assert sorted(names.features.feature) == [
        "captions",
        "image/encoded",
        "key",
        "label",
    ]
    parsed = schema.parse(tf.constant(schema.serialize(example)))
    assert parsed["prompts"].shape == [0]
    assert schema.questions(example) == []


def test_there_must_be_a_prompt_for_each_caption():
    example = _questions()
    wrong = tf.train.Example.FromString(schema.serialize(example))
    del wrong.features.feature["prompts"].bytes_list.value[-1]
    wrong = wrong.SerializeToString()
    with pytest.raises(ValueError, match="3 prompts, 4 captions of 'q'"):
        schema.deserialize(wrong)
    with pytest.raises(tf.errors.InvalidArgumentError):
        schema.parse(tf.constant(wrong))
    example.question_types.pop()
    with pytest.raises(ValueError, match="3 question_types, 4 captions"):
        schema.serialize(example)


def test_the_description_tells_which_splits_have_prompts(tmp_path):
    written = schema.write_dataset(
        {"train": [_questions()], "test": _examples(2)}, tmp_path, "d"
    )
    assert written.num_prompts("train") == 3
    assert written.num_prompts("test") == 0
    assert "num_prompts" not in written.content["splits"]["test"]
    builder = tfds.builder_from_directory(tmp_path)
    skip = {"image/encoded": tfds.decode.SkipDecoding()}
    for split, count in (("train", 4), ("test", 0)):
        for record in builder.as_dataset(split, decoders=skip):
            assert record["prompts"].shape == [count]


def test_round_robin_shards_and_description(tmp_path):
    written = schema.write_dataset(
        {"train": _examples(7), "test": _examples(2, 100)},
        tmp_path / "out",
        "pets",
        num_shards=3,
    )
    description = schema.DatasetDescription.load(tmp_path / "out")
    assert description.content == written.content
    assert description.splits == ["train", "test"]
    shards = _read(description, "train")
    assert shards == [_examples(7)[i::3] for i in range(3)]
    names = [os.path.basename(s.path) for s in description.shards("test")]
    assert names == [
        "pets-test.tfrecord-00000-of-00002",
        "pets-test.tfrecord-00001-of-00002",
    ]
    counts = [s.num_examples for s in description.shards("train")]
    assert counts == [3, 2, 2]
    assert description.num_examples("train") == 7
    assert description.max_captions("train") == 2
    description.verify(checksums=True)


def test_same_examples_same_bytes(tmp_path):
    for name in ("one", "two"):
        pairs = (("train", example) for example in _examples(9))
        schema.write_dataset(pairs, tmp_path / name, "d", num_shards=2)
    one, two = (
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert one == two


def test_interrupted_writing_leaves_nothing_and_can_be_repeated(tmp_path):
    def interrupted():
        yield from _examples(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        schema.write_dataset({"train": interrupted()}, tmp_path, "d")
    assert list(tmp_path.iterdir()) == []
    # Left by a killed process, whose number is no longer in use.
    unfinished = files.temporary_name(str(tmp_path / "shards"))
    os.makedirs(unfinished.replace(f"-{os.getpid()}-", "-999999999-"))
    schema.write_dataset({"train": _examples(5)}, tmp_path, "d")
    assert not list(tmp_path.glob(".*"))


def test_rewriting_replaces_all_of_the_older_version(tmp_path):
    source = {"source": "here"}
    for count, shards in ((9, 4), (5, 2)):
        schema.write_dataset(
            {"train": _examples(count)}, tmp_path, "d", shards, source
        )
    assert len(list(tmp_path.glob("*.tfrecord-*"))) == 2
    description = schema.DatasetDescription.load(tmp_path)
    assert description.num_examples("train") == 5


def test_refuses_to_overwrite_another_data_set_or_other_files(tmp_path):
    schema.write_dataset(
        {"train": _examples(1)}, tmp_path, "d", 1, {"source": "here"}
    )
    (tmp_path / "tokenizer.model").write_text("may stay")
    with pytest.raises(ValueError, match="already holds the data set 'd'"):
        schema.write_dataset({"train": _examples(1)}, tmp_path, "other")
    with pytest.raises(ValueError, match="source='there'"):
        schema.write_dataset(
            {"train": _examples(1)}, tmp_path, "d", 1, {"source": "there"}
        )
    schema.write_dataset(
        {"train": _examples(2)}, tmp_path, "other", 1, overwrite=True
    )
    assert schema.DatasetDescription.load(tmp_path).name == "other"
    assert (tmp_path / "tokenizer.model").exists()
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="thesis.tex"):
        schema.write_dataset(
            {"train": _examples(2)}, tmp_path, "other", 1, overwrite=True
        )


def test_verify_names_each_kind_of_disagreement(tmp_path):
    description = schema.write_dataset(
        {"train": _examples(9)}, tmp_path, "d", num_shards=3
    )
    first, second, third = (s.path for s in description.shards("train"))
    os.remove(first)
    with open(second, "r+b") as file:
        file.truncate(20)
    with open(third, "r+b") as file:
        file.seek(20)
        file.write(b"x")
    with pytest.raises(ValueError) as error:
        description.verify(checksums=True)
    assert "00000-of-00003 is missing or unreadable" in str(error.value)
    assert "00001-of-00003 has 20 bytes" in str(error.value)
    assert "00002-of-00003 has another SHA-256" in str(error.value)


def test_description_errors(tmp_path):
    with pytest.raises(ValueError, match="interrupted"):
        schema.DatasetDescription.load(tmp_path)
    schema.write_dataset({"train": _examples(2)}, tmp_path, "d")
    description = schema.DatasetDescription.load(tmp_path)
    with pytest.raises(ValueError, match=r"\['train'\].*split='val'"):
        description.shards("val")
    path = tmp_path / "dataset.json"
    content = json.loads(path.read_text())
    content["splits"]["train"]["num_examples"] = 5
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="hold 2 examples"):
        schema.DatasetDescription.load(tmp_path)
    path.write_text(json.dumps({**content, "schema_version": 9}))
    with pytest.raises(ValueError, match="schema_version=9"):
        schema.DatasetDescription.load(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        schema.DatasetDescription.load(tmp_path)


def test_writer_errors(tmp_path):
    with pytest.raises(ValueError, match="at least one example"):
        schema.write_dataset({"train": []}, tmp_path, "d")
    with pytest.raises(ValueError, match="num_shards=0"):
        schema.write_dataset({"train": _examples(1)}, tmp_path, "d", 0)
    with pytest.raises(ValueError, match="name='a/b'"):
        schema.write_dataset({"train": _examples(1)}, tmp_path, "a/b")
    with pytest.raises(ValueError, match="not a tf.train.Example"):
        schema.deserialize(b"\xff\xff")
    with pytest.raises(ValueError, match="image/encoded"):
        schema.deserialize(b"")
