"""tools/train_tokenizer.py: a vocabulary of the training captions."""

import io
import tarfile

import pytest
from absl import flags
from tool_flags import defined

from cappa_tf.data import schema, text_lengths, tokenizer
from tools import train_tokenizer


@pytest.fixture(scope="module")
def tool():
    with defined(train_tokenizer) as tool:
        yield tool


@pytest.fixture
def run(tool):
    def run(*arguments):
        flags.FLAGS.unparse_flags()
        rest = flags.FLAGS(["train_tokenizer.py", *map(str, arguments)])
        return tool.main(rest)

    yield run
    for name in ("data", "text", "output"):
        flags.FLAGS[name].value = None
    for name in ("gin_file", "gin_param"):
        flags.FLAGS[name].value = []


@pytest.fixture
def data(tmp_path):
    """A data set whose test split has words that are not in training."""
    captions = ["A Red Dog", "a blue cat", "the red cat and the blue dog"] * 4
    examples = {
        split: [
            schema.Example(f"{i}", b"\xff", [prefix + caption])
            for i, caption in enumerate(captions)
        ]
        for split, prefix in (("train", ""), ("test", "0123456789 "))
    }
    schema.write_dataset(examples, tmp_path / "data", "d", 2)
    return tmp_path / "data"


def test_vocabulary_of_the_training_split(run, data, capsys):
    run(f"--data={data}", "--vocabulary_size=40")
    made = tokenizer.Tokenizer(data / "tokenizer.model", 40)
    printed = capsys.readouterr().out
    assert f"pieces                {made.vocabulary_size}" in printed
    assert "unknown               0.0000% of tokens" in printed
    assert made.detokenize(made(["A Red Cat"])) == ["a red cat"]
    assert tokenizer.UNKNOWN_ID in made("7").numpy()
    counts = text_lengths.read(made.path)
    lengths = made.count_tokens(["a red dog", "a blue cat"]).numpy() + 1
    assert sum(counts.values()) == 12 and set(lengths.tolist()) <= set(counts)
    # The description does not mention it, and the data set is unchanged.
    schema.DatasetDescription.load(data).verify(checksums=True)


def test_vocabulary_of_a_text_file(run, data, tmp_path, capsys):
    text = tmp_path / "lines.txt"
    text.write_text("A Red Dog\na blue cat\nthe red cat and the blue dog\n" * 4)
    run(
        f"--text={text}",
        f"--output={tmp_path / 'x.model'}",
        "--vocabulary_size=500",
    )
    made = tokenizer.Tokenizer(tmp_path / "x.model")
    printed = capsys.readouterr().out
    assert f"yield only {made.vocabulary_size} pieces" in printed


def test_lines_that_are_left_out_are_named(run, tmp_path, capsys):
    text, output = tmp_path / "lines.txt", tmp_path / "x.model"
    lines = ["z" * 4193, "", "caf\udce9", "a \u2585 b"]
    bad = "\n".join(lines).encode(errors="surrogateescape")
    text.write_bytes(b"a red dog\na blue cat\n" * 4 + bad)
    named = (
        "1 longer than 4192 bytes (line 9: 'zzz",
        "1 empty (line 10)",
        "1 not UTF-8 (line 11: 'caf",
        "1 with the reserved character \u2585 (line 12: 'a ",
    )
    given = (f"--text={text}", f"--output={output}", "--vocabulary_size=20")
    run(*given)
    printed = capsys.readouterr().out
    assert all(words in printed for words in named)
    made = tokenizer.Tokenizer(output)
    assert tokenizer.UNKNOWN_ID in made("z").numpy()
    output.unlink()
    text.write_bytes(bad)
    with pytest.raises(SystemExit) as error:
        run(*given)
    assert str(error.value).startswith("train_tokenizer: No line can be used.")
    assert "(line 1: 'zzz" in str(error.value)
    assert not output.exists()


def test_vocabulary_of_what_training_reads(run, tmp_path):
    """With the gin files of tools/train.py: here, webdataset shards."""
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for i in range(12):
            for name, content in (("jpg", b"\xff"), ("txt", b"A Red Dog")):
                file = tarfile.TarInfo(f"{i}.{name}")
                file.size = len(content)
                tar.addfile(file, io.BytesIO(content))
    given = (
        "--gin_file=gin/cappa_b16.gin",
        "--gin_file=gin/data/webdataset.gin",
        f"--gin_param=DATA='{tmp_path}/{{split}}-*.tar'",
        "--vocabulary_size=20",
    )
    path = tmp_path / "made" / "x.model"
    run(*given, f"--gin_param=TOKENIZER='{path}'")
    made = tokenizer.Tokenizer(path)
    assert made.detokenize(made(["a red dog"])) == ["a red dog"]
    flags.FLAGS["gin_param"].value = []
    with pytest.raises(SystemExit, match="TOKENIZER must be set"):
        run(*given)


def test_refusals_name_the_cause(run, tmp_path):
    text = tmp_path / "lines.txt"
    text.write_text("\n")
    with pytest.raises(SystemExit, match="--text needs --output"):
        run(f"--text={text}")
    with pytest.raises(SystemExit, match=r"Left out: 1 empty \(line 1\)"):
        run(f"--text={text}", f"--output={tmp_path / 'x'}")
    with pytest.raises(SystemExit, match="one of --data, --text"):
        run(f"--text={text}", f"--data={tmp_path}")
    flags.FLAGS["text"].value = None
    with pytest.raises(SystemExit, match="A data set must be a folder"):
        run(f"--data={tmp_path}")
