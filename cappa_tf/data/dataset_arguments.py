"""Validation of the arguments of a `CaptionDataset`."""

import math

from cappa_tf.data import prompts
from cappa_tf.utils import arguments

CACHES = (None, "stream", "records", "images")


def interval(name, value, most):
    """Checks that a value is (min, max) with 0 < min <= max <= most, or None.

    Raises:
        ValueError: If it is not.
    """
    if value is None:
        return
    numbers = isinstance(value, tuple | list) and all(
        isinstance(x, int | float) for x in value
    )
    if not numbers or len(value) != 2 or not 0 < value[0] <= value[1] <= most:
        raise ValueError(
            f"`{name}` must be two numbers, 0 < min <= max <= {most}. "
            f"Received: {name}={value!r}"
        )


def caption_dataset(data):
    """Checks the arguments of a `CaptionDataset`.

    Args:
        data: The `CaptionDataset`, which has its arguments as attributes.

    Raises:
        ValueError: If one is invalid; names it.
    """
    if not isinstance(data.split, str):
        raise ValueError(
            f"`split` must be a string. Received: split={data.split!r}"
        )
    if data.tokenizer is not None and not callable(data.tokenizer):
        raise ValueError(
            "`tokenizer` must be a Tokenizer or None. Received: "
            f"tokenizer={data.tokenizer!r}"
        )
    for name in ("seed", "shuffle_buffer", "shift"):
        arguments.check_integer(name, getattr(data, name), 0)
    arguments.check_integer("num_readers", data.num_readers, 1)
    for name in ("batch_size", "max_words", "num_parallel_calls"):
        if getattr(data, name) is not None:
            arguments.check_integer(name, getattr(data, name), 1)
    if data.captions_per_image != "all":
        arguments.check_integer(
            "captions_per_image", data.captions_per_image, 1
        )
    arguments.check_choice(CACHES, cache=data.cache)
    prompts.check_template(data.prompt)
    if data.prompt is not None and data.tokenizer is None:
        raise ValueError(
            "`prompt` needs a tokenizer, as without one there are no captions. "
            f"Received: prompt={data.prompt!r}"
        )
    interval("crop_scale", data.crop_scale, 1.0)
    interval("crop_aspect", data.crop_aspect, math.inf)
    arguments.check_fraction(max_skipped_fraction=data.max_skipped_fraction)
    if data.crop_scale is not None and data.shift:
        raise ValueError(
            "`crop_scale` and `shift` exclude each other. Received: "
            f"crop_scale={data.crop_scale}, shift={data.shift}"
        )
    if data.shift >= min(data.image_size):
        raise ValueError(
            "`shift` must be smaller than the image. Received: "
            f"shift={data.shift}, image_size={data.image_size}"
        )


def buckets(length_buckets, tokenizer):
    """Sorted text lengths to cut to, including the maximum; None for none."""
    if length_buckets is None or tokenizer is None:
        return None
    longest = tokenizer.max_length
    for bucket in length_buckets:
        arguments.check_integer("length_buckets", bucket, 1)
    if max(length_buckets, default=1) > longest:
        raise ValueError(
            "`length_buckets` must not exceed the tokenizer's "
            f"max_length={longest}. Received: length_buckets={length_buckets}"
        )
    return sorted({*length_buckets, longest})


def decode_size(size, image_size, crop_scale):
    """Size (H, W) of the images before cropping.

    Args:
        size: The user's choice; None for the default.
        image_size: (H, W) the model takes.
        crop_scale: The argument of `CaptionDataset`.
    """
    if size is not None:
        return arguments.height_width("decode_size", size)
    scale = 1.0 if crop_scale is None else 1.15
    return tuple(round(side * scale) for side in image_size)


def hosts(host, num_hosts):
    """Checks the index of a host and the number of hosts."""
    arguments.check_integer("num_hosts", num_hosts, 1)
    arguments.check_integer("host", host, 0)
    if host >= num_hosts:
        raise ValueError(
            "`host` must be less than `num_hosts`. Received: "
            f"host={host}, num_hosts={num_hosts}"
        )
