"""Captions of the training data, read and tokenized to count what is in them.

K: captions of an image.   L: length of the text.
"""

import itertools

import numpy as np

# Images whose captions are tokenized at a time.
_CHUNK = 1024


def counted_captions(data, limit):
    """Reads the captions of a random part of the training data.

    Args:
        data: Has `tokenizer`, `path` and `read_captions(limit)`.
        limit: Maximum number of images. Those without a caption are left out.

    Yields:
        Lists of int arrays [K, L], the padded token ids of an image's captions.

    Raises:
        ValueError: If there is no caption.
    """
    images = filter(None, data.read_captions(limit))
    empty = True
    while some := [*itertools.islice(images, _CHUNK)]:
        empty = False
        tokens = np.asarray(data.tokenizer([*itertools.chain(*some)]))
        ends = np.cumsum([len(captions) for captions in some])
        yield np.split(tokens, ends[:-1])
    if empty:
        raise ValueError(
            "The training data must have captions to count. Received: "
            f"{data.path} without any"
        )
