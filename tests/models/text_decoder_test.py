"""The decoder: what each position may attend to, and exact caching."""

import numpy as np
import pytest
import tensorflow as tf
from harness import check_layer, randomize

from cappa_tf.models.attention import by_head
from cappa_tf.models.captioner import Captioner
from cappa_tf.models.special_tokens import SpecialTokens
from cappa_tf.models.stateless_random import StatelessDropout, example_seeds
from cappa_tf.models.text_decoder import TextDecoder
from cappa_tf.models.vision_encoder import VisionEncoder

SMALL = {
    "vocabulary_size": 20,
    "max_length": 7,
    "hidden_dim": 16,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_dim": 24,
    "encoder_dim": 12,
}


def decoder(**kwargs):
    model = TextDecoder(**{**SMALL, **kwargs})
    model.build()
    randomize(model)
    return model


def tokens(count=3, length=7, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 20, (count, length), dtype=np.int32)


def patches(count=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, 5, 12)).astype("float32")


def changed_from(ids, position):
    """The same tokens before `position`, all others different."""
    changed = ids.copy()
    changed[:, position:] = (changed[:, position:] + 1) % 20
    return changed


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"use_bias": True, "position_embedding": "sincos2d"},
        {"special_tokens": SpecialTokens(1, 2, 3), "encoder_dim": None},
    ],
)
def test_contract(kwargs, tmp_path):
    check_layer(
        TextDecoder, {**SMALL, **kwargs}, [tokens()], (3, 7, 16), tmp_path
    )


def test_shift_right_by_example():
    """0, the pad, is also the start token; the last token falls out."""
    labels = np.array([[5, 7, 1, 0], [2, 3, 4, 1]])
    shifted = decoder().shift_right(labels)
    np.testing.assert_array_equal(shifted, [[0, 5, 7, 1], [0, 2, 3, 4]])
    shifted = decoder(special_tokens=SpecialTokens(3, 9, 2)).shift_right(labels)
    np.testing.assert_array_equal(shifted, [[9, 5, 7, 1], [9, 2, 3, 4]])


@pytest.mark.parametrize("position", range(1, 7))
def test_no_position_sees_a_later_token(position):
    model = decoder()
    memory = model.project_memory(patches())
    one = model(tokens(), memory).numpy()
    other = model(changed_from(tokens(), position), memory).numpy()
    np.testing.assert_allclose(
        one[:, :position], other[:, :position], atol=1e-5
    )
    different = np.abs(one - other)[:, position:].max(-1)
    assert different.min() > 1e-3


def test_parallel_is_a_choice_of_each_caption():
    """True: every position sees all; False: as without `parallel`."""
    model = decoder()
    memory = model.project_memory(patches())
    parallel = tf.constant([True, False, True])
    mixed = model(tokens(), memory, parallel=parallel).numpy()
    causal = model(tokens(), memory).numpy()
    np.testing.assert_allclose(mixed[1], causal[1], atol=1e-5)
    changed = changed_from(tokens(), 6)
    seen = np.abs(model(changed, memory, parallel=parallel) - mixed)
    assert seen[[0, 2], :6].max(-1).min() > 1e-4
    assert seen[1, :6].max() < 1e-5


@pytest.mark.parametrize("length", [7, 5])
def test_cached_equals_uncached(length):
    model = decoder(use_bias=True)
    ids = tokens(length=length)
    memory = model.project_memory(patches())
    wanted = model(ids, memory)
    turned = [tuple(map(by_head, pair)) for pair in memory]
    cache = model.empty_cache(3, length)
    for i in range(length):
        hidden, cache = model.call_with_cache(
            ids[:, i : i + 1], turned, cache, tf.constant(i)
        )
        np.testing.assert_allclose(hidden[:, 0], wanted[:, i], atol=1e-5)


def test_captions_of_one_image_share_its_memory():
    """N = B * K adjacent captions equal each with a copy of its image."""
    model = decoder()
    encoded = patches(2)
    ids = tokens(6)
    shared = model(ids, model.project_memory(encoded))
    repeated = model(ids, model.project_memory(np.repeat(encoded, 3, axis=0)))
    np.testing.assert_allclose(shared, repeated, atol=1e-5)


def test_a_caption_sees_its_own_image_only():
    model = decoder()
    encoded = patches(2)
    one = model(tokens(4), model.project_memory(encoded)).numpy()
    encoded[1] += 1.0
    other = model(tokens(4), model.project_memory(encoded)).numpy()
    np.testing.assert_allclose(one[:2], other[:2], atol=1e-6)
    assert np.abs(one - other)[2:].max(-1).min() > 1e-3


def test_short_texts_are_the_beginning_of_long_ones():
    model = decoder()
    memory = model.project_memory(patches())
    long, short = model(tokens(), memory), model(tokens()[:, :4], memory)
    np.testing.assert_allclose(long[:, :4], short, atol=1e-5)


