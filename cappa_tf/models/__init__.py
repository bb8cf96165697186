"""Batches to predictions: encoder, decoder, captioner, generation."""

import keras

# Registers the classes of saved models with Keras before any other module of
# this folder can be half imported (see `cappa_tf/__init__.py`).
from cappa_tf.models import classification_head  # noqa: F401

# Encoders open under every backend, where TensorFlow may not be installed.
if keras.config.backend() == "tensorflow":
    from cappa_tf.models import (  # noqa: F401
        captioner,
        classifier,
        contrastive,
        text_decoder,
    )
