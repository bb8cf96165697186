"""Augmentation of training images with KerasCV (the extra "transfer").

KerasCV computes the pixels. Its layers would take their random choices from
generators with a state, so that a resumed run would see other images; here
they get the choices as arguments, from `stateless_random.Draws`. The classes
are augmentations as described in `mixing.py`.

Dimensions:
    B: batch size.
    N: images that get the same operation.
    H, W: height and width of the images.
"""

import contextlib
import functools

import keras
import tensorflow as tf

from cappa_tf.data.images.augmentation import random_boxes
from cappa_tf.data.images.mixing import mix
from cappa_tf.utils import arguments

_RANGE = (0.0, 255.0)
# Random numbers of an operation of RandAugment: whether, which, and how.
_NUMBERS = 2 + 4
# Nothing is drawn from the layers' generators. Without a seed they would have
# one that TensorFlow's deterministic mode forbids.
_UNUSED_SEED = 1


def _layers():
    """The module keras_cv.layers, which takes seconds to import."""
    arguments.check_extra("Augmentation with KerasCV", "transfer", "keras_cv")
    from keras_cv import layers

    return layers


@contextlib.contextmanager
def _float32():
    """Layers made inside compute in float32, whatever the run's precision."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(policy)


class RandAugment:
    """A few random operations on each image, such as contrast and shear.

    The operations, their strengths and their distributions are those of
    `keras_cv.layers.RandAugment`.

    Args:
        count: Operations on each image.
        magnitude: Mean strength, in [0, 1].
        magnitude_stddev: Its standard deviation, in [0, 1].
        rate: Probability of each operation; 10/11 as if one of eleven
            changed nothing.
        geometric: Whether images are sheared and shifted, too.

    References: arXiv 1909.13719; keras_cv.layers.RandAugment.
    """

    mixes = crops = False

    def __init__(
        self,
        count=2,
        magnitude=0.3,
        magnitude_stddev=0.15,
        rate=10 / 11,
        geometric=True,
    ):
        arguments.check_counts(count=count)
        arguments.check_fraction(
            magnitude=magnitude, magnitude_stddev=magnitude_stddev, rate=rate
        )
        arguments.check_bool(geometric=geometric)
        self.count, self.rate = count, rate
        layers = _layers()
        with _float32():
            self._operations = layers.RandAugment.get_standard_policy(
                _RANGE,
                magnitude,
                magnitude_stddev,
                geometric=geometric,
                seed=_UNUSED_SEED,
            )

    def __call__(self, batch, draws):
        """Augments each image; `mixing.py` describes the batch."""
        numbers = draws.examples(self.count * _NUMBERS)
        numbers = tf.stack(tf.split(numbers, self.count, axis=1))
        # A loop, as the graph of all operations is large.
        image = tf.foldl(self._one, numbers, batch["image"])
        return {**batch, "image": image}

    def _one(self, images, numbers):
        """Applies one operation to each image, all of a kind at once."""
        total = len(self._operations)
        chosen = tf.cast(numbers[:, 1] * float(total), tf.int32)
        chosen = tf.where(numbers[:, 0] < self.rate, chosen, -1)
        for place, layer in enumerate(self._operations):
            rows = tf.where(chosen == place)
            images = tf.cond(
                tf.shape(rows)[0] > 0,
                lambda layer=layer, rows=rows, images=images: _on_rows(
                    layer, images, rows, numbers[:, 2:]
                ),
                lambda images=images: images,
            )
        return images


def _on_rows(layer, images, rows, numbers):
    """Applies a layer to some images [N, H, W, 3] of a batch [B, H, W, 3]."""
    some, numbers = (tf.gather_nd(x, rows) for x in (images, numbers))
    changed = _augment_images(layer)(
        some, transformations=_transformations(layer, numbers)
    )
    return tf.tensor_scatter_nd_update(images, rows, changed)


def _augment_images(layer):
    if isinstance(layer, _layers().Equalization):
        # It has an `if` on a tensor, which only AutoGraph understands.
        augment = tf.autograph.to_graph(layer.augment_images)
        return functools.partial(augment, layer)
    return layer.augment_images


def _transformations(layer, numbers):
    """What `layer.get_random_transformation_batch` would return.

    Args:
        layer: One of the layers of `RandAugment.get_standard_policy`.
        numbers: float32 [N, 4], uniform.
    """
    layers = _layers()

    def per_pixel(sampler, number):
        return tf.reshape(_sample(sampler, numbers[:, number]), [-1, 1, 1, 1])

    def signed(sampler, number):
        value = _sample(sampler, numbers[:, number])
        return tf.where(numbers[:, number + 1] < 0.5, value, -value)[:, None]

    def between(low, high, number):
        return (low + numbers[:, number] * (high - low))[:, None]

    if isinstance(layer, layers.AutoContrast | layers.Equalization):
        return None
    if isinstance(layer, layers.Solarization):
        return {
            "additions": per_pixel(layer.addition_factor, 0),
            "thresholds": per_pixel(layer.threshold_factor, 1),
        }
    if isinstance(layer, layers.RandomBrightness):
        return per_pixel(layer.factor, 0) * (_RANGE[1] - _RANGE[0])
    if isinstance(
        layer, layers.RandomColorDegeneration | layers.RandomContrast
    ):
        return per_pixel(layer.factor, 0)
    if isinstance(layer, layers.RandomShear):
        return {
            "shear_x": signed(layer.x_factor, 0),
            "shear_y": signed(layer.y_factor, 2),
        }
    if isinstance(layer, layers.RandomTranslation):
        return {
            "height_translations": between(
                layer.height_lower, layer.height_upper, 0
            ),
            "width_translations": between(
                layer.width_lower, layer.width_upper, 1
            ),
        }
    raise ValueError(
        "RandAugment of KerasCV 0.9 has no other operation. Received: "
        f"{type(layer).__name__}"
    )


def _sample(sampler, numbers):
    """Values of a KerasCV `FactorSampler`, from uniform numbers [N]."""
    config = sampler.get_config()
    if "mean" in config:
        # Strictly between 0 and 1, where the quantiles are infinite.
        numbers = numbers * (1.0 - 2.0**-23) + 2.0**-24
        normal = tf.math.ndtri(numbers)
        value = config["mean"] + config["stddev"] * normal
        return tf.clip_by_value(value, config["min_value"], config["max_value"])
    if "lower" in config:
        return config["lower"] + numbers * (config["upper"] - config["lower"])
    return tf.fill(tf.shape(numbers), float(config["value"]))


class RandomCropAndResize:
    """A random part of each image, resized to the size of the model.

    As `CaptionDataset.crop_scale`, which crops all images of a batch at once
    and is faster. Images are decoded at `CaptionDataset.decode_size`.

    Args:
        image_size: Side of the result in pixels, or (height, width).
        scale: (min, max) fraction of the area to crop.
        aspect: (min, max) width / height of the crop, relative to the image's.
    """

    mixes, crops = False, True

    def __init__(self, image_size, scale=(0.05, 1.0), aspect=(0.75, 4 / 3)):
        size = arguments.height_width("image_size", image_size)
        arguments.check_interval("scale", scale, 1.0)
        arguments.check_interval("aspect", aspect)
        self.scale, self.aspect = scale, aspect
        with _float32():
            self._layer = _layers().RandomCropAndResize(
                size,
                crop_area_factor=scale,
                aspect_ratio_factor=aspect,
                seed=_UNUSED_SEED,
            )

    def __call__(self, batch, draws):
        """Crops each image; `mixing.py` describes the batch."""
        boxes = random_boxes(draws.examples(4), self.scale, self.aspect)
        image = tf.map_fn(
            lambda pair: self._layer.augment_image(
                pair[0], transformation=pair[1][tf.newaxis]
            ),
            (batch["image"], tf.stack(boxes, axis=1)),
            fn_output_signature=tf.float32,
        )
        return {**batch, "image": image}


class RandomCutout:
    """Covers a random rectangle of each image with gray.

    The rectangle may reach over the border, and is cut off there.

    Args:
        height: (min, max) fraction of the image's height.
        width: (min, max) fraction of its width.

    References: arXiv 1708.04552; keras_cv.layers.RandomCutout.
    """

    mixes = crops = False

    def __init__(self, height=(0.0, 0.5), width=(0.0, 0.5)):
        for name, value in (("height", height), ("width", width)):
            arguments.check_interval(name, value, 1.0, zero=True)
        self.height, self.width = height, width
        with _float32():
            self._layer = _layers().RandomCutout(
                height, width, fill_value=sum(_RANGE) / 2, seed=_UNUSED_SEED
            )

    def __call__(self, batch, draws):
        """Covers a part of each image; `mixing.py` describes the batch."""
        rows, columns = batch["image"].shape[1:3]
        numbers = draws.examples(4)
        height, width = (
            _whole(tf.math.ceil(_between(part, numbers[:, i]) * side))
            for i, (part, side) in enumerate(
                ((self.height, rows), (self.width, columns))
            )
        )
        image = self._layer.augment_images(
            batch["image"],
            transformations={
                "centers_y": _whole(numbers[:, 2] * rows),
                "centers_x": _whole(numbers[:, 3] * columns),
                "rectangles_height": height,
                "rectangles_width": width,
            },
        )
        return {**batch, "image": image}


class MixUp:
    """Mixup as in KerasCV: each example has a weight of its own.

    `mixing.Mixup` is that of the reference, and does not need KerasCV.

    Args:
        alpha: The weight is from Beta(alpha, alpha).

    Reference: keras_cv.layers.MixUp.
    """

    mixes, crops = True, False

    def __init__(self, alpha=0.2):
        arguments.check_number("alpha", alpha, exclusive=True)
        self.alpha = alpha
        with _float32():
            self._layer = _layers().MixUp(alpha, seed=_UNUSED_SEED)

    def __call__(self, batch, draws):
        """Mixes a batch; `mixing.py` describes it."""
        weights = draws.beta(self.alpha, per_example=True)
        # What `call` does to dense maps is what it does to images.
        image = self._layer._update_segmentation_masks(
            batch["image"], weights, _before(batch["image"])
        )
        return mix(batch, weights, image)


class CutMix:
    """Replaces a rectangle of each image by that of the image before it.

    The weight of a label is the fraction of pixels that its image has.
    (KerasCV also counts those of a rectangle that lie outside of the image.)

    Args:
        alpha: A rectangle has the area 1 - a for a from Beta(alpha, alpha).

    References: arXiv 1905.04899; keras_cv.layers.CutMix.
    """

    mixes, crops = True, False

    def __init__(self, alpha=1.0):
        arguments.check_number("alpha", alpha, exclusive=True)
        self.alpha = alpha
        with _float32():
            self._layer = _layers().CutMix(alpha, seed=_UNUSED_SEED)

    def __call__(self, batch, draws):
        """Mixes a batch; `mixing.py` describes it."""
        image = batch["image"]
        ratio = tf.sqrt(1.0 - draws.beta(self.alpha, per_example=True))
        numbers = draws.examples(2)
        sides, centers, replaced = [], [], 1.0
        for i, size in enumerate(image.shape[1:3]):
            side, center = _whole(ratio * size), _whole(numbers[:, i] * size)
            start = tf.cast(center, tf.float32) - tf.cast(side, tf.float32) / 2
            end = start + tf.cast(side, tf.float32)
            first, last = (
                tf.clip_by_value(tf.math.ceil(x), 0.0, float(size))
                for x in (start, end)
            )
            replaced *= (last - first) / size
            sides.append(side)
            centers.append(center)
        # What `call` does to dense maps is what it does to images.
        image = self._layer._update_segmentation_masks(
            image, _before(image), *centers, sides[1], sides[0]
        )
        return mix(batch, 1.0 - replaced, image)


def _before(images):
    """Number of the image before each of a batch, int32 [B]."""
    return tf.roll(tf.range(tf.shape(images)[0]), 1, axis=0)


def _between(interval, numbers):
    return interval[0] + numbers * (interval[1] - interval[0])


def _whole(x):
    return tf.cast(x, tf.int32)
