"""Objectives, random choices, scores and decoding of the captioner."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from random_captioner import SIDE, SMALL, B, L, V, make_captioner

from cappa_tf.models import stateless_random
from cappa_tf.models.captioner import Captioner
from cappa_tf.models.special_tokens import SpecialTokens
from cappa_tf.models.text_decoder import TextDecoder
from cappa_tf.models.vision_encoder import VisionEncoder


@pytest.fixture(scope="module")
def captioner():
    return make_captioner()


@pytest.fixture(scope="module")
def batch():
    draw = np.random.RandomState(0)
    labels = draw.randint(2, V, (B, L))
    for row, length in enumerate((2, 4, 7, 5)):
        labels[row, length - 1] = 1
        labels[row, length:] = 0
    return {
        "image": tf.constant(
            draw.uniform(-1, 1, (B, SIDE, SIDE, 3)), tf.float32
        ),
        "labels": tf.constant(labels[:, None], tf.int32),
        "index": tf.range(10, 10 + B, dtype=tf.int64),
    }


def _nll(captioner, batch, parallel):
    """Per-token nll [B, L] from the public logits."""
    labels = batch["labels"][:, 0]
    logits = captioner.logits(batch["image"], labels, parallel)
    log_probs = tf.nn.log_softmax(logits)
    nll = -tf.gather(log_probs, labels, batch_dims=2)
    return nll.numpy() * (labels.numpy() != 0)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_loss_is_the_mean_over_a_captions_tokens(batch, probability):
    captioner = make_captioner(masked_pred_prob=probability)
    parts = captioner.compute_losses(batch)
    nll = _nll(captioner, batch, parallel=probability == 1.0)
    lengths = np.sum(batch["labels"][:, 0] != 0, -1)
    np.testing.assert_allclose(parts["loss"], nll.sum(-1) / lengths, rtol=1e-5)
    np.testing.assert_allclose(parts["nll"], nll.sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(parts["tokens"], lengths)
    np.testing.assert_array_equal(parts["parallel"], [probability] * B)


def test_a_mixed_batch_is_each_example_by_its_own_objective(captioner, batch):
    batch = {k: tf.repeat(v, 8, axis=0) for k, v in batch.items()}
    batch["index"] = tf.range(8 * B, dtype=tf.int64)
    parts = captioner.compute_losses(batch)
    drawn = parts["parallel"].numpy() == 1
    assert 0 < drawn.sum() < 8 * B
    nll = np.where(
        drawn,
        _nll(captioner, batch, True).sum(-1),
        _nll(captioner, batch, False).sum(-1),
    )
    np.testing.assert_allclose(parts["nll"], nll, rtol=1e-5)


def test_three_quarters_are_parallel(captioner):
    index = tf.range(4000, dtype=tf.int64)
    seeds = stateless_random.example_seeds(0, index)
    share = tf.reduce_mean(
        tf.cast(captioner._sample_parallel(seeds, 4000), tf.float32)
    )
    assert abs(float(share) - 0.75) < 0.03


def test_evaluation_is_always_autoregressive(captioner, batch):
    parts = captioner.compute_losses(batch, training=False)
    nll = _nll(captioner, batch, False).sum(-1)
    np.testing.assert_allclose(parts["nll"], nll, rtol=1e-5)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_masking_ratio_is_the_share_of_masks(batch, ratio):
    captioner = make_captioner(masked_pred_prob=1.0, masking_ratio=ratio)
    seeds = stateless_random.example_seeds(0, batch["index"])
    tokens, predicted, weight = captioner._decoder_inputs(
        batch["labels"][:, 0], tf.fill([B], True), seeds
    )
    assert predicted is None and weight is None
    tokens = tokens.numpy()
    masked = tokens == V
    assert np.all(masked.sum(-1) == int(ratio * L))
    np.testing.assert_array_equal(
        tokens[~masked], batch["labels"].numpy()[:, 0][~masked]
    )


def test_several_captions_are_the_mean_of_each_alone(captioner, batch):
    other = tf.roll(batch["labels"], 1, axis=0)
    both = {**batch, "labels": tf.concat([batch["labels"], other], 1)}
    together = captioner.compute_losses(both)
    parts = [
        captioner.compute_losses({**batch, "labels": labels})
        for labels in (batch["labels"], other)
    ]
    for name, mean in (("loss", 0.5), ("nll", 1.0), ("tokens", 1.0)):
        expected = mean * (parts[0][name] + parts[1][name])
        np.testing.assert_allclose(together[name], expected, rtol=1e-5)


def test_draws_and_drops_do_not_depend_on_the_split(batch):
    captioner = make_captioner({"dropout": 0.2, "patch_dropout": 0.5})
    whole = captioner.compute_losses(batch)
    halves = [
        captioner.compute_losses({k: v[i : i + 2] for k, v in batch.items()})
        for i in (0, 2)
    ]
    for name, value in whole.items():
        joined = tf.concat([half[name] for half in halves], 0)
        np.testing.assert_allclose(value, joined, rtol=1e-5)


@pytest.fixture(scope="module")
def keeping():
    """One of two layers of an encoder with a class token and a register."""
    return make_captioner(
        {"pooling": "tok", "num_registers": 1}, visual_tokens_kept=0.5
    )


def test_the_decoder_trains_on_some_tokens_of_each_image(keeping, batch):
    """Those of (seed, index), whatever the batch; all others change nothing."""
    encoded = keeping.encode(batch["image"])  # [B, 1 + 4 + 1, D]
    seeds = stateless_random.example_seeds(keeping.seed, batch["index"])
    kept = keeping._keep_tokens(encoded, seeds)
    assert kept.shape == (B, 1 + 2 + 1, 16)
    every = stateless_random.keep_tokens(encoded, 1.0, seeds, 0)
    np.testing.assert_array_equal(every, encoded)
    own = tf.reduce_all(kept[:, :, None] == encoded[:, None], axis=-1)
    places = [tuple(np.flatnonzero(row)) for row in own.numpy().any(1)]
    assert all(p[0] == 0 and p[-1] == 5 and len(p) == 4 for p in places)
    assert len(set(places)) > 1
    # Of the image alone, and without the tokens that are left out.
    losses = keeping.compute_losses(batch)
    alone = {name: value[2:3] for name, value in batch.items()}
    one = keeping.compute_losses(alone)
    np.testing.assert_allclose(one["loss"], losses["loss"][2:3], rtol=1e-5)
    chosen = own.numpy().any(1)[..., None]
    features = {**batch, "image_features": tf.where(chosen, encoded, 1e3)}
    found = keeping.compute_losses(features)
    np.testing.assert_allclose(found["loss"], losses["loss"], rtol=1e-6)


def test_all_tokens_are_kept_by_default_and_in_inference(keeping, batch):
    plain = make_captioner({"pooling": "tok", "num_registers": 1})
    config = keeping.get_config()
    assert config["visual_tokens_kept"] == 0.5
    del config["visual_tokens_kept"]  # Files of earlier versions.
    assert Captioner.from_config(config).visual_tokens_kept == 1.0
    for training in (True, False):
        whole = plain.compute_losses(batch, training)
        some = keeping.compute_losses(batch, training)
        assert np.array_equal(whole["loss"], some["loss"]) != training
    labels = batch["labels"][:, 0]
    for one in ("logits", "score"):
        np.testing.assert_array_equal(
            *(getattr(m, one)(batch["image"], labels) for m in (plain, keeping))
        )


def test_no_two_parts_drop_the_same():
    captioner = make_captioner({"dropout": 0.1})
    layers = [
        layer
        for layer in captioner._flatten_layers()
        if isinstance(layer, stateless_random.StatelessDropout)
    ]
    for layer in layers:
        layer.salt = "same"
    captioner.build()
    parts = {
        name: {x._salt for x in layers if x in part._flatten_layers()}
        for name, part in captioner.parts.items()
    }
    assert [*map(len, parts.values())] == [1, 1]
    assert parts["vision_encoder"] != parts["text_decoder"]


def test_scores_are_minus_the_nll_of_every_pair(captioner, batch):
    scores = captioner.score(batch["image"], batch["labels"][:, 0])
    for label in range(B):
        tiled = tf.repeat(batch["labels"][label][None], B, 0)
        nll = _nll(captioner, {**batch, "labels": tiled}, False).sum(-1)
        np.testing.assert_allclose(scores[:, label], -nll, rtol=1e-5)


def test_scores_of_strings_go_through_the_tokenizer(batch):
    captioner = make_captioner()
    with pytest.raises(ValueError, match="captioner.tokenizer"):
        captioner.score(batch["image"], ["a", "b"])
    captioner.tokenizer = lambda strings: batch["labels"][: len(strings), 0]
    np.testing.assert_allclose(
        captioner.score(batch["image"], ["a", "b"]),
        captioner.score(batch["image"], batch["labels"][:2, 0]),
    )


@pytest.mark.parametrize("jit_compile", [False, True])
def test_cached_decoding_is_greedy_by_the_full_logits(
    captioner, batch, jit_compile
):
    generate = tf.function(captioner.generate, jit_compile=jit_compile)
    outputs = generate(batch["image"])
    tokens = outputs["tokens"].numpy()
    logits = captioner.logits(batch["image"], tokens)
    log_probs = tf.nn.log_softmax(logits).numpy()
    for row in range(B):
        ended = False
        for t in range(L):
            if ended:
                assert tokens[row, t] == 0
                assert outputs["log_probs"][row, t] == 0
                continue
            assert tokens[row, t] == np.argmax(log_probs[row, t])
            np.testing.assert_allclose(
                outputs["log_probs"][row, t],
                log_probs[row, t].max(),
                rtol=1e-4,
            )
            ended = tokens[row, t] == 1


def test_fit_learns_and_a_saved_captioner_is_the_same(batch, tmp_path):
    captioner = make_captioner()
    captioner.compile(keras.optimizers.Adam(3e-3))
    data = tf.data.Dataset.from_tensors(batch).repeat(30)
    history = captioner.fit(data, epochs=2, verbose=0).history["loss"]
    assert history[1] < 0.7 * history[0]
    captioner.save(tmp_path / "captioner.keras")
    loaded = keras.saving.load_model(tmp_path / "captioner.keras")
    np.testing.assert_array_equal(
        loaded.logits(batch["image"], batch["labels"]),
        captioner.logits(batch["image"], batch["labels"]),
    )
    assert loaded.get_config() == captioner.get_config()


def test_evaluate_leaves_padding_out(batch):
    captioner = make_captioner()
    captioner.compile()
    masked = {**batch, "_mask": tf.constant([1.0, 1.0, 0.0, 0.0])}
    some = {k: v[:2] for k, v in batch.items()}
    results = [
        captioner.evaluate(
            tf.data.Dataset.from_tensors(b), verbose=0, return_dict=True
        )
        for b in (masked, some)
    ]
    assert results[0] == pytest.approx(results[1], rel=1e-5)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"masked_pred_prob": 1.5}, "masked_pred_prob=1.5"),
        ({"masking_ratio": "1"}, "masking_ratio='1'"),
        ({"seed": 0.5}, "seed=0.5"),
        ({"visual_tokens_kept": 0.0}, "> 0 and <= 1.*visual_tokens_kept=0.0"),
    ],
)
def test_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_captioner(**kwargs)


def test_refuses_parts_that_do_not_fit():
    encoder = VisionEncoder(num_layers=1, patch_size=8, image_size=16, **SMALL)
    narrow = {**SMALL, "hidden_dim": 8}
    with pytest.raises(ValueError, match="encoder_dim=8, hidden_dim=16"):
        Captioner(
            encoder, TextDecoder(V, L, num_layers=1, encoder_dim=8, **narrow)
        )
    special = SpecialTokens()
    unmasked = TextDecoder(V, L, num_layers=1, special_tokens=special, **SMALL)
    with pytest.raises(ValueError, match="mask=None"):
        Captioner(encoder, unmasked)


def test_a_decoder_of_another_width_reads_the_encoders():
    encoder = VisionEncoder(num_layers=1, patch_size=8, image_size=16, **SMALL)
    narrow = TextDecoder(V, L, num_layers=1, **{**SMALL, "hidden_dim": 8})
    captioner = Captioner(encoder, narrow)
    captioner.build()
    again = Captioner.from_config(captioner.get_config())
    assert again.text_decoder.encoder_dim == narrow.encoder_dim == 16
    logits = captioner.logits(np.zeros((1, 16, 16, 3)), [[2, 1] + [0] * 5])
    assert logits.shape == (1, L, V)
