"""Models: encoders, decoder, the methods they train with, and their losses."""

import keras

# Registers the classes of saved models with Keras before any other module of
# this folder is partially imported (`cappa_tf/__init__.py` says why).
from cappa_tf.models import (  # noqa: F401
    classification_head,
    encoder_adapter,
    text_encoder,
)

# Encoders open under every backend, even if TensorFlow is not installed.
if keras.config.backend() == "tensorflow":
    from cappa_tf.models import (  # noqa: F401
        bag_of_tokens,
        captioner,
        classifier,
        contrastive,
        contrastive_captioner,
        self_critical,
        text_decoder,
    )
