"""Batches to predictions: encoder, decoder, captioner, generation."""

# Registers the classes of a saved encoder with Keras before any other module
# of this folder can be half imported (see `cappa_tf/__init__.py`).
from cappa_tf.models import vision_encoder as _  # noqa: F401
