"""Augmentation of images in training, independent for each example.

Dimensions:
    B: batch size.
    h, w: height and width of an image before augmentation.
    H, W: height and width the model takes.
"""

import tensorflow as tf

from cappa_tf.data.stream import stateless_random


def augment(
    images,
    size,
    seed,
    index,
    flip=False,
    crop_scale=None,
    crop_aspect=(0.75, 4 / 3),
    shift=0,
):
    """Randomly crops, shifts and flips each example of a batch.

    Crop and shift choose a box of the image, flips mirror it, and one bilinear
    operation crops all boxes. Without boxes nothing is resampled.

    Args:
        images: uint8 [B, h, w, 3].
        size: (H, W) of the result.
        seed: Scalar integer.
        index: int64 [B], position of each example in the training stream.
        flip: Whether to mirror half of the examples, on average.
        crop_scale: (min, max) fraction of the area to crop, or None.
        crop_aspect: (min, max) width / height of the crop, where 1 is the
            image's own.
        shift: Maximum number of pixels by which to shift the image in either
            direction, with reflection at the border. Not together with
            crop_scale.

    Returns:
        [B, H, W, 3] in 0..255: uint8 if nothing is resampled, else float32.
    """
    flips = None
    if flip:
        flips = (
            stateless_random.uniform(seed, stateless_random.FLIP, index, 1)[
                :, 0
            ]
            < 0.5
        )
    if crop_scale is None and not shift and images.shape[1:3] == tuple(size):
        if flip:
            rows = tf.where(flips)
            mirrored = tf.gather_nd(images, rows)[:, :, ::-1]
            images = tf.tensor_scatter_nd_update(images, rows, mirrored)
        return images
    batch = tf.shape(index)[0]
    top, left = tf.zeros([batch]), tf.zeros([batch])
    bottom, right = tf.ones([batch]), tf.ones([batch])
    if crop_scale is not None:
        numbers = stateless_random.uniform(
            seed, stateless_random.CROP, index, 4
        )
        top, left, bottom, right = random_boxes(
            numbers, crop_scale, crop_aspect
        )
    elif shift:
        images, top, left, bottom, right = _random_shift(
            images, seed, index, shift
        )
    if flip:
        left, right = (
            tf.where(flips, right, left),
            tf.where(flips, left, right),
        )
    # The tiny margin prevents rounding from moving a border pixel outside of
    # the image, where the operation would fill in a constant.
    boxes = tf.stack([top, left, bottom, right], axis=1) * (1 - 1e-6)  # [B, 4]
    return tf.image.crop_and_resize(images, boxes, tf.range(batch), size)


def random_boxes(numbers, scale, aspect):
    """Random parts of images.

    Args:
        numbers: float32 [B, 4], uniform.
        scale: (min, max) fraction of the area.
        aspect: (min, max) width / height, relative to the image's.

    Returns:
        Top, left, bottom and right in 0..1, each [B].
    """
    area = scale[0] + numbers[:, 0] * (scale[1] - scale[0])
    low, high = tf.math.log(float(aspect[0])), tf.math.log(float(aspect[1]))
    ratio = tf.exp(low + numbers[:, 1] * (high - low))
    height = tf.minimum(tf.sqrt(area / ratio), 1.0)
    width = tf.minimum(tf.sqrt(area * ratio), 1.0)
    top = numbers[:, 2] * (1.0 - height)
    left = numbers[:, 3] * (1.0 - width)
    return top, left, top + height, left + width


def _random_shift(images, seed, index, shift):
    """Pads the images by reflection and samples whole-pixel boxes."""
    pad = [[0, 0], [shift, shift], [shift, shift], [0, 0]]
    height, width = images.shape[1], images.shape[2]
    images = tf.pad(images, pad, mode="REFLECT")
    u = stateless_random.uniform(seed, stateless_random.SHIFT, index, 2)
    start = tf.floor(u * (2 * shift + 1))  # [B, 2] in 0..2 * shift
    # `crop_and_resize` counts from the first pixel's center to the last's.
    rows, columns = height + 2 * shift - 1, width + 2 * shift - 1
    top, left = start[:, 0] / rows, start[:, 1] / columns
    bottom = (start[:, 0] + height - 1) / rows
    right = (start[:, 1] + width - 1) / columns
    return images, top, left, bottom, right
