"""A tokenizer.json gives the ids that its own library gives."""

import json

import clip_jax_parity
import numpy as np
import pytest
import tensorflow as tf

from cappa_tf.data.huggingface_tokenizer import (
    HuggingFaceTokenizer,
    open_tokenizer,
)
from cappa_tf.data.preprocessing import ImagePreprocessing
from cappa_tf.export import saved_model
from cappa_tf.inference.predictor import Predictor

CAPTIONS = [" A dog runs on grass ", "", "two cats sit on the red boat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of a tokenizer as clip-jax's: bos and eos, lower-casing."""
    path = tmp_path_factory.mktemp("tokenizer")
    clip_jax_parity.write_tokenizer(path)
    return path


def test_ids_are_those_of_the_file(folder):
    """Its own ids are bos, the tokens, eos and padding, shifted by one."""
    tokenizers = clip_jax_parity.optional("tokenizers")
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.enable_truncation(12)
    theirs.enable_padding(length=12, pad_id=3, pad_token="<pad>")
    expected = theirs.encode_batch([text.strip() for text in CAPTIONS])
    expected = np.array([row.ids for row in expected])
    assert (expected[:, 0] == 1).all() and expected[1].tolist()[:2] == [1, 2]
    ours = HuggingFaceTokenizer(folder, max_length=11)
    assert (ours.pad_id, ours.eos_id) == (3, 2)
    np.testing.assert_array_equal(ours(CAPTIONS), expected[:, 1:])
    # In a pipeline of tf.data, too, with static shapes.
    data = tf.data.Dataset.from_tensor_slices([CAPTIONS]).map(ours)
    assert data.element_spec.shape == (3, 11)
    np.testing.assert_array_equal(next(iter(data)), expected[:, 1:])
    assert ours.vocabulary_size == theirs.get_vocab_size()


def test_texts_and_prompts(folder):
    ours = HuggingFaceTokenizer(folder, max_length=24)
    assert ours.detokenize(ours(CAPTIONS)) == [
        text.strip().lower() for text in CAPTIONS
    ]
    labels, lengths = ours.with_prompts(["a dog", ""], ["sits", "sits"])
    first, second = ours.encode_prompts(["a dog", "sits"]).numpy()
    assert lengths[0] == np.sum(first != 3) and lengths[1] == 0
    sits = [*second[second != 3], 2]
    wanted = [*first[first != 3], *sits]
    assert labels[0].numpy().tolist() == wanted + [3] * (24 - len(wanted))
    assert labels[1].numpy().tolist()[: len(sits)] == sits
    assert ours.count_tokens(["sits"]).numpy() == [len(sits) - 1]
    ids, unknown = ours.encode("a d\u00f6g")
    assert unknown == ["\u00f6"]
    assert "".join(ours.pieces(ids)).startswith(" a d")


def test_files_that_are_not_a_tokenizer(folder, tmp_path):
    with pytest.raises(ValueError, match="must be a tokenizer.json"):
        HuggingFaceTokenizer(tmp_path).load()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="must be a tokenizer.json"):
        HuggingFaceTokenizer(tmp_path).load()
    content = (folder / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content)
    found = open_tokenizer(tmp_path, 8)
    with pytest.raises(ValueError, match="must tell `eos_token`"):
        found(["a"])
    assert HuggingFaceTokenizer(tmp_path, 8, eos_id=2, pad_id=3)(["a"]).shape


def test_a_folder_of_clip_jax_captions_and_scores(folder, tmp_path):
    arrays, params = clip_jax_parity.read("released")
    size = HuggingFaceTokenizer(folder).vocabulary_size
    config = clip_jax_parity.clip_jax_config(arrays)
    config["text_config"]["vocab_size"] = size
    arrays["config"] = json.dumps(config)
    params = clip_jax_parity.random_arrays(config, np.random.default_rng(0))
    path = tmp_path / "model"
    clip_jax_parity.write_folder(path, arrays, params)
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    predictor = Predictor.open(path)
    image = np.clip(arrays["image"], -1.0, 1.0)
    found = predictor.model.generate(image)["tokens"]
    assert len(predictor.tokenizer.detokenize(found)) == 3
    labels = predictor.tokenizer(["a dog", "two cats"])
    np.testing.assert_allclose(
        predictor.model.score(image, ["a dog", "two cats"]),
        predictor.model.score(image, labels),
        rtol=1e-6,
    )


def test_a_saved_model_refuses_it(folder):
    with pytest.raises(ValueError, match="needs a SentencePiece vocabulary"):
        saved_model.Service(
            None, HuggingFaceTokenizer(folder), ImagePreprocessing((8, 8))
        )
