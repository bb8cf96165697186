"""Contrastive head: embeddings, logits and the loss of two towers.

Abbreviations for dimensions:
    B: pairs of the global batch.  R: pairs of this device.
    D, E: widths of pooled image and text features.  C: width of embeddings.
"""

import math

import keras
import tensorflow as tf
from keras import ops

from cappa_tf.models.losses import contrastive
from cappa_tf.models.task import ExampleLosses
from cappa_tf.utils.arguments import check_choice, check_counts, check_number

LOSSES = ("softmax", "sigmoid")
# Added to the norm, as in the reference, not a lower bound of it.
_EPSILON = 1e-8


@keras.saving.register_keras_serializable("cappa_tf")
class ContrastiveHead(keras.layers.Layer):
    """Projections to a common space, temperature and bias.

    Args:
        image_dim: Width D of the pooled image features.
        text_dim: Width E of the pooled text features.
        embedding_dim: Width C, or a pair (image, text). None, also in the
            pair, omits the projection, so that the pooled feature itself is
            the embedding.
        loss: "softmax" (CLIP) or "sigmoid" (SigLIP).
        temperature: Initial value of the learned factor of the similarities,
            above 0. It is not a divisor.
        bias: Initial value of the learned number that is added to the scaled
            similarities; None for no such weight. The sigmoid loss needs one.
        chunk_size: Rows of the logits that are held in memory at a time; None
            for the default of `losses.contrastive`.

    The head computes in float32 whatever the precision of the towers.

    Reference: big_vision models/proj/image_text/two_towers.py.
    """

    def __init__(
        self,
        image_dim,
        text_dim,
        embedding_dim=None,
        *,
        loss="softmax",
        temperature=10.0,
        bias=None,
        chunk_size=None,
        **kwargs,
    ):
        super().__init__(**{**kwargs, "dtype": "float32"})
        check_counts(image_dim=image_dim, text_dim=text_dim)
        check_counts(optional=True, chunk_size=chunk_size)
        check_choice(LOSSES, loss=loss)
        pair = embedding_dim
        if not isinstance(pair, list | tuple):
            pair = (embedding_dim, embedding_dim)
        if len(pair) != 2:
            raise ValueError(
                "`embedding_dim` must be a width or a pair of them. Received: "
                f"embedding_dim={embedding_dim!r}"
            )
        check_counts(optional=True, embedding_dim=pair[0])
        check_counts(optional=True, embedding_dim=pair[1])
        widths = (pair[0] or image_dim, pair[1] or text_dim)
        if widths[0] != widths[1]:
            raise ValueError(
                "Image and text embeddings must have one width: set "
                "`embedding_dim`. Received: "
                f"embedding_dim={embedding_dim!r} with an image tower of width "
                f"{image_dim} and a text tower of width {text_dim}, which "
                f"gives {widths[0]} and {widths[1]}"
            )
        if loss == "sigmoid" and bias is None:
            raise ValueError(
                "The sigmoid loss needs a `bias`, -10.0 in SigLIP: almost all "
                "pairs of a batch are negative. Received: bias=None"
            )
        self.image_dim = image_dim
        self.text_dim = text_dim
        self.embedding_dim = tuple(pair)
        self.width = widths[0]
        self.loss = loss
        self.temperature = check_number(
            "temperature", temperature, exclusive=True
        )
        self.bias = (
            None
            if bias is None
            else check_number("bias", bias, -math.inf, exclusive=True)
        )
        self.chunk_size = chunk_size
        self._image, self._text = (
            None
            if units is None
            else keras.layers.Dense(
                units,
                kernel_initializer="lecun_normal",
                name=name,
                dtype="float32",
            )
            for name, units in zip(("image", "text"), pair)
        )

    def build(self, input_shape=None):
        """Creates projections, `log_temperature` [1] and `bias` [1]."""
        for layer, width in (
            (self._image, self.image_dim),
            (self._text, self.text_dim),
        ):
            if layer is not None:
                layer.build((None, width))
        self.log_temperature = self.add_weight(
            name="log_temperature",
            shape=(1,),
            initializer=keras.initializers.Constant(math.log(self.temperature)),
        )
        self.logit_bias = None
        if self.bias is not None:
            self.logit_bias = self.add_weight(
                name="logit_bias",
                shape=(1,),
                initializer=keras.initializers.Constant(self.bias),
            )
        self.built = True

    def embed_images(self, features):
        """Normalized embeddings float32 [B, C] of features [B, D]."""
        return _normalized(self._image, features)

    def embed_texts(self, features):
        """Normalized embeddings float32 [B, C] of features [B, E]."""
        return _normalized(self._text, features)

    @property
    def scale_and_bias(self):
        """Factor and bias of the similarities, two scalars."""
        scale = ops.exp(ops.convert_to_tensor(self.log_temperature))[0]
        if self.logit_bias is None:
            return scale, tf.zeros([])
        return scale, ops.convert_to_tensor(self.logit_bias)[0]

    def logits(self, images, texts):
        """Scaled and shifted similarities of embeddings.

        Args:
            images: float32 [B, C].
            texts: float32 [T, C].

        Returns:
            float32 [B, T].
        """
        scale, bias = self.scale_and_bias
        return tf.matmul(images, texts, transpose_b=True) * scale + bias

    def losses(self, images, texts, own, mask=None):
        """Losses and metrics of the pairs of this device.

        Args:
            images: float32 [B, C], embeddings of the global batch.
            texts: float32 [B, C]; text i belongs to image i.
            own: (offset, R), the pairs of this device.
            mask: Optional bool [B], False for pairs to ignore.

        Returns:
            `ExampleLosses` of R examples.
        """
        scale, bias = self.scale_and_bias
        options = {"mask": mask, "chunk_size": self.chunk_size}
        if self.loss == "softmax":
            # A bias shifts all logits equally and does not change the softmax.
            loss, found = contrastive.softmax_losses(
                images, texts, own, scale, **options
            )
        else:
            loss, found = contrastive.sigmoid_losses(
                images, texts, own, scale, bias, **options
            )
        ones = tf.ones_like(loss)
        metrics = {
            "contrastive/loss": (loss, ones),
            "contrastive/accuracy": (found, ones),
            "contrastive/temperature": (scale * ones, ones),
        }
        if self.logit_bias is not None:
            metrics["contrastive/bias"] = (bias * ones, ones)
        if mask is not None:
            offset, count = own
            kept = tf.cast(mask, tf.float32)[offset : offset + count]
            metrics = {
                name: (total * kept, weight * kept)
                for name, (total, weight) in metrics.items()
            }
        return ExampleLosses(loss, metrics, {})

    def get_config(self):
        """Returns the constructor's arguments."""
        names = (
            "image_dim text_dim embedding_dim loss temperature bias chunk_size"
        ).split()
        own = {name: getattr(self, name) for name in names}
        return {**super().get_config(), **own}


def _normalized(projection, features):
    features = tf.cast(features, tf.float32)
    if projection is not None:
        features = projection(features)
    # The square root has no derivative at 0.
    square = tf.reduce_sum(tf.square(features), axis=-1, keepdims=True)
    norm = tf.sqrt(tf.maximum(square, 1e-30))
    return features / (norm + _EPSILON)
