"""Conversion of captioners from clip-jax, which trained the public CapPa.

    captioner = load_captioner("cappa-large-patch16-256-jax")
    captioner = load_captioner(arrays, config)

This is the public entry point, beside the other formats. The implementation is
in `cappa_tf.saving.clip_jax`.
"""

from cappa_tf.saving.clip_jax import is_clip_jax, load_captioner

__all__ = ["is_clip_jax", "load_captioner"]