def test_head_starts_at_zero():
    model = TextDecoder(**SMALL)
    logits = model.logits(model(tokens()))
    assert logits.shape == (3, 7, 20)
    np.testing.assert_array_equal(logits, np.zeros((3, 7, 20)))


def test_logits_are_float32_under_mixed_precision():
    model = decoder(dtype="mixed_bfloat16")
    memory = model.project_memory(patches())
    assert memory[0][0].dtype == "bfloat16"
    assert model.logits(model(tokens(), memory)).dtype == "float32"


@pytest.mark.parametrize(
    ("kwargs", "rows", "mask"),
    [
        ({}, 21, 20),
        ({"special_tokens": SpecialTokens()}, 20, None),
        ({"special_tokens": SpecialTokens(3, 1, 2, mask=4)}, 20, 4),
    ],
)
def test_mask_is_one_past_the_vocabulary_by_default(kwargs, rows, mask):
    model = decoder(**kwargs)
    (embeddings,) = (w for w in model.weights if w.name == "embeddings")
    assert embeddings.shape == (rows, 16)
    assert model.special_tokens.mask == mask
    assert model.head_weights[0].shape == (16, 20)


@pytest.mark.parametrize("use_bias", [False, True])
def test_where_biases_are(use_bias):
    """Final LayerNorm and head always, attention never, the rest by choice."""
    paths = [w.path for w in decoder(use_bias=use_bias).weights]
    biases = [p for p in paths if p.endswith(("/bias", "/beta"))]
    in_blocks = [p for p in biases if "decoder_block" in p]
    assert len(biases) - len(in_blocks) == 2
    # Of each of two blocks three LayerNorms and two dense layers.
    assert len(in_blocks) == (10 if use_bias else 0)
    assert not [p for p in biases if "attention/" in p]


def test_fixed_positions_are_no_weights():
    learned = decoder()
    fixed = decoder(position_embedding="sincos2d")
    assert learned.count_params() - fixed.count_params() == 7 * 16


def test_no_two_dropouts_draw_the_same_mask():
    layers = [
        layer
        for layer in decoder(dropout=0.1)._flatten_layers()
        if isinstance(layer, StatelessDropout)
    ]
    # After both attentions, in and after the MLP of each of two blocks.
    assert len(layers) == 4 * 2
    assert len({layer.salt for layer in layers}) == len(layers)


def test_dropout_draws_belong_to_the_caption():
    model = decoder(dropout=0.3)
    memory = model.project_memory(patches(1))
    seeds = example_seeds(0, np.arange(3))
    ids = np.repeat(tokens(1), 3, axis=0)
    dropped = model(ids, memory, seeds=seeds, training=True).numpy()
    assert np.abs(dropped[0] - dropped[1]).max() > 1e-3
    alone = model(ids[1:2], memory, seeds=seeds[1:2], training=True)
    np.testing.assert_allclose(alone[0], dropped[1], atol=1e-5)
    first, second = (model(ids, memory, training=True) for _ in range(2))
    assert np.abs(first - second).max() > 1e-3


def captioner():
    encoder = VisionEncoder(
        12, 1, num_heads=2, mlp_dim=24, patch_size=8, image_size=16
    )
    model = Captioner(encoder, TextDecoder(**SMALL))
    model.build()
    randomize(model)
    return model


def test_parallel_logits_do_not_depend_on_the_targets():
    model = captioner()
    images = np.random.default_rng(0).normal(size=(3, 16, 16, 3))
    images = images.astype("float32")
    one = model.logits(images, tokens(), parallel=True)
    other = model.logits(images, tokens(seed=1), parallel=True)
    np.testing.assert_array_equal(one, other)
    assert np.abs(np.diff(one, axis=0)).max() > 1e-3  # but on the image


def test_autoregressive_logits_depend_on_the_labels_before_them():
    model = captioner()
    images = np.zeros((3, 16, 16, 3), "float32")
    one = model.logits(images, tokens()).numpy()
    other = model.logits(images, changed_from(tokens(), 4)).numpy()
    np.testing.assert_allclose(one[:, :5], other[:, :5], atol=1e-5)
    assert np.abs(one - other)[:, 5:].max(-1).min() > 1e-4


@pytest.mark.parametrize(
    ("kwargs", "received"),
    [
        ({"vocabulary_size": "32000"}, "vocabulary_size='32000'"),
        ({"max_length": 0}, "max_length=0"),
        ({"num_layers": 1.0}, "num_layers=1.0"),
        ({"num_heads": 3}, "num_heads=3"),
        ({"encoder_dim": -1}, "encoder_dim=-1"),
        ({"use_bias": 0}, "use_bias=0"),
        ({"dropout": 2}, "dropout=2"),
    ],
)
def test_wrong_arguments_are_named(kwargs, received):
    with pytest.raises(ValueError, match="Received: ") as error:
        TextDecoder(**{**SMALL, **kwargs})
    assert received in str(error.value)
