"""Masked diffusion captioning: masks, weights, evaluation and decoding."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from random_captioner import B, L, V, make_captioner, make_images

from cappa_tf.models import stateless_random

MASK = V


@pytest.fixture(scope="module")
def captioner():
    return make_captioner(masked_pred_prob=1.0, masking_ratio=(0.0, 1.0))


@pytest.fixture(scope="module")
def batch():
    random = np.random.RandomState(0)
    labels = random.randint(2, V, (B, 2, L))
    for row, length in enumerate((2, 4, 7, 5)):
        labels[row, :, length - 1] = 1
        labels[row, :, length:] = 0
    return {
        "image": tf.constant(make_images()),
        "labels": tf.constant(labels, tf.int32),
        "index": tf.range(10, 10 + B, dtype=tf.int64),
    }


def log_probs_of(captioner, images, inputs):
    """Log-probabilities [N, L, V] of all tokens, given masked inputs."""
    decoder = captioner.text_decoder
    memory = decoder.project_memory(captioner.encode(images))
    everywhere = tf.fill(tf.shape(inputs)[:1], True)
    hidden = decoder(inputs, memory, parallel=everywhere)
    return tf.nn.log_softmax(decoder.logits(hidden)).numpy()


def test_the_loss_is_that_of_the_masked_tokens_divided_by_the_ratio(
    captioner, batch
):
    flat = tf.reshape(batch["labels"], [-1, L])
    seeds = captioner._caption_seeds(
        stateless_random.example_seeds(captioner.seed, batch["index"]), 2
    )
    inputs, predicted, weight = captioner._decoder_inputs(
        flat, tf.fill([2 * B], True), seeds
    )
    labels = flat.numpy()
    masked = predicted.numpy() & (labels != 0)
    np.testing.assert_array_equal(predicted, inputs == MASK)
    log_probs = log_probs_of(captioner, batch["image"], inputs)
    nll = -np.take_along_axis(log_probs, labels[..., None], -1)[..., 0]
    nll = np.where(masked, nll, 0.0).sum(-1)
    per_caption = nll * weight.numpy() / np.sum(labels != 0, -1)
    parts = captioner.compute_losses(batch)
    np.testing.assert_allclose(
        parts["loss"], per_caption.reshape(B, 2).mean(-1), rtol=1e-5
    )
    np.testing.assert_allclose(
        parts["nll"], nll.reshape(B, 2).sum(-1), rtol=1e-5
    )
    np.testing.assert_array_equal(
        parts["predicted"], masked.reshape(B, -1).sum(-1)
    )
    np.testing.assert_array_equal(
        parts["tokens"], np.sum(batch["labels"] != 0, axis=(1, 2))
    )


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.5, 0.8)])
def test_ratios_are_uniform_and_masks_independent(low, high):
    captioner = make_captioner(masked_pred_prob=1.0, masking_ratio=(low, high))
    count, length = 4000, 8
    seeds = stateless_random.example_seeds(0, tf.range(count, dtype=tf.int64))
    labels = tf.fill([count, length], 5)
    inputs, predicted, weight = captioner._decoder_inputs(
        labels, tf.fill([count], True), seeds
    )
    np.testing.assert_array_equal(inputs, np.where(predicted, MASK, 5))
    ratio = 1.0 / weight.numpy()
    assert low < ratio.min() and ratio.max() <= high + 1e-6
    quartiles = low + (high - low) * np.array([0.25, 0.5, 0.75])
    np.testing.assert_allclose(
        np.quantile(ratio, [0.25, 0.5, 0.75]), quartiles, atol=0.03
    )
    # Given its ratio r, the number of masked positions has mean L r and
    # variance L r (1 - r), and no position is masked more often.
    masked = predicted.numpy()
    score = (masked.sum(-1) - length * ratio) / np.sqrt(
        length * ratio * (1.0 - ratio) + 1e-9
    )
    assert abs(score.mean()) < 0.1 and abs(np.square(score).mean() - 1) < 0.2
    np.testing.assert_allclose(masked.mean(0), ratio.mean(), atol=0.04)


def test_some_captions_may_be_predicted_left_to_right(batch):
    """They are a Cap captioner's, whatever the others' masks are."""
    mixed = make_captioner(masked_pred_prob=0.5, masking_ratio=(0.0, 1.0))
    batch = {k: tf.repeat(v, 8, axis=0) for k, v in batch.items()}
    batch["index"] = tf.range(8 * B, dtype=tf.int64)
    losses = mixed.compute_losses(batch)
    parallel = losses["parallel"].numpy() == 1
    assert 0 < parallel.sum() < 8 * B
    causal = make_captioner(masked_pred_prob=0.0).compute_losses(batch)
    for name in ("loss", "nll", "predicted", "tokens"):
        np.testing.assert_allclose(
            losses[name][~parallel], causal[name][~parallel], rtol=1e-5
        )
    assert np.all(losses["predicted"] <= losses["tokens"])
    assert mixed.left_to_right
    assert mixed.score_kinds == ("autoregressive", "parallel", "blind")
    assert mixed.example_losses(batch, False).metrics.keys() == {
        "nll_per_token"
    }


def test_evaluation_masks_a_caption_always_alike(captioner, batch):
    """Whatever its batch is, and however long the padding."""
    one = captioner.compute_losses(batch, training=False)
    order = [2, 0, 3, 1]
    other = {k: tf.gather(v, order)[:3] for k, v in batch.items()}
    del other["index"]
    other = captioner.compute_losses(other, training=False)
    for name, values in one.items():
        expected = tf.gather(values, order)[:3]
        np.testing.assert_allclose(other[name], expected, rtol=1e-5)
    flat = tf.reshape(batch["labels"][:2], [-1, L])
    seeds = [
        captioner._seeds_of_captions(some, some != 0)
        for some in (flat, flat[:, :4])
    ]
    np.testing.assert_array_equal(*seeds)
    assert len({*seeds[0].numpy().tolist()}) == 4


@pytest.mark.parametrize(
    ("share", "kinds"),
    [
        (0.0, ("autoregressive", "blind")),
        (0.5, ("autoregressive", "parallel", "blind")),
        (1.0, ("parallel",)),
    ],
)
def test_texts_are_ranked_as_the_captioner_was_trained(share, kinds):
    assert make_captioner(masked_pred_prob=share).score_kinds == kinds


def test_it_reports_what_it_is_trained_for(captioner, batch):
    assert captioner.score_kinds == ("parallel",)
    assert captioner.selection_metric == "loss"
    for training in (True, False):
        losses = captioner.example_losses(batch, training)
        assert losses.metrics.keys() == {"masked/nll_per_token"}
    # Not the shared one: compiled, it would have an optimizer to save.
    weights = captioner.get_weights()
    captioner = type(captioner).from_config(captioner.get_config())
    captioner.build()
    captioner.set_weights(weights)
    captioner.compile()
    figures = captioner.evaluate(
        tf.data.Dataset.from_tensors(batch), verbose=0, return_dict=True
    )
    assert figures["loss"] == pytest.approx(
        np.mean(captioner.compute_losses(batch, False)["loss"]), rel=1e-5
    )


@pytest.mark.parametrize("jit_compile", [False, True])
def test_it_generates_by_filling_one_mask_after_the_other(
    captioner, jit_compile
):
    images = tf.constant(make_images())
    generate = tf.function(
        lambda images: captioner.generate(images, L - 1),
        jit_compile=jit_compile,
        autograph=False,
    )
    found = generate(images)
    tokens = found["tokens"].numpy()
    assert tokens.shape == (B, L - 1)
    filled = np.full((B, L), MASK)
    ended = np.zeros(B, bool)
    for i in range(L - 1):
        log_probs = log_probs_of(captioner, images, filled)[:, i]
        best = np.where(ended, 0, log_probs.argmax(-1))
        np.testing.assert_array_equal(tokens[:, i], best)
        np.testing.assert_allclose(
            found["log_probs"][:, i],
            np.where(ended, 0.0, log_probs.max(-1)),
            rtol=1e-4,
        )
        filled[:, i] = best
        ended |= best == 1


def test_a_saved_one_is_the_same(captioner, batch, tmp_path):
    captioner.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.get_config() == captioner.get_config()
    for name, value in captioner.compute_losses(batch).items():
        np.testing.assert_array_equal(loaded.compute_losses(batch)[name], value)


@pytest.mark.parametrize(
    "ratio", [(0.5, 0.5), (0.0, 2.0), (1.0,), (0, "1"), [0.9, 0.1], "1"]
)
def test_refuses(ratio):
    with pytest.raises(ValueError, match="masking_ratio="):
        make_captioner(masking_ratio=ratio)
