"""Conversion of weights from and to big_vision, the paper's JAX code.

    towers = load_two_towers("siglip.npz", image_size=384)  # a `Contrastive`
    encoder = load_vision_encoder("siglip.npz")             # its image tower
    captioner = load_captioner("cappa.npz")
    save_two_towers(towers, "copy.npz")

This is the public entry point, beside the other formats. The implementation is
in `cappa_tf.saving.big_vision`, as runs can also start from such files.
"""

from cappa_tf.saving.big_vision import (
    is_captioner,
    is_two_towers,
    load_captioner,
    load_two_towers,
    load_vision_encoder,
    read_arrays,
    save_captioner,
    save_two_towers,
    save_vision_encoder,
)

__all__ = [
    "is_captioner",
    "is_two_towers",
    "load_captioner",
    "load_two_towers",
    "load_vision_encoder",
    "read_arrays",
    "save_captioner",
    "save_two_towers",
    "save_vision_encoder",
]
