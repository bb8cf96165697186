"""A tiny contrastive model whose every weight is random."""

import numpy_reference as reference

from cappa_tf.saving import big_vision

VOCABULARY, LENGTH, SIDE = 20, 6, 16


def make_contrastive(
    pooling="map",
    heads=(None, 16),
    *,
    bias=True,
    vocabulary=VOCABULARY,
    length=LENGTH,
    **sizes,
):
    """By default of the layout of the public SigLIP files.

    Args:
        pooling: Of the image tower.
        heads: Widths of the output heads (image, text), None for no head.
        bias: Whether there is a bias, and so the sigmoid loss.
        vocabulary: Number of token ids.
        length: Tokens of a text.
        **sizes: Further `Sizes` of both towers.
    """
    image = reference.Sizes(
        **{"patch": (8, 8), "image": (SIDE, SIDE), "pooling": pooling, **sizes}
    )
    text = reference.Sizes(
        **{"width": 8, "vocabulary": vocabulary, "length": length, **sizes}
    )
    arrays = reference.random_two_towers(image, text, heads, bias)
    return big_vision.load_two_towers(arrays, image.image)
