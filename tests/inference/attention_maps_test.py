"""Attention maps: the decoder's own weights, word by word."""

import numpy as np
import pytest
import tensorflow as tf
import tiny
from PIL import Image

from cappa_tf.evaluation.sheet import write_attention_sheet
from cappa_tf.inference.attention_maps import attention_maps
from cappa_tf.inference.captions import CaptionDecoder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.Data(tmp_path_factory.mktemp("vocabulary"), captions=2)


@pytest.fixture(scope="module")
def model(data):
    model = tiny.make_model(data.tokenizer.vocabulary_size)
    model.build()
    # Start values attend to all patches alike.
    generator = np.random.default_rng(0)
    for variable in model.trainable_variables:
        noise = generator.normal(0, 0.5, variable.shape)
        variable.assign(variable.numpy() + noise)
    return model


def test_weights_are_those_of_the_forward_pass(model, data):
    """The weighted values of a block are what it adds to the text."""
    batch = next(iter(data.train(3)))
    labels = tf.reshape(batch["labels"], [6, tiny.LENGTH])
    decoder = model.text_decoder
    memory = decoder.project_memory(model.encode(batch["image"]))
    tokens = decoder.shift_right(labels)
    (maps,) = decoder.image_attention(tokens, memory)
    assert maps.shape == (6, 2, tiny.LENGTH, 4)
    np.testing.assert_allclose(np.sum(maps, -1), 1.0, rtol=1e-5)
    block = decoder.blocks[0]
    values = np.repeat(memory[0][1], 2, axis=0)  # [6, P, H, C]
    read = np.einsum("nhlp,nphc->nlhc", maps, values)
    expected = block.cross_attention._out(read)
    seen = {}
    original = type(block)._attend_to_image

    def spy(self, *arguments):
        seen["added"] = original(self, *arguments)
        return seen["added"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(block), "_attend_to_image", spy)
        decoder(tokens, memory)
    np.testing.assert_allclose(seen["added"], expected, atol=1e-5)


def test_every_word_has_a_map_of_the_grid(model, data, tmp_path):
    images = next(iter(data.train(3)))["image"]
    decoder = CaptionDecoder(model, data.tokenizer, 3)
    rows = decoder.decode(images, ["a", "b", "c"])
    maps = attention_maps(model, data.tokenizer, images, rows)
    for row, words in zip(rows, maps, strict=True):
        assert [word for word, _ in words] == [word for word, _ in row.words]
        for _, one in words:
            assert one.shape == (2, 2)
            assert one.sum() == pytest.approx(1.0, rel=1e-5)
    # Alone as in a batch of longer captions.
    (alone,) = attention_maps(model, data.tokenizer, images[1:2], rows[1:2])
    for (_, one), (_, other) in zip(alone, maps[1], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    path = tmp_path / "where.png"
    write_attention_sheet(path, rows, images, maps, title="maps")
    with Image.open(path) as sheet:
        assert sheet.width > 112 and sheet.height > 3 * 112


def test_a_model_without_a_decoder_is_refused(data):
    model = tiny.make_contrastive(data.tokenizer.vocabulary_size)
    with pytest.raises(ValueError, match="captioner"):
        attention_maps(model, data.tokenizer, np.zeros((1, 16, 16, 3)), [])
