"""Mixtures of images: of a whole step, the same however it is divided."""

import numpy as np
import pytest
import small_run
import tensorflow as tf

from cappa_tf.data.images import keras_cv_augmentation, mixing
from cappa_tf.data.stream.stateless_random import Draws


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("labelled"))
    small_run.write_labelled(path)
    return path


def stream(folder, size, count, augmentations, **options):
    """The first batches of a training stream, as dicts of arrays."""
    data = small_run.labelled(folder, augmentations=augmentations, flip=True)
    found = data.train(size, seed=1, **options)
    return list(found.take(count).as_numpy_iterator())


@pytest.fixture(scope="module")
def whole(folder):
    """Four steps of eight examples on one device."""
    return stream(folder, 8, 4, [mixing.Mixup(0.8)])


def batch_of(count):
    images = np.random.default_rng(0).uniform(0, 255, (count, 4, 6, 3))
    return {
        "image": tf.constant(images, tf.float32),
        "label": tf.range(count, dtype=tf.int64),
        "index": tf.range(count, dtype=tf.int64),
    }


def draws(count, seed=0, place=0):
    index = tf.range(count, dtype=tf.int64)
    return Draws(seed, index, tf.constant(0, tf.int64), place)


def test_mixup_takes_one_weight_a_step_and_the_example_before():
    batch = batch_of(5)
    mixed = mixing.Mixup(0.8)(batch, draws(5))
    weight = mixed["mix_weight"].numpy()
    assert len(set(weight.tolist())) == 1
    assert 0.5 <= weight[0] < 1.0
    before = np.roll(batch["image"], 1, axis=0)
    wanted = weight[0] * batch["image"] + (1 - weight[0]) * before
    np.testing.assert_allclose(mixed["image"], wanted, rtol=1e-5)
    assert mixed["mix_label"].numpy().tolist() == [4, 0, 1, 2, 3]
    none = mixing.Mixup(0.0)(batch, draws(5))
    np.testing.assert_array_equal(none["image"], batch["image"])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_weights_have_the_beta_distribution(alpha):
    compute = tf.function(lambda: draws(2000).beta(alpha, per_example=True))
    found = compute().numpy()
    assert abs(found.mean() - 0.5) < 0.04
    variance = 1 / (4 * (2 * alpha + 1))
    assert found.var() == pytest.approx(variance, rel=0.15)


def test_one_of_several_is_chosen_for_each_step():
    class Marked(mixing.Mixup):
        def __init__(self, mark):
            super().__init__()
            self.mark = mark

        def __call__(self, batch, draws):
            found = super().__call__(batch, draws)
            return {**found, "mark": tf.constant(self.mark)}

    either = mixing.OneOf([Marked(0), Marked(1)])
    marks = [
        int(either(batch_of(2), draws(2, seed=seed))["mark"])
        for seed in range(40)
    ]
    assert 8 < sum(marks) < 32
    with pytest.raises(ValueError, match="must all mix"):
        mixing.OneOf([str])


def test_a_step_is_mixed_as_a_whole_by_however_many_devices(folder, whole):
    parts = stream(folder, 4, 4, [mixing.Mixup(0.8)], step_size=8)
    for name in whole[0]:
        np.testing.assert_array_equal(
            np.concatenate([b[name] for b in whole[:2]]),
            np.concatenate([b[name] for b in parts]),
        )
    assert whole[0]["mix_weight"][0] != whole[1]["mix_weight"][0]


def test_hosts_have_the_weight_of_the_step(folder, whole):
    mixup = [mixing.Mixup(0.8)]
    part = stream(folder, 4, 2, mixup, host=1, num_hosts=2)
    for one, host in zip(whole, part):
        np.testing.assert_array_equal(host["index"], one["index"][1::2])
        np.testing.assert_array_equal(
            host["mix_weight"], one["mix_weight"][1::2]
        )


def test_a_resumed_stream_is_the_same(folder, whole):
    resumed = stream(folder, 8, 2, [mixing.Mixup(0.8)], start_index=16)
    for wanted, found in zip(whole[2:], resumed, strict=True):
        for name, value in wanted.items():
            np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augmentations": [len]}, "must be augmentations"),
        ({"augmentations": [mixing.Mixup()] * 2}, "must be the last"),
        (
            {"augmentations": [mixing.Mixup()], "tokenizer": len},
            "captions cannot be mixed.*Received: Mixup",
        ),
    ],
)
def test_augmentations_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        small_run.labelled("nowhere", **options)


def test_features_are_not_those_of_augmented_images():
    data = small_run.labelled("nowhere", augmentations=[mixing.Mixup()])
    with pytest.raises(ValueError, match="CaptionDataset.augmentations"):
        data.check_unaugmented()


def test_without_keras_cv_an_augmentation_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"keras_cv: pip install.*transfer"):
        keras_cv_augmentation.RandAugment()
