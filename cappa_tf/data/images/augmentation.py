"""What is done to images in training, each by draws of its own.

Dimensions:
    B: batch size.
    h, w: height and width of an image as it is held.
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
    """Random crop, shift and flip of a batch, each example by its own draws.

    Crop and shift choose a box of the image, flips turn it around, and one
    bilinear operation cuts the boxes out. Without boxes nothing is resampled.

    Args:
        images: uint8 [B, h, w, 3].
        size: (H, W) of the result.
        seed: Scalar integer.
        index: int64 [B], position of each example in the training stream.
        flip: Whether to mirror every second example, on average.
        crop_scale: (least, most) fraction of the area to cut out, or None.
        crop_aspect: (least, most) width / height of the cut, where 1 is the
            image's own.
        shift: Most pixels to move the image in either direction; what
            comes in at the border is mirrored. Not together with crop_scale.

    Returns:
        [B, H, W, 3] in 0..255: uint8 where nothing is resampled, else float32.
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
        top, left, bottom, right = _random_boxes(
            seed, index, crop_scale, crop_aspect
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
    # The hair's breadth keeps rounding from putting a border pixel outside
    # the image, where the operation would fill in a constant.
    boxes = tf.stack([top, left, bottom, right], axis=1) * (1 - 1e-6)  # [B, 4]
    return tf.image.crop_and_resize(images, boxes, tf.range(batch), size)


def _random_boxes(seed, index, scale, aspect):
    """Top, left, bottom and right in 0..1 of a random cut, each [B]."""
    u = stateless_random.uniform(seed, stateless_random.CROP, index, 4)
    area = scale[0] + u[:, 0] * (scale[1] - scale[0])
    low, high = tf.math.log(float(aspect[0])), tf.math.log(float(aspect[1]))
    ratio = tf.exp(low + u[:, 1] * (high - low))
    height = tf.minimum(tf.sqrt(area / ratio), 1.0)
    width = tf.minimum(tf.sqrt(area * ratio), 1.0)
    top = u[:, 2] * (1.0 - height)
    left = u[:, 3] * (1.0 - width)
    return top, left, top + height, left + width


def _random_shift(images, seed, index, shift):
    """Mirrors a margin around the images and draws whole-pixel boxes."""
    pad = [[0, 0], [shift, shift], [shift, shift], [0, 0]]
    height, width = images.shape[1], images.shape[2]
    images = tf.pad(images, pad, mode="REFLECT")
    u = stateless_random.uniform(seed, stateless_random.SHIFT, index, 2)
    start = tf.floor(u * (2 * shift + 1))  # [B, 2] in 0..2 * shift
    # `crop_and_resize` counts from the first pixel's centre to the last's.
    rows, columns = height + 2 * shift - 1, width + 2 * shift - 1
    top, left = start[:, 0] / rows, start[:, 1] / columns
    bottom = (start[:, 0] + height - 1) / rows
    right = (start[:, 1] + width - 1) / columns
    return images, top, left, bottom, right
