"""The vision encoder: its outputs, and the effects of patch dropout."""

import numpy as np
import pytest
import tensorflow as tf
from harness import check_layer, randomize

from cappa_tf.models.sizes import variant
from cappa_tf.models.stateless_random import (
    StatelessDropout,
    StochasticDepth,
    example_seeds,
    keep_tokens,
)
from cappa_tf.models.vision_encoder import VisionEncoder

SMALL = {
    "hidden_dim": 16,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_dim": 24,
    "patch_size": (4, 8),
    "image_size": (16, 24),
}
PATCHES = 12


def images(count=2, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (count, 16, 24, 3)).astype("float32")


def encoder(**kwargs):
    model = VisionEncoder(**{**SMALL, **kwargs})
    model.build()
    randomize(model)
    return model


@pytest.mark.parametrize(
    ("kwargs", "shapes"),
    [
        ({}, {"encoded": (2, 12, 16), "pre_logits": (2, 16)}),
        (
            {"position_embedding": "sincos2d", "pooling": "map"},
            {"encoded": (2, 12, 16), "pre_logits": (2, 16)},
        ),
        (
            {"pooling": "tok"},
            {"encoded": (2, 13, 16), "pre_logits": (2, 16)},
        ),
        ({"pooling": "none"}, {"encoded": (2, 12, 16)}),
    ],
)
def test_contract(kwargs, shapes, tmp_path):
    check_layer(
        VisionEncoder,
        {**SMALL, **kwargs},
        [images()],
        shapes,
        tmp_path,
    )


def test_pre_logits_are_the_mean_of_the_patches():
    outputs = encoder()(images())
    mean = np.mean(outputs["encoded"], axis=1)
    np.testing.assert_allclose(outputs["pre_logits"], mean, atol=1e-6)


def test_class_token_comes_first():
    outputs = encoder(pooling="tok")(images())
    np.testing.assert_array_equal(
        outputs["pre_logits"], outputs["encoded"][:, 0]
    )


def test_every_output_is_of_its_image_alone():
    model = encoder()
    both, first = model(images(2)), model(images(2)[:1])
    np.testing.assert_allclose(both["encoded"][:1], first["encoded"], atol=1e-5)


def test_patch_dropout_changes_nothing_at_inference():
    plain, dropping = encoder(), encoder(patch_dropout=0.75)
    dropping.set_weights(plain.get_weights())
    np.testing.assert_array_equal(
        plain(images())["encoded"], dropping(images())["encoded"]
    )


@pytest.mark.parametrize(
    ("rate", "kept"), [(0.25, 9), (0.5, 6), (0.65, 4), (0.99, 1), (0.0, 12)]
)
def test_patch_dropout_drops_the_stated_number_in_training(rate, kept):
    model = encoder(patch_dropout=rate)
    outputs = model(images(), seeds=example_seeds(0, [0, 1]), training=True)
    assert outputs["encoded"].shape == (2, kept, 16)
    assert outputs["pre_logits"].shape == (2, 16)
    assert model.num_kept_patches() == kept


def test_kept_patches_keep_content_and_order():
    """Without blocks that mix, what is kept are rows of the full output."""
    x = tf.reshape(tf.range(4.0 * PATCHES), (4, PATCHES, 1))
    seeds = example_seeds(7, np.arange(4))
    kept = keep_tokens(x, 0.5, seeds, 3).numpy()[..., 0]  # [4, 6]
    assert np.all(np.diff(kept, axis=1) > 0)
    places = kept - PATCHES * np.arange(4)[:, None]
    assert places.min() >= 0
    assert places.max() < PATCHES
    assert len({tuple(row) for row in places}) > 1
    again = keep_tokens(x[2:3], 0.5, seeds[2:3], 3).numpy()[..., 0]
    np.testing.assert_array_equal(again, kept[2:3])


def test_patch_dropout_reaches_every_patch():
    x = tf.tile(tf.range(float(PATCHES))[None, :, None], (600, 1, 1))
    kept = keep_tokens(x, 0.5, example_seeds(0, np.arange(600)), 3)
    counts = np.bincount(kept.numpy().ravel().astype(int), minlength=PATCHES)
    # 300 expected of each, with a standard deviation of 12.
    assert np.abs(counts - 300).max() < 60


