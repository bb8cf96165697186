"""Augmentation with KerasCV, a function of (seed, example) alone."""

import numpy as np
import pytest
import small_run
import tensorflow as tf

pytest.importorskip("keras_cv", reason="pip install '.[transfer]'")

from cappa_tf.data.images import augmentation, mixing
from cappa_tf.data.images import keras_cv_augmentation as kcv
from cappa_tf.data.stream.stateless_random import Draws

B, H, W = 40, 12, 16


def images(count=B):
    x = np.random.default_rng(0).uniform(0, 255, (count, H, W, 3))
    return tf.constant(x, tf.float32)


def batch_of(image):
    count = len(image)
    return {
        "image": image,
        "label": tf.range(count, dtype=tf.int64),
        "index": tf.range(count, dtype=tf.int64),
    }


def draws(index, seed=0):
    return Draws(seed, tf.cast(index, tf.int64), tf.constant(0, tf.int64))


@pytest.fixture(scope="module")
def rand_augment():
    return kcv.RandAugment(count=2, magnitude=0.5)


def test_choices_have_the_form_and_range_of_keras_cv_s_own(rand_augment):
    """What the layers would draw, and what they get from us."""
    numbers = draws(range(B)).examples(4)
    kinds = set()
    for layer in rand_augment._operations:
        kinds.add(type(layer).__name__)
        given = kcv._transformations(layer, numbers)
        if given is None:
            continue
        own = layer.get_random_transformation_batch(B, images=images())
        tf.nest.assert_same_structure(own, given)
        # A thousand of theirs cover the range of forty of ours.
        many = layer.get_random_transformation_batch(1000, images=images())
        for ours, theirs, more in zip(
            *map(tf.nest.flatten, (given, own, many))
        ):
            assert ours.shape == theirs.shape
            slack = 0.05 * (np.max(more) - np.min(more)) + 1e-6
            assert np.min(ours) >= np.min(more) - slack
            assert np.max(ours) <= np.max(more) + slack
            spread = np.std(more)
            assert np.std(ours) == pytest.approx(spread, rel=0.5, abs=1e-6)
    assert len(kinds) == 8


def test_operations_are_the_examples_own(rand_augment):
    """The same in any batch; another seed gives other pixels."""
    index = np.arange(B)

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, H, W, 3]),
            tf.TensorSpec([None], tf.int64),
            tf.TensorSpec([], tf.int64),
        ],
        autograph=False,
    )
    def run(image, index, seed):
        batch = {"image": image, "label": index, "index": index}
        return rand_augment(batch, draws(index, seed))["image"]

    whole = run(images(), index, 0).numpy()
    part = run(images()[7:12], index[7:12], 0)
    np.testing.assert_allclose(part, whole[7:12], atol=0.02)
    changed = np.abs(whole - images()).max(axis=(1, 2, 3)) > 1.0
    # Each of two operations is left out with probability 1/11.
    assert changed.mean() > 0.9
    other = run(images(), index, 1)
    assert (np.abs(other - whole).max(axis=(1, 2, 3)) > 1.0).mean() > 0.9
    assert whole.min() >= 0.0
    assert whole.max() <= 255.0 + 1e-3


def test_crops_are_those_of_crop_scale():
    crop = kcv.RandomCropAndResize((6, 8), scale=(0.2, 0.9))
    found = crop(batch_of(images()), draws(range(B)))["image"]
    boxes = augmentation.random_boxes(
        draws(range(B)).examples(4), (0.2, 0.9), (0.75, 4 / 3)
    )
    wanted = tf.image.crop_and_resize(
        images(), tf.stack(boxes, axis=1), tf.range(B), (6, 8)
    )
    np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_cutout_covers_a_rectangle_with_gray():
    cutout = kcv.RandomCutout(height=(0.5, 0.5), width=(0.25, 0.25))
    found = cutout(batch_of(images()), draws(range(B)))["image"].numpy()
    covered = np.all(found == 127.5, axis=-1)
    np.testing.assert_array_equal(
        np.where(covered[..., None], 127.5, images()), found
    )
    rows, columns = covered.any(axis=2).sum(1), covered.any(axis=1).sum(1)
    np.testing.assert_array_equal(covered.sum((1, 2)), rows * columns)
    assert rows.max() == H // 2
    assert columns.max() == W // 4
    assert len({tuple(row) for row in covered.reshape(B, -1)}) > B // 2


def test_mixup_has_a_weight_for_each_example():
    image = images()
    found = kcv.MixUp(0.8)(batch_of(image), draws(range(B)))
    weights = found["mix_weight"].numpy()
    assert len(set(weights.tolist())) == B
    wanted = mixing.mix(batch_of(image), found["mix_weight"])
    np.testing.assert_allclose(found["image"], wanted["image"], atol=1e-3)


def test_cutmix_weighs_labels_by_the_pixels_that_are_left():
    value = tf.range(B, dtype=tf.float32)[:, None, None, None]
    image = tf.broadcast_to(value, (B, H, W, 3))
    found = kcv.CutMix()(batch_of(image), draws(range(B)))
    own = np.mean(found["image"] == image, axis=(1, 2, 3))
    np.testing.assert_allclose(found["mix_weight"], own, atol=1e-6)
    other = np.mean(found["image"] == np.roll(image, 1, axis=0), axis=(1, 2, 3))
    np.testing.assert_allclose(own + other, 1.0)
    assert own.std() > 0.1


def test_a_stream_resumes_bit_by_bit_with_all_of_them(tmp_path):
    small_run.write_labelled(tmp_path)

    def stream(count, **options):
        data = small_run.labelled(
            tmp_path, augmentations=small_run.all_augmentations(), flip=True
        )
        return list(data.train(8, **options).take(count).as_numpy_iterator())

    for wanted, found in zip(stream(4)[2:], stream(2, start_index=16)):
        assert wanted["image"].shape == (8, 16, 16, 3)
        for name, value in wanted.items():
            np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kcv.RandAugment(magnitude=2.0), "magnitude=2.0"),
        (lambda: kcv.RandAugment(count=0), "count=0"),
        (lambda: kcv.RandomCutout(height=0.5), "height=0.5"),
        (lambda: kcv.RandomCropAndResize(8, scale=(0, 1)), r"scale=\(0, 1\)"),
        (lambda: kcv.MixUp(0), "alpha=0"),
        (
            lambda: small_run.labelled(
                "nowhere",
                augmentations=[kcv.RandomCropAndResize(16)],
                crop_scale=(0.5, 1.0),
            ),
            "cropped once",
        ),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
