"""The building blocks equal their formulas."""

import keras
import numpy as np
import pytest
from harness import check_layer, randomize
from keras import ops

from cappa_tf.models.attention import MultiHeadAttention, by_head
from cappa_tf.models.blocks import AttentionPooling, EncoderBlock
from cappa_tf.models.mlp import MLP
from cappa_tf.models.patch_embedding import PatchEmbedding
from cappa_tf.models.positions import PositionEmbedding, sincos2d
from cappa_tf.models.stateless_random import StatelessDropout


def array(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def float64(x):
    return ops.convert_to_numpy(x).astype(np.float64)


@pytest.mark.parametrize(
    ("layer_cls", "init_kwargs", "inputs", "shape"),
    [
        (MLP, {"mlp_dim": 20}, [array(2, 5, 8)], (2, 5, 8)),
        (MLP, {"mlp_dim": 20, "use_bias": False}, [array(2, 5, 8)], (2, 5, 8)),
        (
            PatchEmbedding,
            {"hidden_dim": 8, "patch_size": (2, 3)},
            [array(2, 4, 9, 3)],
            (2, 6, 8),
        ),
        (PositionEmbedding, {"grid": (2, 3)}, [array(2, 6, 8)], (2, 6, 8)),
        (
            PositionEmbedding,
            {"grid": (1, 6), "kind": "sincos2d"},
            [array(2, 4, 8)],
            (2, 4, 8),
        ),
        (
            EncoderBlock,
            {"hidden_dim": 8, "num_heads": 2, "mlp_dim": 12},
            [array(2, 5, 8)],
            (2, 5, 8),
        ),
        (AttentionPooling, {"num_heads": 2}, [array(2, 5, 8)], (2, 8)),
        (
            StatelessDropout,
            {"rate": 0.5, "salt": "here"},
            [array(2, 5)],
            (2, 5),
        ),
    ],
)
def test_contract(layer_cls, init_kwargs, inputs, shape, tmp_path):
    check_layer(layer_cls, init_kwargs, inputs, shape, tmp_path)


@pytest.mark.parametrize("use_bias", [True, False])
def test_contract_of_attention(use_bias, tmp_path):
    layer, _ = check_layer(
        MultiHeadAttention,
        {"hidden_dim": 8, "num_heads": 2, "use_bias": use_bias},
        [array(2, 5, 8), array(2, 7, 2, 4), array(2, 7, 2, 4, seed=1)],
        (2, 5, 8),
        tmp_path,
        build_shapes=((None, 5, 8), (None, 7, 6)),
    )
    assert len(layer.weights) == (8 if use_bias else 4)


def test_attention_equals_its_formula():
    """softmax(q k / sqrt(C)) v for each head; True = may attend."""
    layer = MultiHeadAttention(8, 2)
    layer.build((None, None, 8), (None, None, 6))
    randomize(layer, scale=0.5)
    x, memory = array(2, 5, 8), array(2, 7, 6, seed=1)
    mask = np.random.default_rng(2).random((2, 1, 5, 7)) < 0.6
    mask[..., 0] = True
    projected = layer.project(memory)
    actual = layer(x, *projected, mask)
    turned = layer(x, *map(by_head, projected), mask, by_head=True)
    np.testing.assert_allclose(turned, actual, atol=1e-6)
    wq, bq, wk, bk, wv, bv, wo, bo = (float64(w) for w in layer.weights)
    query = np.einsum("btd,dhc->bthc", x, wq) + bq
    keys = np.einsum("bsd,dhc->bshc", memory, wk) + bk
    values = np.einsum("bsd,dhc->bshc", memory, wv) + bv
    scores = np.einsum("bthc,bshc->bhts", query, keys) / np.sqrt(4)
    weights = np.where(mask, np.exp(scores), 0.0)
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bhts,bshc->bthc", weights, values)
    wanted = np.einsum("bthc,hcd->btd", out, wo) + bo
    np.testing.assert_allclose(actual, wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["query", "key", "value", "out"])
def test_attention_kernels_start_as_square_matrices(name):
    """Xavier uniform over [D, D], not over heads as if they were pixels."""
    layer = MultiHeadAttention(64, 4)
    layer.build((None, None, 64))
    kernel = next(w for w in layer.weights if f"{name}/kernel" in w.path)
    bound = np.sqrt(6 / (64 + 64))
    assert 0.95 * bound < np.abs(kernel.numpy()).max() <= bound


def test_patches_equal_a_strided_convolution():
    layer = PatchEmbedding(8, (2, 3))
    images = array(2, 4, 9, 3)
    layer(images)
    randomize(layer)
    wanted = ops.conv(images, layer.kernel, strides=(2, 3), padding="valid")
    wanted = ops.reshape(wanted, (2, 6, 8)) + layer.bias
    np.testing.assert_allclose(layer(images), wanted, atol=1e-5)


def test_mlp_uses_the_tanh_approximation():
    layer = MLP(12)
    x = array(2, 5, 8)
    layer(x)
    randomize(layer)
    w1, b1, w2, b2 = (float64(w) for w in layer.weights)
    y = x @ w1 + b1
    y *= 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    np.testing.assert_allclose(layer(x), y @ w2 + b2, atol=1e-5)


def test_sincos2d_equals_its_formula():
    """Quarters: sin x, cos x, sin y, cos y; 10,000 ** (-i / (D/4 - 1))."""
    height, width, dim = 3, 5, 16
    table = sincos2d(height, width, dim)
    assert table.shape == (1, height * width, dim)
    for row in range(height):
        for column in range(width):
            for i in range(dim // 4):
                frequency = 10_000.0 ** (-i / (dim // 4 - 1))
                wanted = [
                    np.sin(column * frequency),
                    np.cos(column * frequency),
                    np.sin(row * frequency),
                    np.cos(row * frequency),
                ]
                entry = table[0, row * width + column]
                np.testing.assert_allclose(
                    entry[i :: dim // 4], wanted, atol=1e-6
                )


@pytest.mark.parametrize("dim", [4, 10])
def test_sincos2d_refuses_widths_it_cannot_fill(dim):
    with pytest.raises(ValueError, match=f"Received: dim={dim}"):
        sincos2d(2, 2, dim)


def test_positions_of_a_short_text_are_the_first():
    layer = PositionEmbedding((1, 6))
    layer.build((None, 6, 8))
    zeros = np.zeros((2, 4, 8), "float32")
    np.testing.assert_array_equal(layer(zeros)[1], layer.table()[0, :4])


def test_pooling_attends_with_one_learned_query():
    """With equal patches the weights do not matter: MAP is permutation-free."""
    layer = AttentionPooling(2)
    x = array(3, 6, 8)
    layer(x)
    randomize(layer)
    order = np.random.default_rng(0).permutation(6)
    np.testing.assert_allclose(layer(x), layer(x[:, order]), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "received"),
    [
        (lambda: MultiHeadAttention(10, 4), "hidden_dim=10, num_heads=4"),
        (lambda: MultiHeadAttention("8", 2), "hidden_dim='8'"),
        (lambda: MultiHeadAttention(8, 2, use_bias=1), "use_bias=1"),
        (lambda: MLP(0), "mlp_dim=0"),
        (lambda: MLP(8, dropout=1.5), "dropout=1.5"),
        (lambda: PositionEmbedding((2, 2), "rotary"), "kind='rotary'"),
        (lambda: StatelessDropout(1.0, "place"), "rate=1.0"),
    ],
)
def test_wrong_arguments_are_named(make, received):
    with pytest.raises(ValueError, match="Received: ") as error:
        make()
    assert received in str(error.value)


def test_unknown_initializer_is_refused():
    with pytest.raises(ValueError, match="no_such"):
        MultiHeadAttention(8, 2, kernel_initializer="no_such")


def test_layers_open_under_their_registered_names():
    for layer_cls in (MLP, MultiHeadAttention, EncoderBlock):
        name = keras.saving.get_registered_name(layer_cls)
        assert keras.saving.get_registered_object(name) is layer_cls
