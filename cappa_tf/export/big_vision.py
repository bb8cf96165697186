"""Weights from and to big_vision, the paper's JAX implementation.

    towers = load_two_towers("siglip.npz", image_size=384)  # a `Contrastive`
    encoder = load_vision_encoder("siglip.npz")             # its image tower
    captioner = load_captioner("cappa.npz")
    save_two_towers(towers, "copy.npz")

The entry point of the conversion, beside the other formats. It is defined in
`cappa_tf.saving.big_vision`, since runs start from such files, too.
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
