"""Bag of tokens: a vision encoder that predicts which tokens a caption has.

Abbreviations for dimensions:
    B: batch (of images).      H, W: height and width of the image in pixels.
    K: captions per image.     L: length of the text.
    D: width.                  V: vocabulary.
"""

import keras
import numpy as np
import tensorflow as tf

from cappa_tf.models import stateless_random
from cappa_tf.models.contrastive import check_pooling
from cappa_tf.models.counted_captions import counted_captions
from cappa_tf.models.data_checks import (
    check_image_size,
    check_texts,
    check_without_prompts,
)
from cappa_tf.models.losses import bag_of_tokens as losses
from cappa_tf.models.norms import layer_norm
from cappa_tf.models.special_tokens import SpecialTokens
from cappa_tf.models.task import ExampleLosses, Task
from cappa_tf.utils.arguments import check_counts, check_integer

# Predictions among which the tokens of a caption are looked for.
_PREDICTIONS = 10


@keras.saving.register_keras_serializable("cappa_tf")
class BagOfTokens(Task):
    """Vision encoder trained to classify images by their captions' tokens.

    "SuperClass": every token of the vocabulary is a class. The target of an
    image is the set of tokens of its caption, weighted by inverse document
    frequency and normalized to a sum of 1; the loss is the softmax
    cross-entropy. Order and repetition of tokens do not count.

    Args:
        vision_encoder: `VisionEncoder` that pools.
        vocabulary_size: Number of token ids V.
        max_length: Length L of the captions.
        special_tokens: `SpecialTokens`, which are not classes; by default
            CapPa's.
        counted_images: Number of training images whose captions `prepare`
            counts for the document frequencies.
        seed: Seed of dropout, together with each example's `index`.

    Call arguments:
        images: [B, H, W, 3] in [-1, 1].
        seeds: uint32 [B], dropout seeds, as in `VisionEncoder`.
        training: Whether to apply dropout.

    Returns:
        Dict of the encoder's outputs, with `logits` float32 [B, V].

    Reference: arXiv 2411.03313; github.com/x-cls/superclass
    opencls/open_clip/cls_model.py, loss.py. Deviation: there the frequencies
    are those of the examples so far and change with every step; here they are
    counted before the first step.
    """

    short_names = {f"recall_at_{_PREDICTIONS}": f"r@{_PREDICTIONS}"}

    def __init__(
        self,
        vision_encoder,
        vocabulary_size=32_000,
        max_length=64,
        *,
        special_tokens: SpecialTokens | None = None,
        counted_images=100_000,
        seed=0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_counts(
            vocabulary_size=vocabulary_size,
            max_length=max_length,
            counted_images=counted_images,
        )
        check_pooling(vision_encoder)
        special_tokens = special_tokens or SpecialTokens()
        special_tokens.check_vocabulary(vocabulary_size)
        self.vision_encoder = vision_encoder
        self.vocabulary_size = vocabulary_size
        self.max_length = max_length
        self.special_tokens = special_tokens
        self.counted_images = counted_images
        self.seed = check_integer("seed", seed)
        self.head = TokenHead(
            vision_encoder.hidden_dim, vocabulary_size, name="head"
        )

    @property
    def parts(self):
        """Dict of "vision_encoder" and "head"."""
        return {"vision_encoder": self.vision_encoder, "head": self.head}

    def call(self, images, seeds=None, training=False):
        """Classifies images [B, H, W, 3]; the class describes the outputs."""
        training = self.trains("vision_encoder", training)
        outputs = self.vision_encoder(images, seeds=seeds, training=training)
        return {**outputs, "logits": self.head(outputs["pre_logits"])}

    def prepare(self, data):
        """Counts in how many captions of the training data each token occurs.

        Args:
            data: Has `tokenizer` and `read_captions(limit)`.

        Returns:
            A log line that says how many captions were counted.
        """
        counts = documents = 0
        for images in counted_captions(data, self.counted_images):
            tokens = np.concatenate(images)  # [captions, L]
            counts = counts + self._count(tokens)
            documents += len(tokens)
        self.head.document_frequency.assign(counts)
        self.head.num_documents.assign([documents])
        return f"token frequencies counted over {documents:,} captions"

    def _count(self, tokens):
        """The number of captions [N, L] with each token, int64 [V]."""
        size = self.vocabulary_size
        rows = np.arange(len(tokens))[:, None]
        once = np.unique(rows * size + tokens)
        return np.bincount(once % size, minlength=size)

    def example_losses(self, batch, training):
        """Cross-entropy of each example, and recall among the best tokens.

        Args:
            batch: Dict with `image` [B, H, W, 3]; `labels` int32 [B, K, L],
                padded; in training `index` int64 [B].
            training: Whether to apply dropout.

        Returns:
            `ExampleLosses`, whose metric `recall_at_10` is the share of a
            caption's tokens, weighted as in the loss, among the 10 of the
            highest probability.
        """
        seeds = None
        if training:
            seeds = stateless_random.example_seeds(self.seed, batch["index"])
        logits = self(batch["image"], seeds, training=training)["logits"]
        special = self.special_tokens
        targets = losses.bag_targets(
            batch["labels"],
            self.head.token_weights,
            {special.pad, special.start, special.eos},
        )
        k = min(_PREDICTIONS, self.vocabulary_size)
        loss, recall, known = losses.bag_cross_entropy(
            logits, batch["labels"], targets, k
        )
        metrics = {f"recall_at_{_PREDICTIONS}": (recall, known)}
        return ExampleLosses(loss, metrics, {})

    def batch_spec(self, size, captions=1):
        """Specs of `image`, `labels` and `index`, as `Task` defines them."""
        height, width = self.vision_encoder.image_size
        labels = [size, captions, self.max_length]
        return {
            "image": tf.TensorSpec([size, height, width, 3], tf.float32),
            "labels": tf.TensorSpec(labels, tf.int32),
            "index": tf.TensorSpec([size], tf.int64),
        }

    def shapes(self, size, captions=1):
        """Shapes of `encoded` and `logits`, as `Task` defines them."""
        del captions
        encoded = self.vision_encoder.output_shapes()["encoded"]
        return {
            "encoded": (size, *encoded),  # [B, P, D]
            "logits": (size, self.vocabulary_size),  # [B, V]
        }

    def check_data(self, data, name):
        """Checks that vocabulary and sizes of a data set fit the model."""
        check_without_prompts(data, name, "BagOfTokens")
        check_texts(data, self, "BagOfTokens")
        check_image_size(data, name, self.vision_encoder)

    def get_config(self):
        """Returns the constructor's arguments."""
        serialize = keras.saving.serialize_keras_object
        names = "vocabulary_size max_length counted_images seed".split()
        return {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": serialize(self.dtype_policy),
            "vision_encoder": serialize(self.vision_encoder),
            "special_tokens": serialize(self.special_tokens),
            **{name: getattr(self, name) for name in names},
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Rebuilds the model from `get_config`'s result."""
        config = dict(config)
        for name in ("vision_encoder", "special_tokens"):
            config[name] = keras.saving.deserialize_keras_object(
                config[name], custom_objects=custom_objects
            )
        return cls(**config)


@keras.saving.register_keras_serializable("cappa_tf")
class TokenHead(keras.layers.Layer):
    """LayerNorm and linear layer over the vocabulary, and token frequencies.

    Args:
        width: Width D of the features.
        vocabulary_size: V.

    Call arguments:
        features: [B, D].

    Returns:
        Logits float32 [B, V].

    Attributes:
        document_frequency: float32 [V], the number of captions with each
            token; not trained.
        num_documents: float32 [1], the number of captions; 0 until they are
            counted.
    """

    def __init__(self, width, vocabulary_size, **kwargs):
        # float32 even under mixed precision, for exact probabilities.
        super().__init__(**{**kwargs, "dtype": "float32"})
        self.width = width
        self.vocabulary_size = vocabulary_size
        self._norm = layer_norm("norm", "float32")
        self._classes = keras.layers.Dense(
            vocabulary_size,
            kernel_initializer="zeros",
            name="classes",
            dtype="float32",
        )

    def build(self, input_shape=None):
        """Creates all weights, whose sizes the constructor determines."""
        for layer in (self._norm, self._classes):
            layer.build((None, self.width))
        self.document_frequency, self.num_documents = (
            self.add_weight(
                name=name, shape=shape, initializer="zeros", trainable=False
            )
            for name, shape in (
                ("document_frequency", (self.vocabulary_size,)),
                ("num_documents", (1,)),
            )
        )
        self.built = True

    def call(self, features):
        """Logits of features; the class describes the shapes."""
        return self._classes(self._norm(features))

    @property
    def token_weights(self):
        """Inverse document frequencies, float32 [V]."""
        return losses.inverse_document_frequency(
            tf.convert_to_tensor(self.document_frequency),
            tf.convert_to_tensor(self.num_documents)[0],
        )

    def get_config(self):
        """Returns the constructor's arguments."""
        sizes = {"width": self.width, "vocabulary_size": self.vocabulary_size}
        return {**super().get_config(), **sizes}
