"""A tiny captioner whose weights are all random, and images for it."""

import keras
import numpy as np

from cappa_tf.models.captioner import Captioner
from cappa_tf.models.text_decoder import TextDecoder
from cappa_tf.models.vision_encoder import VisionEncoder

B, L, V, SIDE = 4, 7, 20, 16
SMALL = {"hidden_dim": 16, "num_heads": 2, "mlp_dim": 32}


def make_captioner(encoder=None, vocabulary_size=V, length=L, **kwargs):
    """An untrained captioner with a random head, which starts at zero."""
    keras.utils.set_random_seed(0)
    captioner = Captioner(
        VisionEncoder(
            num_layers=1,
            patch_size=8,
            image_size=SIDE,
            **SMALL,
            **(encoder or {}),
        ),
        TextDecoder(vocabulary_size, length, num_layers=2, **SMALL),
        **kwargs,
    )
    captioner.build()
    draw = np.random.RandomState(1)
    for variable in captioner.trainable_variables:
        variable.assign(draw.normal(0, 0.3, variable.shape))
    return captioner


def make_images(count=B):
    """float32 [count, SIDE, SIDE, 3] in [-1, 1]."""
    draw = np.random.RandomState(0)
    return draw.uniform(-1, 1, (count, SIDE, SIDE, 3)).astype("float32")
