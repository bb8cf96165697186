"""Tiny models and data sets that can be trained, for tests."""

import dataclasses
import functools

import numpy as np
import tensorflow as tf

from cappa_tf.data.preprocessing import ImagePreprocessing
from cappa_tf.data.tokenizer import Tokenizer, train_tokenizer
from cappa_tf.models.bag_of_tokens import BagOfTokens
from cappa_tf.models.captioner import Captioner
from cappa_tf.models.contrastive import Contrastive
from cappa_tf.models.contrastive_captioner import ContrastiveCaptioner
from cappa_tf.models.contrastive_head import ContrastiveHead
from cappa_tf.models.self_critical import SelfCriticalCaptioner
from cappa_tf.models.text_decoder import TextDecoder
from cappa_tf.models.text_encoder import TextEncoder
from cappa_tf.models.vision_encoder import VisionEncoder
from cappa_tf.training import settings
from cappa_tf.training.optimizers.adafactor import Adafactor
from cappa_tf.training.train import train

WORDS = ("red", "green", "blue", "circle", "square", "left", "above")
LENGTH = 8


@functools.cache
def vocabulary(folder):
    """Trains a vocabulary on a few words; returns its path and size."""
    path = str(folder / "tiny.model")
    captions = [f"{a} {b}" for a in WORDS for b in WORDS]
    return path, train_tokenizer(captions, path, 40)


def make_model(size, **kwargs):
    """A captioner of width 16 for images of 16 x 16 pixels."""
    small = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32}
    encoder = {"patch_size": 8, "image_size": 16, **small, **kwargs}
    return Captioner(
        VisionEncoder(**encoder),
        TextDecoder(
            vocabulary_size=size,
            max_length=LENGTH,
            **{**small, "hidden_dim": encoder["hidden_dim"]},
        ),
        masked_pred_prob=0.5,
        chunk_size=64,
    )


def make_self_critical(size, dropout=0.0, **kwargs):
    """`make_model`'s captioner, trained on samples of its own.

    Args:
        size: Of the vocabulary.
        dropout: Of both parts.
        **kwargs: Arguments of `SelfCriticalCaptioner`.
    """
    small = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32}
    small["dropout"] = dropout
    return SelfCriticalCaptioner(
        VisionEncoder(patch_size=8, image_size=16, **small),
        TextDecoder(size, LENGTH, **small),
        **{
            "masked_pred_prob": 0.5,
            "chunk_size": 64,
            "captioning_weight": 0.0,
            **kwargs,
        },
    )


def make_contrastive(size, **kwargs):
    """Two towers of width 16 for images of 16 x 16 pixels.

    Args:
        size: Of the vocabulary.
        **kwargs: Of `Contrastive`, and of `VisionEncoder` where it has them;
            `dropout` is that of both towers.
    """
    small = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32}
    small["dropout"] = kwargs.pop("dropout", 0.0)
    names = "pooling patch_dropout image_size patch_size num_heads".split()
    image = {name: kwargs.pop(name) for name in names if name in kwargs}
    return Contrastive(
        VisionEncoder(**{"patch_size": 8, "image_size": 16, **small, **image}),
        TextEncoder(size, LENGTH, **small),
        **{"embedding_dim": 8, **kwargs},
    )


def make_contrastive_captioner(size, dropout=0.0, **kwargs):
    """The captioner and the text tower of the other two, on one encoder.

    Args:
        size: Pieces of the vocabulary.
        dropout: Of all towers.
        **kwargs: Arguments of `ContrastiveCaptioner`.
    """
    small = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32}
    small["dropout"] = dropout
    return ContrastiveCaptioner(
        VisionEncoder(patch_size=8, image_size=16, **small),
        TextDecoder(size, LENGTH, **small),
        TextEncoder(size, LENGTH, **small),
        ContrastiveHead(16, 16, 8),
        **{"masked_pred_prob": 0.5, "chunk_size": 64, **kwargs},
    )


def make_bag_of_tokens(size, **kwargs):
    """The encoder of the others, that predicts the tokens of captions."""
    small = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32}
    return BagOfTokens(
        VisionEncoder(patch_size=8, image_size=16, **small),
        size,
        LENGTH,
        **kwargs,
    )


class Data:
    """Images in a color that their two words determine, made in memory."""

    image_size = (16, 16)
    path = "tiny"
    preprocessing = ImagePreprocessing(image_size, max_pixels=None)

    def __init__(self, folder, examples=32, poison=None, captions=1):
        self.captions_per_image = captions
        self.tokenizer = Tokenizer(vocabulary(folder)[0], max_length=LENGTH)
        self.skipped = {}
        random = np.random.RandomState(0)
        pairs = random.randint(len(WORDS), size=(examples, 2))
        self._texts = [f"{WORDS[a]} {WORDS[b]}" for a, b in pairs]
        self._labels = self.tokenizer(self._texts).numpy()
        pixels = random.uniform(-0.1, 0.1, (examples, 16, 16, 3))
        pixels[..., :2] += pairs[:, None, None] / len(WORDS)
        self._images = pixels.astype("float32")
        self._poison = poison
        self._read = []

    def read_captions(self, limit):
        for text in self._texts[:limit]:
            yield [text]

    def _example(self, index):
        image = tf.gather(self._images, index % len(self._images))
        if self._poison is not None:
            image = tf.where(index == self._poison, np.nan, image)
        others = tf.range(self.captions_per_image, dtype=tf.int64)
        labels = tf.gather(self._labels, (index + others) % len(self._labels))
        return {"image": image, "labels": labels, "index": index}

    def train(self, batch_size, start_index=0, seed=0, host=0, num_hosts=1):
        del seed
        first = start_index + (host - start_index) % num_hosts
        stream = tf.data.Dataset.range(first, 2**40, num_hosts)
        stream = stream.map(self._example)
        return stream.batch(batch_size, drop_remainder=True)

    def evaluate(self, batch_size, host=0, num_hosts=1):
        count = len(self._images)
        together = batch_size * num_hosts
        padded = -(-count // together) * together

        def masked(index):
            real = tf.cast(index < count, tf.float32)
            return {**self._example(index), "_mask": real}

        stream = tf.data.Dataset.range(host, padded, num_hosts).map(masked)
        return stream.batch(batch_size, drop_remainder=True)


def arguments(folder, **overrides):
    """Arguments and settings of `train` for a run of four steps."""
    size = vocabulary(folder)[1]
    return {
        "model": lambda: make_model(size),
        "optimizer": lambda: Adafactor(learning_rate=0.01),
        "train_data": Data(folder),
        "total_steps": 4,
        "batch_size": 8,
        "steps_per_loop": 2,
        "log_steps": 2,
        "checkpoint_steps": 2,
        "sample_images": 0,
        "image_use_images": 0,
        "final_evaluation": False,
        **overrides,
    }


def with_settings(**flat):
    """Arguments of `train`, where each setting is in its object."""
    objects = {
        "settings": settings.RunSettings,
        "evaluation": settings.EvaluationSettings,
        "compute": settings.ComputeSettings,
        "weights": settings.WeightSettings,
        "features": settings.FeatureSettings,
    }
    found = {}
    for argument, cls in objects.items():
        names = [field.name for field in dataclasses.fields(cls)]
        given = {name: flat.pop(name) for name in names if name in flat}
        found[argument] = cls(**given)
    return {**found, **flat}


def run(folder, **overrides):
    """Trains; returns the result of `train`."""
    return train(**with_settings(**arguments(folder, **overrides)))
