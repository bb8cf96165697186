"""The tokenizer: eos and padding by example, reproducible training."""

import numpy as np
import pytest
import tensorflow as tf

from cappa_tf.data import tokenizer as tokenizer_lib

CORPUS = [
    f"{size} {colour} {shape} left of a {other} wall"
    for size in ("small", "large", "tiny")
    for colour in ("red", "green", "blue", "pale")
    for shape in ("circle", "square", "star")
    for other in ("stone", "paper")
] + ["a a", "a"] * 10


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    size = tokenizer_lib.train_tokenizer(CORPUS, path, vocabulary_size=80)
    assert 20 < size <= 80
    return path


def _a(model_path):
    """The id of the word "a"."""
    tokenizer = tokenizer_lib.Tokenizer(model_path, max_length=3)
    return int(tokenizer(["a"])[0, 0])


@pytest.mark.parametrize(
    "sticky_eos, text, expected",
    [
        # "a" stands for its id. The docstring's examples.
        (True, "", [1, 0, 0]),
        (True, "a", ["a", 1, 0]),
        (True, "a a", ["a", "a", 1]),
        (True, "a a a", ["a", "a", 1]),
        (False, "a", ["a", 1, 0]),
        (False, "a a", ["a", "a", 1]),
        (False, "a a a", ["a", "a", "a"]),
    ],
)
def test_eos_and_pad(model_path, sticky_eos, text, expected):
    tokenizer = tokenizer_lib.Tokenizer(
        model_path, max_length=3, sticky_eos=sticky_eos
    )
    a = _a(model_path)
    assert a > tokenizer_lib.UNKNOWN_ID
    expected = [a if token == "a" else token for token in expected]
    assert tokenizer([text]).numpy().tolist() == [expected]


def test_any_shape_in_and_out_of_a_graph(model_path):
    tokenizer = tokenizer_lib.Tokenizer(model_path, max_length=8)
    strings = tf.constant([["red star", "a"], ["", "blue circle"]])
    eager = tokenizer(strings)
    graph = tf.function(tokenizer.__call__)(strings)
    assert eager.dtype == tf.int32
    assert eager.shape == graph.shape == (2, 2, 8)
    np.testing.assert_array_equal(eager, graph)
    assert tokenizer("a").shape == (8,)


def test_lower_case_unless_told_otherwise(model_path):
    tokenizer = tokenizer_lib.Tokenizer(model_path, max_length=16)
    np.testing.assert_array_equal(tokenizer("Red STAR"), tokenizer("red star"))
    cased = tokenizer_lib.Tokenizer(model_path, 16, lowercase=False)
    assert tokenizer_lib.UNKNOWN_ID in cased("RED").numpy()


def test_detokenize_inverts_and_stops_at_eos(model_path):
    tokenizer = tokenizer_lib.Tokenizer(model_path, max_length=48)
    texts = ["small red circle left of a paper wall", "a", ""]
    ids = tokenizer(texts).numpy()
    assert tokenizer.detokenize(ids) == texts
    # Tokens after the end are not part of the caption.
    ids[1, 2:] = ids[0, 2:]
    assert tokenizer.detokenize(ids)[1] == "a"


def test_same_captions_same_bytes(tmp_path):
    for name in ("one", "two"):
        tokenizer_lib.train_tokenizer(CORPUS, tmp_path / name, 60)
    one, two = ((tmp_path / n).read_bytes() for n in ("one", "two"))
    assert one == two
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_small_corpus_gives_a_small_vocabulary(tmp_path):
    path = tmp_path / "model"
    size = tokenizer_lib.train_tokenizer(["a b", "b a"] * 5, path, 500)
    assert size < 20
    assert tokenizer_lib.Tokenizer(path).vocabulary_size == size


def test_errors_name_what_is_wrong(tmp_path, model_path):
    with pytest.raises(ValueError, match="one usable caption. .* 2 empty"):
        tokenizer_lib.train_tokenizer(["", " "], tmp_path / "m", 50)
    with pytest.raises(ValueError, match="vocabulary_size='50'"):
        tokenizer_lib.train_tokenizer(CORPUS, tmp_path / "m", "50")
    with pytest.raises(ValueError, match="vocabulary_size=5"):
        tokenizer_lib.train_tokenizer(CORPUS, tmp_path / "m", 5)
    with pytest.raises(ValueError, match="max_length=1"):
        tokenizer_lib.Tokenizer(model_path, max_length=1)
    missing = tokenizer_lib.Tokenizer(tmp_path / "none")
    with pytest.raises(ValueError, match="none"):
        missing("a")
    (tmp_path / "text").write_text("not a model")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        tokenizer_lib.Tokenizer(tmp_path / "text").load()


def test_exported_module_carries_its_vocabulary(tmp_path):
    path = tmp_path / "tokenizer.model"
    tokenizer_lib.train_tokenizer(CORPUS, path, 60)
    tokenizer = tokenizer_lib.Tokenizer(path, max_length=12)
    expected = tokenizer(["pale star"]).numpy()

    module = tf.Module()
    module.tokenizer = tokenizer
    module.serve = tf.function(
        lambda text: tokenizer(text),
        input_signature=[tf.TensorSpec([None], tf.string)],
    )
    tf.saved_model.save(module, str(tmp_path / "saved"))
    path.unlink()
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    np.testing.assert_array_equal(loaded.serve(["pale star"]), expected)


def test_a_folder_stands_for_its_tokenizer_model(model_path):
    tokenizer = tokenizer_lib.Tokenizer(model_path.parent, max_length=3)
    assert tokenizer.path == str(model_path)
    assert tokenizer.vocabulary_size > 20


def test_a_text_is_encoded_whole(model_path):
    made = tokenizer_lib.Tokenizer(model_path, max_length=3)
    ids, unknown = made.encode("A a \u72ac a a")
    assert len(ids) > made.max_length and tokenizer_lib.EOS_ID not in ids
    assert unknown == ["\u72ac"]
    assert ids[0] == made(["a"]).numpy()[0, 0]