def test_stochastic_depth_drops_whole_branches_of_examples():
    layer = StochasticDepth(0.25, "here")
    x = np.random.default_rng(0).normal(size=(400, 3, 2)).astype("float32")
    seeds = example_seeds(0, np.arange(400))
    found = layer(x, seeds, training=True).numpy()
    kept = np.any(found != 0.0, axis=(1, 2))
    np.testing.assert_allclose(found[kept], x[kept] / 0.75, rtol=1e-6)
    # 300 expected, with a standard deviation of 9.
    assert abs(kept.sum() - 300) < 40
    # An example's choice is its own, in whatever batch it is.
    alone = layer(x[7:9], seeds[7:9], training=True)
    np.testing.assert_array_equal(alone, found[7:9])
    np.testing.assert_array_equal(layer(x), x)


def test_stochastic_depth_grows_linearly_and_never_drops_two_alike():
    model = encoder(num_layers=3, stochastic_depth=0.5)
    rates = [block.stochastic_depth for block in model.blocks]
    assert rates == [0.0, 0.25, 0.5]
    salts = [skip.salt for b in model.blocks for skip in b._skips.values()]
    assert len(set(salts)) == 6
    seeds = example_seeds(0, np.arange(8))
    changed = model(images(8), seeds, training=True)["pre_logits"]
    assert np.abs(changed - model(images(8))["pre_logits"]).max() > 1e-3


def test_a_configuration_from_before_stochastic_depth_is_read():
    config = encoder().get_config()
    del config["stochastic_depth"]
    assert VisionEncoder.from_config(config).stochastic_depth == 0.0


@pytest.mark.parametrize(
    "kwargs",
    [{"patch_dropout": 0.5}, {"dropout": 0.1}, {"stochastic_depth": 0.5}],
)
def test_without_seeds_drops_differently_at_every_call(kwargs):
    model = encoder(**kwargs)
    plain, again = model(images()), model(images())
    first, second = (model(images(), training=True) for _ in range(2))
    np.testing.assert_array_equal(plain["encoded"], again["encoded"])
    assert np.abs(first["pre_logits"] - second["pre_logits"]).max() > 1e-4


def test_no_two_dropouts_draw_the_same_mask():
    layers = [
        layer
        for layer in encoder(dropout=0.1)._flatten_layers()
        if isinstance(layer, StatelessDropout)
        and not isinstance(layer, StochasticDepth)
    ]
    # One of the embeddings; after attention, in and after the MLP of a block.
    assert len(layers) == 1 + 3 * 2
    assert len({layer.salt for layer in layers}) == len(layers)


def test_sizes_are_the_papers():
    assert variant("B/16") == {
        "hidden_dim": 768,
        "num_layers": 12,
        "num_heads": 12,
        "mlp_dim": 3072,
        "patch_size": 16,
    }
    model = VisionEncoder(**variant("S/16"))
    model.build()
    assert model.count_params() == 21_664_896


@pytest.mark.parametrize(
    ("kwargs", "received"),
    [
        ({"image_size": (16, 20)}, "image_size=(16, 20), patch_size=(4, 8)"),
        ({"image_size": "224"}, "image_size='224'"),
        ({"patch_size": (4, 4, 4)}, "patch_size=(4, 4, 4)"),
        ({"num_layers": 2.0}, "num_layers=2.0"),
        ({"pooling": "mean"}, "pooling='mean'"),
        ({"patch_dropout": "0.5"}, "patch_dropout='0.5'"),
        ({"num_heads": 3}, "num_heads=3"),
        ({"position_embedding": "none"}, "kind='none'"),
    ],
)
def test_wrong_arguments_are_named(kwargs, received):
    with pytest.raises(ValueError, match="Received: ") as error:
        VisionEncoder(**{**SMALL, **kwargs})
    assert received in str(error.value)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"16, 24, 3.*Received: .*20, 24"):
        encoder()(np.zeros((2, 20, 24, 3), "float32"))
