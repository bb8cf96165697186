"""Scores of samples against pycocoevalcap, and the gradient of the reward."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from conftest import two_devices

from cappa_tf.models.losses import bleu, cider
from cappa_tf.saving.run_folder import load_model
from cappa_tf.training import train
from cappa_tf.training.distribution.strategies import make_strategy
from cappa_tf.training.optimizers.sgd import SGD

V, L = 7, 8


def captions(random, shape, length=L):
    """Random token ids, each caption of a random length, eos (1) last."""
    tokens = random.randint(2, 6, (*shape, length))
    ends = random.randint(1, length, shape)[..., None]
    places = np.arange(length)
    tokens = np.where(places == ends, 1, tokens)
    return np.where(places > ends, 0, tokens).astype("int32")


def counted(references):
    frequencies = cider.count_documents([*references], pad=0)
    return tf.constant(frequencies, tf.float32), tf.constant(
        float(len(references))
    )


def words(tokens):
    return " ".join(f"t{token}" for token in tokens if token != 0)


def test_cider_equals_pycocoevalcap():
    """Of tokens as words, with the references as the corpus."""
    scorer = pytest.importorskip(
        "pycocoevalcap.cider.cider", reason="pip install '.[eval]'"
    )
    random = np.random.RandomState(0)
    references = captions(random, (20, 5))
    found = captions(random, (20, 3), L - 1)
    found[0, 0] = references[0, 0, : L - 1]
    scores = cider.cider_d(found, references, *counted(references), pad=0)

    wanted = {i: [*map(words, some)] for i, some in enumerate(references)}
    for sample in range(3):
        texts = {i: [words(some[sample])] for i, some in enumerate(found)}
        _, each = scorer.Cider().compute_score(wanted, texts)
        np.testing.assert_allclose(scores[:, sample], each, rtol=1e-4)


def test_bleu_has_the_counts_of_pycocoevalcap():
    """With one match and one n-gram more for 2 to 4 tokens."""
    scorer = pytest.importorskip(
        "pycocoevalcap.bleu.bleu_scorer", reason="pip install '.[eval]'"
    )
    random = np.random.RandomState(0)
    references = captions(random, (30, 3))
    found = captions(random, (30, 2), L - 1)
    found[0, 0] = references[0, 0, : L - 1]
    scores = bleu.bleu_4(found, references, pad=0)
    more = np.array([0, 1, 1, 1])
    for image, some in enumerate(found):
        cooked = scorer.cook_refs([*map(words, references[image])], "closest")
        for sample, tokens in enumerate(some):
            counts = scorer.cook_test(words(tokens), cooked, "closest")
            precisions = (counts["correct"] + more) / (counts["guess"] + more)
            closest = min(
                cooked[0], key=lambda n: (abs(n - counts["testlen"]), n)
            )
            penalty = min(0.0, 1 - closest / counts["testlen"])
            wanted = np.prod(precisions) ** 0.25 * np.exp(penalty)
            np.testing.assert_allclose(scores[image, sample], wanted, rtol=1e-5)
    assert 0.0 < np.min(scores) < 0.5 < np.max(scores) <= 1.0


def test_a_reference_of_padding_does_not_count():
    random = np.random.RandomState(1)
    references, found = captions(random, (4, 2)), captions(random, (4, 3))
    table = counted(references)
    more = np.concatenate([references, np.zeros((4, 1, L), "int32")], axis=1)
    np.testing.assert_array_equal(
        bleu.bleu_4(found, more, pad=0), bleu.bleu_4(found, references, pad=0)
    )
    alone = bleu.bleu_4(found, np.zeros((4, 1, L), "int32"), pad=0)
    np.testing.assert_array_equal(alone, 0.0)
    np.testing.assert_array_equal(
        cider.cider_d(found, more, *table, pad=0),
        cider.cider_d(found, references, *table, pad=0),
    )
    alone = cider.cider_d(found, np.zeros((4, 1, L), "int32"), *table, pad=0)
    np.testing.assert_array_equal(alone, 0.0)


def test_until_captions_are_counted_all_ngrams_weigh_alike():
    random = np.random.RandomState(2)
    references, found = captions(random, (4, 2)), captions(random, (4, 3))
    table = tf.zeros([cider.ORDERS, cider.BUCKETS])
    scores = cider.cider_d(found, references, table, tf.zeros([]), pad=0)
    assert np.isfinite(scores).all() and np.std(scores) > 0.0
    whole = np.array([[[2, 3, 4, 5, 2, 1, 0, 0]]], "int32")
    itself = cider.cider_d(whole, whole, table, tf.zeros([]), pad=0)
    np.testing.assert_allclose(itself, [[10.0]], rtol=1e-5)


@pytest.fixture(name="batch")
def _batch():
    random = np.random.RandomState(0)
    return {
        "image": tf.constant(random.uniform(-1, 1, (3, 16, 16, 3)), tf.float32),
        "labels": tf.constant(captions(random, (3, 2))),
        "index": tf.range(3, dtype=tf.int64),
    }


def make(batch, **kwargs):
    keras.utils.set_random_seed(0)
    model = tiny.make_self_critical(V, **kwargs)
    model.build()
    random = np.random.RandomState(1)
    for variable in model.trainable_variables:
        variable.assign(random.normal(0, 0.3, variable.shape))
    frequencies, documents = counted(batch["labels"].numpy())
    model.rarity.frequencies.assign(frequencies)
    model.rarity.documents.assign([documents])
    return model


def gradients(model, batch):
    values = [v.value for v in model.trainable_variables]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(values)
        losses = model.example_losses(batch, training=True)
    zero = tf.UnconnectedGradients.ZERO
    found = tape.gradient(losses.loss, values, unconnected_gradients=zero)
    return losses, [tf.convert_to_tensor(g).numpy() for g in found]


@pytest.mark.parametrize("bleu_weight", [0.0, 3.0])
def test_the_gradient_is_that_of_the_expected_reward(batch, bleu_weight):
    """Mean over samples of (reward - mean of the others) * grad(-log p)."""
    model = make(batch, num_samples=6, bleu_weight=bleu_weight)
    losses, found = gradients(model, batch)
    seeds = model._example_seeds(batch, True)
    samples = model._sample(model.encode(batch["image"]), seeds)
    rewards = cider.cider_d(
        samples, batch["labels"], *counted(batch["labels"].numpy()), pad=0
    ).numpy()
    assert rewards.std() > 0.1
    mean, _ = losses.metrics["sampled/cider"]
    np.testing.assert_allclose(mean, rewards.mean(1), rtol=1e-5)
    assert ("sampled/bleu_4" in losses.metrics) == bool(bleu_weight)
    if bleu_weight:
        scores = bleu.bleu_4(samples, batch["labels"], pad=0).numpy()
        mean, _ = losses.metrics["sampled/bleu_4"]
        np.testing.assert_allclose(mean, scores.mean(1), rtol=1e-5)
        rewards += bleu_weight * scores
    advantage = np.stack(
        [
            rewards[:, i] - np.delete(rewards, i, 1).mean(1)
            for i in range(rewards.shape[1])
        ],
        axis=1,
    )
    values = [v.value for v in model.trainable_variables]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(values)
        logits = tf.stack(
            [
                model.logits(batch["image"], samples[:, i])
                for i in range(rewards.shape[1])
            ],
            axis=1,
        )
        log_probs = -tf.nn.sparse_softmax_cross_entropy_with_logits(
            samples, logits
        )
        real = tf.cast(samples != 0, tf.float32)
        likelihood = tf.reduce_sum(log_probs * real, -1)
        wanted = -tf.reduce_sum(likelihood * advantage) / rewards.shape[1]
    zero = tf.UnconnectedGradients.ZERO
    expected = tape.gradient(wanted, values, unconnected_gradients=zero)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            one, tf.convert_to_tensor(other), rtol=1e-3, atol=1e-5
        )


def test_samples_belong_to_their_example(batch):
    """So they are the same in microbatches, on replicas and resumed."""
    model = make(batch, num_samples=2)
    seeds = model._example_seeds(batch, True)
    encoded = model.encode(batch["image"])
    together = model._sample(encoded, seeds).numpy()
    alone = model._sample(encoded[1:2], seeds[1:2]).numpy()
    np.testing.assert_array_equal(alone, together[1:2])
    assert (together[:, 0] != together[:, 1]).any()


def test_the_captioning_loss_is_added(batch):
    plain, only = make(batch, num_samples=0), make(batch, num_samples=2)
    both = make(batch, num_samples=2, captioning_weight=0.5)
    _, of_captions = gradients(plain, batch)
    _, of_samples = gradients(only, batch)
    losses, found = gradients(both, batch)
    assert "sampled/cider" in losses.metrics
    of_both = (
        only.example_losses(batch, True).counts["tokens"]
        + plain.example_losses(batch, True).counts["tokens"]
    )
    np.testing.assert_array_equal(losses.counts["tokens"], of_both)
    assert "autoregressive/loss" in losses.metrics
    for one, captioning, sampled in zip(
        found, of_captions, of_samples, strict=True
    ):
        np.testing.assert_allclose(
            one, 0.5 * captioning + sampled, rtol=1e-3, atol=1e-5
        )


def test_training_raises_the_reward(batch):
    model = make(batch, num_samples=16, bleu_weight=1.0)
    optimizer = keras.optimizers.Adam(0.02)
    optimizer.build(model.trainable_variables)

    @tf.function(autograph=False, jit_compile=True)
    def step(index):
        with tf.GradientTape() as tape:
            tape.watch([v.value for v in model.trainable_variables])
            losses = model.example_losses({**batch, "index": index}, True)
            loss = tf.reduce_mean(losses.loss)
        found = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(
            [tf.convert_to_tensor(g) for g in found],
            model.trainable_variables,
        )
        return tf.reduce_mean(losses.metrics["sampled/cider"][0])

    rewards = [
        float(step(tf.range(3, dtype=tf.int64) + 3 * i)) for i in range(40)
    ]
    assert np.mean(rewards[-5:]) > 2 * np.mean(rewards[:5])


def test_a_run_counts_once_and_resumes_bit_for_bit(tmp_path):
    size = tiny.vocabulary(tmp_path)[1]
    options = {
        "model": lambda: tiny.make_self_critical(
            size, dropout=0.1, num_samples=2
        ),
        "train_data": tiny.Data(tmp_path, captions=2),
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tiny.run(tmp_path, **options, workdir=str(whole), total_steps=4)
    for steps in (2, 4):
        tiny.run(tmp_path, **options, workdir=str(parts), total_steps=steps)
    log = (parts / "train.log").read_text()
    assert log.count("n-grams counted in the captions of 32 images") == 1
    assert "cider " in log and "resuming from" in log
    one, other = load_model(whole), load_model(parts)
    assert float(one.rarity.documents[0]) == 32.0
    for x, y in zip(one.weights, other.weights, strict=True):
        np.testing.assert_array_equal(x, y)


def test_replicas_and_microbatches_make_the_same_step(tmp_path, monkeypatch):
    size = tiny.vocabulary(tmp_path)[1]
    found = []
    for name, strategy, options in (
        ("plain", make_strategy("one"), {}),
        ("replicas", two_devices(), {}),
        ("microbatches", make_strategy("one"), {"accumulation_steps": 2}),
    ):
        monkeypatch.setattr(train, "make_strategy", lambda *_, s=strategy: s)
        tiny.run(
            tmp_path,
            model=lambda: tiny.make_self_critical(size, num_samples=2),
            optimizer=lambda: SGD(learning_rate=0.1, momentum_dtype="float32"),
            train_data=tiny.Data(tmp_path, captions=2),
            workdir=str(tmp_path / name),
            total_steps=2,
            **options,
        )
        found.append(load_model(tmp_path / name).weights)
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_samples": 1}, "0 or at least 2"),
        ({"masked_pred_prob": 1.0}, "masked_pred_prob=1.0"),
        ({"captioning_weight": -1.0}, "captioning_weight"),
        ({"bleu_weight": -1.0}, "bleu_weight"),
    ],
)
def test_what_cannot_work_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny.make_self_critical(V, **kwargs)


def test_prompts_are_refused():
    class Prompted:
        prompts = ("caption:",)

    with pytest.raises(ValueError, match="prompt"):
        tiny.make_self_critical(V).check_data(Prompted(), "train_data")
