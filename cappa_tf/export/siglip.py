"""Models for transformers' SigLIP, and from it.

    save_siglip(towers, "hf")           # SiglipModel.from_pretrained("hf")
    save_siglip_vision(encoder, "hf")   # SiglipVisionModel.from_pretrained
    towers = load_siglip("siglip-base-patch16-224")  # a `Contrastive`
    encoder = load_siglip_vision("siglip-base-patch16-224")

The entry point of the conversion, beside the other formats. It is defined in
`cappa_tf.saving.siglip`, since runs start from such folders, too.
"""

from cappa_tf.saving.siglip import (
    is_siglip,
    load_siglip,
    load_siglip_vision,
    save_siglip,
    save_siglip_vision,
)

__all__ = [
    "is_siglip",
    "load_siglip",
    "load_siglip_vision",
    "save_siglip",
    "save_siglip_vision",
]
