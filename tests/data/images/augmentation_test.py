"""Augmentation: crops, shifts and flips of each example."""

import numpy as np
import tensorflow as tf

from cappa_tf.data.images import augmentation

H, W = 24, 36


def _picture():
    """A smooth color image."""
    y, x = np.mgrid[0:H, 0:W]
    rgb = np.stack([y * 6, x * 4, 120 + y + x], axis=-1)
    return np.clip(rgb, 0, 255).astype(np.uint8)


def _batch(count=64):
    return tf.stack([_picture()] * count), tf.range(count, dtype=tf.int64)


def test_nothing_switched_on_changes_nothing():
    batch, index = _batch(4)
    same = augmentation.augment(batch, (H, W), 0, index)
    np.testing.assert_array_equal(same, batch)


def test_flips_mirror_about_half():
    batch, index = _batch()
    flipped = augmentation.augment(batch, (H, W), 0, index, flip=True).numpy()
    picture = _picture().astype(np.float32)
    same = np.abs(flipped - picture).max((1, 2, 3)) < 0.01
    mirrored = np.abs(flipped - picture[:, ::-1]).max((1, 2, 3)) < 0.01
    assert np.all(same ^ mirrored)
    assert 16 < mirrored.sum() < 48


def test_shift_moves_by_whole_pixels_within_bounds():
    batch, index = _batch()
    moved = augmentation.augment(batch, (H, W), 0, index, shift=2).numpy()
    padded = np.pad(_picture(), [(2, 2), (2, 2), (0, 0)], mode="reflect")
    seen = set()
    for image in moved:
        at = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if np.abs(image - padded[y : y + H, x : x + W]).max() < 0.05
        ]
        assert len(at) == 1
        seen.update(at)
    assert len(seen) > 12
    assert {y for y, _ in seen} == {x for _, x in seen} == set(range(5))


def test_crops_cover_the_stated_area():
    # An image whose pixel values are its coordinates shows what was cropped.
    y, x = np.mgrid[0:51, 0:51]
    grid = np.stack([y, x, y], -1).astype(np.uint8)
    index = tf.range(80, dtype=tf.int64)
    cut = augmentation.augment(
        tf.stack([grid] * 80),
        (11, 11),
        3,
        index,
        crop_scale=(0.3, 0.8),
        crop_aspect=(0.9, 1.1),
    ).numpy()
    height = cut[:, -1, 0, 0] - cut[:, 0, 0, 0]
    width = cut[:, 0, -1, 1] - cut[:, 0, 0, 1]
    area = height * width / 50**2
    assert area.min() > 0.29 and area.max() < 0.81
    assert area.min() < 0.36 and area.max() > 0.74
    ratio = width / height
    assert 0.89 < ratio.min() < 0.95 and 1.05 < ratio.max() < 1.11
    assert cut.min() >= 0 and cut.max() <= 50


def test_augmentation_follows_the_index_not_the_batch():
    batch, index = _batch(8)
    options = {"flip": True, "crop_scale": (0.5, 1.0)}
    whole = augmentation.augment(batch, (H, W), 1, index, **options)
    part = augmentation.augment(batch[:3], (H, W), 1, index[5:], **options)
    # Not bitwise, as vectorized logarithms round differently by lane.
    np.testing.assert_allclose(whole[5:], part, atol=1e-3)
    other = augmentation.augment(batch, (H, W), 2, index, **options)
    assert np.abs(whole - other).max() > 1
