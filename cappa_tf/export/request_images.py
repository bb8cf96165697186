"""Decoding of the images of a request, inside the graph of a server.

Requests of several clients share a batch, so a bad image must not make it
fail: the image is flagged and the others are processed. TensorFlow has no
`try`, but a small data set inside the graph drops the elements that fail (as
in data/stream/decoding.py); those missing afterwards are the bad ones.

Abbreviations for dimensions:
    B: images of a request (or of several that a server has batched).
    H, W: height and width the model takes.
"""

import tensorflow as tf

from cappa_tf.data.images import decode_resize, formats

# Images decoded in parallel. Fixed, because autotuning would start a thread for
# each request.
PARALLEL_CALLS = 16

NOT_AN_IMAGE = "not a JPEG, PNG, GIF, BMP or WebP image"
NOT_DECODED = " is not decoded here; send JPEG, PNG, GIF, BMP or WebP"
BROKEN = "image cannot be decoded"


def decode_request(image_bytes, preprocessing):
    """Decodes the images of a request; bad ones become black.

    Images are decoded as in training, including the rotation that EXIF data
    ask for. The size is read from the header first, so that an image of more
    pixels than `max_pixels` takes no memory.

    Args:
        image_bytes: string [B], image files.
        preprocessing: `ImagePreprocessing` with `max_pixels`.

    Returns:
        pixels: uint8 [B, H, W, 3].
        errors: string [B], "" for a good image. The messages do not number the
            images, as a server that batches requests would count those of
            other clients.
    """
    areas, _ = attempt(
        decode_resize.pixels_to_decode, image_bytes, tf.constant(0, tf.int64)
    )

    pixels, decoded = attempt(
        lambda encoded: preprocessing.decode(encoded, in_python=False),
        image_bytes,
        tf.zeros([*preprocessing.image_size, 3], tf.uint8),
    )
    other = formats.other_name(image_bytes)
    reason = tf.where(
        formats.kind(image_bytes) != formats.OTHER,
        tf.where(
            areas > preprocessing.max_pixels,
            f"more than {preprocessing.max_pixels} pixels",
            BROKEN,
        ),
        tf.where(other == "", NOT_AN_IMAGE, other + NOT_DECODED),
    )
    return pixels, tf.where(decoded, "", "image_bytes: " + reason)


def attempt(function, elements, blank):
    """Applies a function to each element and reports where it failed.

    Args:
        function: Maps an element of `elements` to a tensor.
        elements: Tensor with a leading B, at least 1.
        blank: Result for an element at which the function fails.

    Returns:
        The results, with a leading B, and bool [B], True for success.
    """
    count = tf.shape(elements, tf.int64)[0]
    results = (
        tf.data.Dataset.from_tensor_slices(elements)
        .enumerate()
        .map(
            lambda number, element: (number, function(element)),
            num_parallel_calls=PARALLEL_CALLS,
            deterministic=False,
        )
        .ignore_errors()
    )
    # The blank also keeps the data set from being empty.
    blanks = tf.data.Dataset.from_tensors((count, blank))
    options = tf.data.Options()
    options.autotune.enabled = False
    numbers, values = (
        blanks.concatenate(results)
        .with_options(options)
        .batch(count + 1)
        .get_single_element()
    )
    row = tf.tensor_scatter_nd_update(
        tf.zeros([count + 1], tf.int32),
        numbers[:, tf.newaxis],
        tf.range(tf.size(numbers)),
    )[:count]
    return tf.gather(values, row), row > 0
