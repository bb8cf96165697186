"""Contrastive models: an image tower and a text tower.

Abbreviations for dimensions:
    B: pairs of the batch.     H, W: height and width of the image in pixels.
    K: captions per image.     L: length of the text.
    T: texts.                  C: width of the embeddings.
"""

import keras
import tensorflow as tf

from cappa_tf.models import stateless_random
from cappa_tf.models.contrastive_head import ContrastiveHead
from cappa_tf.models.data_checks import (
    check_image_size,
    check_texts,
    check_without_prompts,
)
from cappa_tf.models.task import ExampleLosses, WholeBatchTask
from cappa_tf.utils.arguments import check_integer

# The kind of score of `score_texts`: the cosine of the embeddings.
COSINE = "cosine"
# Of the metrics of `ContrastiveHead.losses`, see `Task.short_names`.
SHORT_NAMES = {
    "contrastive/loss": None,
    "contrastive/accuracy": "acc",
    "contrastive/temperature": "t",
    "contrastive/bias": "b",
}


@keras.saving.register_keras_serializable("cappa_tf")
class Contrastive(WholeBatchTask):
    """Two towers trained to distinguish matching pairs from all others.

    This is CLIP* of the CapPa paper with the softmax loss, SigLIP with the
    sigmoid loss, and LiT if the image tower is frozen.

    Args:
        vision_encoder: `VisionEncoder` whose `pooling` is not "none".
        text_encoder: `TextEncoder`.
        embedding_dim: Width of the embeddings, or a pair (image, text); None
            for a tower without a projection, as in `ContrastiveHead`.
        loss: "softmax" or "sigmoid".
        temperature: Initial value of the learned temperature.
        bias: Initial value of the learned bias, or None.
        chunk_size: Rows of the logits that are held in memory at a time.
        seed: Seed of dropout, together with each example's `index`.

    Call arguments:
        inputs: {"image": [B, H, W, 3] in [-1, 1], "labels": int [T, L]}.
        training: Whether to apply dropout.

    Returns:
        Logits float32 [B, T].

    Reference: arXiv 2103.00020, 2303.15343, 2111.07991; big_vision
    models/proj/image_text/two_towers.py.
    """

    takes_features = True
    short_names = SHORT_NAMES

    def __init__(
        self,
        vision_encoder,
        text_encoder,
        *,
        embedding_dim=None,
        loss="softmax",
        temperature=10.0,
        bias=None,
        chunk_size=None,
        seed=0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_integer("seed", seed)
        self.vision_encoder = vision_encoder
        self.text_encoder = text_encoder
        self.contrastive_head = contrastive_head(
            vision_encoder,
            text_encoder,
            embedding_dim=embedding_dim,
            loss=loss,
            temperature=temperature,
            bias=bias,
            chunk_size=chunk_size,
        )
        self.seed = seed

    @property
    def parts(self):
        """Dict of the two towers and the head that compares them."""
        return {
            "vision_encoder": self.vision_encoder,
            "text_encoder": self.text_encoder,
            "contrastive_head": self.contrastive_head,
        }

    @property
    def embedding_width(self):
        """Width C of the embeddings."""
        return self.contrastive_head.width

    # Predictions.

    def embed_images(self, images, seeds=None, training=False):
        """Normalized embeddings of images.

        Args:
            images: float [B, H, W, 3] in [-1, 1].
            seeds: uint32 [B], dropout seeds in training.
            training: Whether to apply dropout.

        Returns:
            float32 [B, C].
        """
        training = self.trains("vision_encoder", training)
        outputs = self.vision_encoder(images, seeds=seeds, training=training)
        return self.contrastive_head.embed_images(outputs["pre_logits"])

    def embed_features(self, features):
        """Normalized embeddings of images by their features.

        Args:
            features: float [B, D], `pre_logits` of the vision encoder, or
                [B, P, D], its `encoded`.

        Returns:
            float32 [B, C].
        """
        if features.shape.rank == 3:
            features = self.vision_encoder.pool(features)
        return self.contrastive_head.embed_images(features)

    def embed_texts(self, labels, seeds=None, training=False):
        """Normalized embeddings of texts.

        Args:
            labels: int [T, L] token ids, padded.
            seeds: uint32 [T], dropout seeds in training.
            training: Whether to apply dropout.

        Returns:
            float32 [T, C].
        """
        return embed_texts(self, labels, seeds, training)

    def logits(self, images, labels, training=False):
        """Scaled and shifted similarities of images and texts.

        Args:
            images: float [B, H, W, 3] in [-1, 1].
            labels: int [T, L] token ids, padded.
            training: Whether to apply dropout.

        Returns:
            float32 [B, T].
        """
        return self.contrastive_head.logits(
            self.embed_images(images, training=training),
            self.embed_texts(labels, training=training),
        )

    def call(self, inputs, training=False):
        """Logits of a dict with "image" and "labels", float32 [B, T]."""
        return self.logits(inputs["image"], inputs["labels"], training)

    # Training.

    def embed(self, batch, training):
        """Embeddings of the pairs of a batch, one caption per image.

        Args:
            batch: Dict with `image` [B, H, W, 3], or in its place
                `image_features` as `embed_features` takes them; `labels` int32
                [B, K, L], padded, of which the first caption is used; in
                training `index` int64 [B].
            training: Whether to apply dropout.

        Returns:
            (images, texts), as `WholeBatchTask.embed` returns them.
        """
        labels = first_captions(batch["labels"])
        seeds = None
        if training:
            seeds = stateless_random.example_seeds(self.seed, batch["index"])
        if "image_features" in batch:
            images = self.embed_features(batch["image_features"])
        else:
            images = self.embed_images(batch["image"], seeds, training)
        texts = self.embed_texts(labels, seeds, training)
        return images, texts, ExampleLosses(tf.zeros_like(images[:, 0]), {}, {})

    def batch_losses(self, images, texts, own, mask=None):
        """Losses of own pairs against the global batch."""
        return self.contrastive_head.losses(images, texts, own, mask)

    def batch_spec(self, size, captions=1):
        """Images, labels [size, captions, L] and indices."""
        labels = [size, captions, self.text_encoder.max_length]
        return {
            **self.image_spec(size),
            "labels": tf.TensorSpec(labels, tf.int32),
            "index": tf.TensorSpec([size], tf.int64),
        }

    def shapes(self, size, captions=1):
        """Encoded images and texts, and the logits of a chunk."""
        del captions
        text = self.text_encoder
        encoded = self.vision_encoder.output_shapes()["encoded"]
        encoded = {"encoded": (size, *encoded)}  # [B, P, D]
        return {
            **(encoded if self.feature_kind is None else {}),
            "encoded_text": (size, text.max_length, text.hidden_dim),
            "embeddings": (size, self.contrastive_head.width),
        }

    def check_data(self, data, name):
        """Checks that vocabulary and sizes of a data set fit the model."""
        check_without_prompts(data, name, type(self).__name__)
        check_texts(data, self.text_encoder, "TextEncoder")
        check_image_size(data, name, self.vision_encoder)
        if name == "train_data" and data.captions_per_image != 1:
            raise ValueError(
                "A contrastive model trains on one caption of an image at a "
                "time: leave CaptionDataset.captions_per_image at 1, which "
                "samples another one each epoch. Received: "
                f"captions_per_image={data.captions_per_image!r}"
            )

    # Scores.

    @property
    def score_kinds(self):
        """Kinds of scores, only the cosine of the embeddings."""
        return (COSINE,)

    def score_texts(self, images, labels, kind=COSINE):
        """Cosines float32 [B, T] of all images and texts."""
        del kind
        return tf.matmul(
            self.embed_images(images),
            self.embed_texts(labels),
            transpose_b=True,
        )

    def score_own_texts(self, images, labels, kind=COSINE):
        """Cosines float32 [B, K] of images and their own texts."""
        del kind
        return own_cosines(self, images, labels)

    # Serialization.

    def get_config(self):
        """Returns the constructor's arguments."""
        serialize = keras.saving.serialize_keras_object
        head = self.contrastive_head
        return {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": serialize(self.dtype_policy),
            "vision_encoder": serialize(self.vision_encoder),
            "text_encoder": serialize(self.text_encoder),
            "seed": self.seed,
            **{name: getattr(head, name) for name in HEAD_ARGUMENTS},
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Rebuilds the model from `get_config`'s result."""
        config = dict(config)
        for part in ("vision_encoder", "text_encoder"):
            config[part] = keras.saving.deserialize_keras_object(
                config[part], custom_objects=custom_objects
            )
        return cls(**config)


HEAD_ARGUMENTS = ("embedding_dim", "loss", "temperature", "bias", "chunk_size")


def contrastive_head(vision_encoder, text_encoder, **arguments):
    """Makes the head of two towers.

    Args:
        vision_encoder: `VisionEncoder`.
        text_encoder: `TextEncoder`.
        **arguments: Arguments of `ContrastiveHead`.

    Raises:
        ValueError: If the image tower does not pool, or `ContrastiveHead`
            refuses an argument.
    """
    check_pooling(vision_encoder)
    return ContrastiveHead(
        vision_encoder.hidden_dim,
        text_encoder.hidden_dim,
        **arguments,
        name="contrastive_head",
    )


def check_pooling(vision_encoder):
    """Checks that an image tower has the feature that embeddings need."""
    if vision_encoder.pooling == "none":
        raise ValueError(
            "A contrastive model needs a vision encoder that pools. Received: "
            "pooling='none'"
        )


def embed_texts(task, labels, seeds=None, training=False):
    """Normalized embeddings [T, C] of labels [T, L], by a task's text tower."""
    labels = tf.convert_to_tensor(labels, tf.int32)
    training = task.trains("text_encoder", training)
    outputs = task.text_encoder(labels, seeds=seeds, training=training)
    return task.contrastive_head.embed_texts(outputs["pre_logits"])


def own_cosines(task, images, labels):
    """Cosines [B, K] of images [B, ...] and labels [B, K, L]."""
    labels = tf.convert_to_tensor(labels, tf.int32)
    shape = tf.shape(labels)
    texts = task.embed_texts(tf.reshape(labels, [-1, shape[2]]))
    texts = tf.reshape(texts, [shape[0], shape[1], texts.shape[1]])
    return tf.einsum("bc,bkc->bk", task.embed_images(images), texts)


def first_captions(labels):
    """The first caption [B, L] of each image of labels [B, K, L]."""
    if labels.shape.rank != 3:
        raise ValueError(
            "`labels` must be [B, K, L], K captions of each image. "
            f"Received: labels of shape {labels.shape}"
        )
    return labels[:, 0]
