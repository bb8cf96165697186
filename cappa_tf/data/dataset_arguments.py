"""Validation of the arguments of a `CaptionDataset`."""

from cappa_tf.data import prompts
from cappa_tf.utils import arguments

CACHES = (None, "stream", "records", "images")


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
    if data.crop_scale is not None:
        arguments.check_interval("crop_scale", data.crop_scale, 1.0)
    arguments.check_interval("crop_aspect", data.crop_aspect)
    arguments.check_fraction(max_skipped_fraction=data.max_skipped_fraction)
    if data.crop_scale is not None and data.shift:
        raise ValueError(
            "`crop_scale` and `shift` exclude each other. Received: "
            f"crop_scale={data.crop_scale}, shift={data.shift}"
        )
    augmentations(data)
    if data.shift >= min(data.image_size):
        raise ValueError(
            "`shift` must be smaller than the image. Received: "
            f"shift={data.shift}, image_size={data.image_size}"
        )


def buckets(length_buckets, tokenizer):
    """Sorted text lengths to cut to, including the maximum; None for none.

    "auto" remains as it is.
    """
    if length_buckets is None or tokenizer is None:
        return None
    if isinstance(length_buckets, str):
        arguments.check_choice(("auto",), length_buckets=length_buckets)
        return length_buckets
    longest = tokenizer.max_length
    for bucket in length_buckets:
        arguments.check_integer("length_buckets", bucket, 1)
    if max(length_buckets, default=1) > longest:
        raise ValueError(
            "`length_buckets` must not exceed the tokenizer's "
            f"max_length={longest}. Received: length_buckets={length_buckets}"
        )
    return sorted({*length_buckets, longest})


def augmentations(data):
    """Checks the further augmentations of a `CaptionDataset`.

    Raises:
        ValueError: If one is none, or they do not go together.
    """
    found = data.augmentations
    for one in found:
        if not (callable(one) and hasattr(one, "mixes")):
            raise ValueError(
                "`augmentations` must be augmentations such as mixing.Mixup(). "
                f"Received: {one!r}"
            )
    if any(one.mixes for one in found[:-1]):
        raise ValueError(
            "One of `augmentations` may mix images, and it must be the last "
            "(mixing.OneOf chooses between several). Received: "
            f"{[type(one).__name__ for one in found]}"
        )
    if data.mixes and data.tokenizer is not None:
        raise ValueError(
            "Mixed images have the labels of both, but captions cannot be "
            "mixed: leave out augmentations that mix, or set tokenizer=None. "
            f"Received: {type(found[-1]).__name__}"
        )
    crops = [one for one in found if one.crops]
    if len(crops) > 1 or (crops and data.crop_scale is not None):
        raise ValueError(
            "Images can be cropped once, by `crop_scale` or by one of "
            f"`augmentations`. Received: crop_scale={data.crop_scale}, "
            f"augmentations={[type(one).__name__ for one in found]}"
        )


def decode_size(size, image_size, crops):
    """Size (H, W) of the images before cropping.

    Args:
        size: The user's choice; None for the default.
        image_size: (H, W) the model takes.
        crops: Whether they will be cropped.
    """
    if size is not None:
        return arguments.height_width("decode_size", size)
    scale = 1.15 if crops else 1.0
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
