"""Classifier: a vision encoder with a linear head on its pooled features.

Abbreviations for dimensions:
    B: batch.  H, W: height and width of the image in pixels.
    P: number of patches.  D: width.  R: `rep_size`.  C: number of classes.
"""

import keras
import tensorflow as tf

from cappa_tf.models import stateless_random
from cappa_tf.models.classification_head import (
    apply_head,
    build_head,
    head_layers,
)
from cappa_tf.models.data_checks import check_image_size, check_labels
from cappa_tf.models.losses.classification import (
    LOSSES,
    class_targets,
    sigmoid_cross_entropy,
    softmax_cross_entropy,
)
from cappa_tf.models.task import ExampleLosses, Task
from cappa_tf.utils.arguments import check_choice, check_fraction


@keras.saving.register_keras_serializable("cappa_tf")
class Classifier(Task):
    """Vision encoder trained to predict the class of an image.

    Args:
        vision_encoder: `VisionEncoder` whose `pooling` is not "none".
        num_classes: Number of classes C; None for a model without a head,
            which cannot be trained.
        rep_size: Width R of a tanh layer on the pooled features, or None.
        loss: "softmax", or "sigmoid", which judges each class by itself and
            sums over them.
        label_smoothing: Fraction of the target spread over all classes.
        seed: Seed of dropout, together with each example's `index`.

    Call arguments:
        images: [B, H, W, 3] in [-1, 1].
        seeds: uint32 [B], dropout seeds, as in `VisionEncoder`.
        training: Whether to apply dropout.

    Returns:
        Dict of the encoder's outputs, with `pre_logits` [B, D or R] and
        `logits` float32 [B, C].
    """

    short_names = {"top_1": "acc", "top_5": None}
    takes_features = True

    def __init__(
        self,
        vision_encoder,
        num_classes=None,
        rep_size=None,
        *,
        loss="softmax",
        label_smoothing=0.0,
        seed=0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_choice(LOSSES, loss=loss)
        check_fraction(label_smoothing=label_smoothing)
        if vision_encoder.pooling == "none":
            raise ValueError(
                "A classifier needs a vision encoder that pools. Received: "
                "pooling='none'"
            )
        self.vision_encoder = vision_encoder
        self.num_classes = num_classes
        self.rep_size = rep_size
        self.loss_kind = loss
        self.label_smoothing = label_smoothing
        self.seed = seed
        self.representation, self.head = head_layers(
            rep_size, num_classes, self.dtype_policy
        )

    @property
    def parts(self):
        """Dict of the layers "vision_encoder", "representation" and "head"."""
        parts = {
            "vision_encoder": self.vision_encoder,
            "representation": self.representation,
            "head": self.head,
        }
        return {k: v for k, v in parts.items() if v is not None}

    def build(self, input_shape=None):
        """Creates all weights, whose sizes the constructors determine."""
        build_head(
            self.representation, self.head, self.vision_encoder.hidden_dim
        )
        super().build(input_shape)

    def call(self, images, seeds=None, training=False):
        """Classifies images [B, H, W, 3]; the class describes the outputs."""
        training = self.trains("vision_encoder", training)
        outputs = self.vision_encoder(images, seeds=seeds, training=training)
        return apply_head(self.representation, self.head, outputs)

    def logits_of_features(self, features):
        """Classifies images by their features.

        Args:
            features: float [B, D], `pre_logits` of the vision encoder, or
                [B, P, D], its `encoded`.

        Returns:
            float32 [B, C].
        """
        if features.shape.rank == 3:
            features = self.vision_encoder.pool(features)
        outputs = {"pre_logits": features}
        return apply_head(self.representation, self.head, outputs)["logits"]

    def _logits(self, batch, seeds, training):
        if "image_features" in batch:
            return self.logits_of_features(batch["image_features"])
        return self(batch["image"], seeds, training=training)["logits"]

    def encode_images(self, images):
        """Outputs in inference; `pre_logits` are the inputs of the head."""
        return self(images, training=False)

    def probabilities(self, logits):
        """Probabilities float32 [B, C] of logits [B, C]."""
        logits = tf.cast(logits, tf.float32)
        if self.loss_kind == "sigmoid":
            # Each class by itself: they do not sum to 1.
            return tf.sigmoid(logits)
        return tf.nn.softmax(logits)

    def example_losses(self, batch, training):
        """Cross-entropy and accuracy of each example.

        Args:
            batch: Dict with `image` [B, H, W, 3], or `image_features` as in
                `logits_of_features`; `label` int64 [B], -1 for examples
                without a label, which are ignored, or [B, C] with 1 for each
                class of an example; in training `index` int64 [B], and for
                mixed images `mix_label`, that of the other image, and
                `mix_weight` float32 [B], the weight of the first.
            training: Whether to apply dropout.

        Returns:
            `ExampleLosses`, with `top_1` and, for more than five classes,
            `top_5`. A prediction is right if it is a class of the example (of
            a mixture, of its first image); an example without any class does
            not count.
        """
        seeds = None
        if training:
            seeds = stateless_random.example_seeds(self.seed, batch["index"])
        logits = self._logits(batch, seeds, training)
        labels = batch["label"]
        targets = class_targets(
            labels,
            self.num_classes,
            self.label_smoothing,
            batch.get("mix_label"),
            batch.get("mix_weight"),
        )
        if self.loss_kind == "sigmoid":
            loss = sigmoid_cross_entropy(logits, targets)
        else:
            loss = softmax_cross_entropy(logits, targets)
        if labels.shape.rank == 2:
            known = tf.reduce_any(labels > 0, axis=1)
        else:
            known = labels >= 0
            loss = tf.where(known, loss, 0.0)
        weight = tf.cast(known, tf.float32)
        metrics = {"top_1": (_has_class(logits, labels, 1), weight)}
        if self.num_classes > 5:
            metrics["top_5"] = (_has_class(logits, labels, 5), weight)
        return ExampleLosses(loss, metrics, {})

    def batch_spec(self, size, captions=1):
        """Specs of `image`, `label` and `index`, as `Task` defines them."""
        del captions
        return {
            **self.image_spec(size),
            "label": tf.TensorSpec([size], tf.int64),
            "index": tf.TensorSpec([size], tf.int64),
        }

    def shapes(self, size, captions=1):
        """Shapes of `encoded` and `logits`, as `Task` defines them."""
        del captions
        encoded = self.vision_encoder.output_shapes()["encoded"]
        return {
            "encoded": (size, *encoded),  # [B, P, D]
            "logits": (size, self.num_classes),  # [B, C]
        }

    def check_data(self, data, name):
        """Checks that data has the model's labels and size, not captions."""
        if data.tokenizer is not None:
            raise ValueError(
                "A classifier needs labels, which a data set yields without a "
                f"tokenizer. Received: {name} of {data.path} with a tokenizer"
            )
        check_image_size(data, name, self.vision_encoder)
        check_labels(data, self.num_classes)

    def get_config(self):
        """Returns the constructor's arguments."""
        encoder = keras.saving.serialize_keras_object(self.vision_encoder)
        return {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": keras.saving.serialize_keras_object(self.dtype_policy),
            "vision_encoder": encoder,
            "num_classes": self.num_classes,
            "rep_size": self.rep_size,
            "loss": self.loss_kind,
            "label_smoothing": self.label_smoothing,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        """Rebuilds the classifier with its encoder."""
        encoder = keras.saving.deserialize_keras_object(
            config["vision_encoder"]
        )
        return cls(**{**config, "vision_encoder": encoder})


def _has_class(logits, labels, k):
    """Whether a class of an example is among the k likeliest, float32 [B]."""
    best = tf.math.top_k(logits, k).indices  # [B, k]
    if labels.shape.rank == 2:
        right = tf.gather(labels, best, axis=1, batch_dims=1) > 0
    else:
        right = tf.cast(best, labels.dtype) == labels[:, None]
    return tf.cast(tf.reduce_any(right, axis=1), tf.float32)
