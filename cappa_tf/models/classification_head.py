"""Classification head: the layers between pooled features and logits.

Written with Keras only, so that a saved encoder with a head opens under every
Keras backend.

Abbreviations for dimensions:
    B: batch.  D: width.  R: `rep_size`.  C: number of classes.
"""

import keras

from cappa_tf.models.vision_encoder import VisionEncoder
from cappa_tf.utils.arguments import check_counts


def head_layers(rep_size, num_classes, dtype):
    """Makes (tanh layer [D, R], linear layer [D or R, C]), each or None.

    Reference: big_vision models/vit.py `_Model`, `pre_logits` and `head`.
    """
    check_counts(optional=True, rep_size=rep_size, num_classes=num_classes)
    representation = head = None
    if rep_size is not None:
        representation = keras.layers.Dense(
            rep_size, "tanh", name="representation", dtype=dtype
        )
    if num_classes is not None:
        head = keras.layers.Dense(
            num_classes,
            kernel_initializer="zeros",
            name="head",
            # float32 even under mixed precision, for exact probabilities.
            dtype="float32",
        )
    return representation, head


def build_head(representation, head, width):
    """Creates the weights of `head_layers` for features [B, width]."""
    if representation is not None:
        representation.build((None, width))
        width = representation.units
    if head is not None:
        head.build((None, width))


def apply_head(representation, head, outputs):
    """Adds `pre_logits` [B, R] and `logits` [B, C] to an encoder's outputs."""
    if representation is not None:
        pre_logits = representation(outputs["pre_logits"])
        outputs = {**outputs, "pre_logits": pre_logits}
    if head is not None:
        outputs = {**outputs, "logits": head(outputs["pre_logits"])}
    return outputs


@keras.saving.register_keras_serializable("cappa_tf")
class EncoderWithHead(VisionEncoder):
    """A vision encoder with a head, as saved by version 0.1.0.

    Files store weights by the position of layers. In that version a
    classifier's two layers are among those of the encoder.

    Args:
        rep_size: Width R of the tanh layer, or None.
        num_classes: Number of classes C, or None.
        **kwargs: Arguments of `VisionEncoder`.
    """

    def __init__(self, rep_size=None, num_classes=None, **kwargs):
        super().__init__(**kwargs)
        self.rep_size = rep_size
        self.num_classes = num_classes
        self._representation, self._head = head_layers(
            rep_size, num_classes, self.dtype_policy
        )

    def build(self, input_shape=None):
        """Creates all weights, whose sizes the constructor determines."""
        build_head(self._representation, self._head, self.hidden_dim)
        super().build(input_shape)

    def _outputs(self, encoded):
        outputs = super()._outputs(encoded)
        return apply_head(self._representation, self._head, outputs)

    def get_config(self):
        """Returns the constructor's arguments."""
        heads = {"rep_size": self.rep_size, "num_classes": self.num_classes}
        return {**super().get_config(), **heads}
