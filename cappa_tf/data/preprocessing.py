"""Image preprocessing: image files to the input of a model.

The same object serves training, evaluation, captioning of files and serving.
It is saved with a model, and the one rebuilt from that yields the same pixels.

Dimensions:
    h, w: height and width of an image as it is stored.
    H, W: height and width the model takes.
"""

import dataclasses
import functools
import math

import tensorflow as tf

from cappa_tf.data.images import decode_resize, image_files
from cappa_tf.utils import arguments

RESIZE_MODES = ("squash", "resize_small_central_crop")
# Ratio of the resized length to that of the crop, if the shorter side is
# resized (and in the paper's evaluations of frozen features).
MARGIN = 256 / 224


@dataclasses.dataclass(frozen=True)
class ImagePreprocessing:
    """Decodes, rotates (EXIF), resizes, crops and normalizes images.

    Attributes:
        image_size: (H, W); one integer for both.
        resize: "squash" (the aspect ratio is lost, as in the recipe) or
            "resize_small_central_crop".
        resize_small: Length of the shorter side for the latter; by default
            256 / 224 of the longer side of image_size.
        antialias: Whether downsizing averages over all pixels.
        reduced_decode: Whether large JPEGs are decoded at 1/2, 1/4 or 1/8, the
            smallest scale that covers the requested size. False decodes all
            pixels and interpolates the four nearest ones, as in the recipe.
        max_pixels: Maximum size of an image, which is read from its header;
            None for no limit.
        squash_size: (H, W) to which "squash" resizes before the central crop;
            None for image_size, so that nothing is cropped.
    """

    image_size: int | tuple | list
    resize: str = "squash"
    resize_small: int | None = None
    antialias: bool = False
    reduced_decode: bool = True
    max_pixels: int | None = 25_000_000
    squash_size: tuple | list | None = None

    def __post_init__(self):
        size = arguments.height_width("image_size", self.image_size)
        arguments.check_choice(RESIZE_MODES, resize=self.resize)
        arguments.check_counts(
            optional=True,
            resize_small=self.resize_small,
            max_pixels=self.max_pixels,
        )
        small = self.resize_small or round(max(size) * MARGIN)
        squash_size = self.squash_size
        if squash_size is not None:
            squash_size = arguments.height_width("squash_size", squash_size)
            if squash_size[0] < size[0] or squash_size[1] < size[1]:
                raise ValueError(
                    "`squash_size` must be at least image_size. Received: "
                    f"squash_size={squash_size}, image_size={size}"
                )
            squash_size = None if squash_size == size else squash_size
        for name, value in (
            ("image_size", size),
            ("resize_small", small),
            ("squash_size", squash_size),
        ):
            object.__setattr__(self, name, value)

    @classmethod
    def from_json(cls, values):
        """Rebuilds the object from the dict of `to_json`.

        Args:
            values: A dict; "reduced_decode" is missing in runs older than the
                option, which were trained on full decodes.

        Raises:
            ValueError: If it does not describe such an object.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if (
            not isinstance(values, dict)
            or "image_size" not in values
            or not values.keys() <= names
        ):
            raise ValueError(
                "Image preprocessing must be an object with `image_size` and "
                f"some of {sorted(names)}. Received: {values!r}"
            )
        return cls(**{"reduced_decode": False, **values})

    def to_json(self):
        """Returns a dict of JSON values, for `from_json`."""
        values = dataclasses.asdict(self)
        for name in ("image_size", "squash_size"):
            if values[name] is None:
                del values[name]  # As in the files of runs without it.
            else:
                values[name] = list(values[name])
        return values

    def with_margin(self, margin):
        """Returns the same preprocessing with a margin that is cropped.

        Args:
            margin: Ratio of the resized length to that of the crop; 1 crops
                only what the aspect ratio requires. Lengths are rounded down,
                as in the reference (big_vision
                configs/proj/cappa/pretrain.py).

        Returns:
            An `ImagePreprocessing` of the same image_size.
        """
        arguments.check_number("margin", margin, 1.0)
        size = tuple(int(side * margin) for side in self.image_size)
        if self.resize == "squash":
            return dataclasses.replace(self, squash_size=size)
        return dataclasses.replace(self, resize_small=max(size))

    def scaled(self, size):
        """Returns the same preprocessing for another image size.

        `resize_small` is scaled in proportion.

        Args:
            size: (H, W), the size of images before augmentation crops them.

        Returns:
            An `ImagePreprocessing`.
        """
        if size == self.image_size:
            return self
        return dataclasses.replace(
            self,
            image_size=size,
            resize_small=math.ceil(
                self.resize_small * max(size) / max(self.image_size)
            ),
            squash_size=None,
        )

    def decode(self, encoded, in_python=True, min_side=1):
        """Decodes an image file in a graph.

        Args:
            encoded: Scalar string tensor.
            in_python: Whether Python may decode the formats that only Pillow
                reads; False for a graph that is exported from this process.
            min_side: Minimum length of the shorter side.

        Returns:
            uint8 [H, W, 3]. An image that cannot be decoded, or is too large
            or too small, raises `tf.errors.InvalidArgumentError`.
        """
        at_least = None
        if self.reduced_decode:
            # Decoded no smaller than `min_side`, which is compared below.
            at_least = [max(side, min_side) for side in self._resized]
        image = decode_resize.decode(
            encoded,
            self.max_pixels,
            at_least,
            image_files.decode_other if in_python else None,
        )
        if min_side > 1:
            check = tf.debugging.assert_greater_equal(
                tf.reduce_min(tf.shape(image)[:2]), min_side
            )
            with tf.control_dependencies([check] if check is not None else []):
                image = tf.identity(image)
        return self.fit(image)

    @property
    def _resized(self):
        """Minimum (height, width) after resizing."""
        if self.resize == "squash":
            return self.squash_size or self.image_size
        return (self.resize_small, self.resize_small)

    def fit(self, image):
        """Resizes and crops a decoded image [h, w, 3] to uint8 [H, W, 3]."""
        if self.resize == "resize_small_central_crop":
            return decode_resize.resize_small_central_crop(
                image, self.resize_small, self.image_size, self.antialias
            )
        image = decode_resize.resize(image, self._resized, self.antialias)
        (h, w), (height, width) = self._resized, self.image_size
        top, left = (h - height) // 2, (w - width) // 2
        return image[top : top + height, left : left + width]

    def used_part(self, height, width):
        """The part of an image that the model sees.

        Args:
            height: Height of the image in pixels, after rotation.
            width: Width.

        Returns:
            (left, top, width, height) as fractions of the image's width and
            height.
        """
        if self.resize == "resize_small_central_crop":
            scale = self.resize_small / min(height, width)
            resized = (height * scale, width * scale)
        else:
            resized = self._resized
        tall, wide = (
            min(1.0, used / whole)
            for used, whole in zip(self.image_size, resized)
        )
        return (1 - wide) / 2, (1 - tall) / 2, wide, tall

    def __call__(self, encoded):
        """Decodes an image file to float32 [H, W, 3] in [-1, 1]."""
        return decode_resize.to_model_range(self.decode(encoded))

    def read(self, path, box=None):
        """Reads an image file, outside of any graph.

        Args:
            path: Path of the file, local or in a bucket.
            box: (left, top, width, height) in pixels of the part to use, or
                None for the whole image.

        Returns:
            NumPy array, float32 [H, W, 3] in [-1, 1].

        Raises:
            image_files.UnusableError: If the image cannot be used.
        """
        return self.read_bytes(image_files.read_bytes(path), box)

    def read_bytes(self, content, box=None, min_side=1):
        """Does the same as `read` with the bytes of an image file.

        Args:
            content: The bytes.
            box: As in `read`.
            min_side: Minimum length of the shorter side; not with `box`.
        """
        try:
            with tf.device("CPU:0"):
                if box is None:
                    pixels = image_files.decode_rare(
                        content, self.max_pixels, min_side
                    )
                    if pixels is not None:
                        fitted = self.fit(tf.constant(pixels))
                        return decode_resize.to_model_range(fitted).numpy()
                    if min_side > 1:
                        image_files.check_side(content, min_side)
                    return self._compiled(content).numpy()
                image = decode_resize.decode(
                    content, self.max_pixels, None, image_files.decode_other
                )
                part = image_files.part(image, box)
                return decode_resize.to_model_range(self.fit(part)).numpy()
        except tf.errors.OpError as error:
            reason = image_files.why_unusable(
                content, max_pixels=self.max_pixels
            )
            raise image_files.UnusableError(reason) from error

    def read_pillow(self, image):
        """Does the same as `read` with an open Pillow image."""
        pixels = image_files.decode_pillow(image, self.max_pixels)
        with tf.device("CPU:0"):
            fitted = self.fit(tf.constant(pixels))
            return decode_resize.to_model_range(fitted).numpy()

    @functools.cached_property
    def _compiled(self):
        # AutoGraph has nothing to convert here, but would take long.
        return tf.function(
            self.__call__,
            input_signature=[tf.TensorSpec([], tf.string)],
            autograph=False,
        )
