"""Contrastive captioner: captioning and contrastive loss on one image tower.

Abbreviations for dimensions:
    B: batch (of images).      H, W: height and width of the image in pixels.
    K: captions per image.     L: length of the text.
    T: texts.                  C: width of the embeddings.
"""

import keras
import tensorflow as tf

from cappa_tf.models import contrastive
from cappa_tf.models.captioner import Captioner
from cappa_tf.models.data_checks import check_texts, check_without_prompts
from cappa_tf.models.task import WholeBatchTask
from cappa_tf.utils.arguments import check_number


@keras.saving.register_keras_serializable("cappa_tf")
class ContrastiveCaptioner(Captioner, WholeBatchTask):
    """A captioner whose vision encoder is also trained contrastively.

    The image is encoded once. The decoder reads its patches, `encoded`, and
    predicts all K captions as those of a `Captioner` are predicted; the pooled
    feature, `pre_logits`, is compared with the first caption of each image of
    the global batch, as in `Contrastive`. The loss is the weighted sum of the
    two.

    Args:
        vision_encoder: `VisionEncoder` that pools.
        text_decoder: As for `Captioner`.
        text_encoder: `TextEncoder` for the vocabulary of the decoder and texts
            of at least its length.
        contrastive_head: `ContrastiveHead` of the widths of the two encoders.
        captioning_weight: Factor of the captioning loss.
        contrastive_weight: Factor of the contrastive loss.
        **kwargs: Further arguments of `Captioner`.

    Reference: arXiv 2205.01917 (CoCa). Deviations: its decoder is trained left
    to right only, and its text encoder is the lower half of the decoder.
    """

    needs_whole_batch = True
    takes_features = False  # The pooled feature and the patches.
    # Both losses matter: their sum selects the best weights.
    selection_metric = "loss"
    short_names = {**Captioner.short_names, **contrastive.SHORT_NAMES}
    _PARTS = (*Captioner._PARTS, "text_encoder", "contrastive_head")
    _ARGUMENTS = (
        *Captioner._ARGUMENTS,
        "captioning_weight",
        "contrastive_weight",
    )

    def __init__(
        self,
        vision_encoder,
        text_decoder,
        text_encoder,
        contrastive_head,
        *,
        captioning_weight=1.0,
        contrastive_weight=1.0,
        **kwargs,
    ):
        super().__init__(vision_encoder, text_decoder, **kwargs)
        contrastive.check_pooling(vision_encoder)
        _check_texts_fit(text_decoder, text_encoder)
        _check_widths_fit(vision_encoder, text_encoder, contrastive_head)
        self.text_encoder = text_encoder
        self.contrastive_head = contrastive_head
        self.captioning_weight = check_number(
            "captioning_weight", captioning_weight
        )
        self.contrastive_weight = check_number(
            "contrastive_weight", contrastive_weight
        )

    @property
    def embedding_width(self):
        """Width C of the embeddings."""
        return self.contrastive_head.width

    # Predictions.

    def embed_images(self, images):
        """Normalized embeddings in inference.

        Args:
            images: float [B, H, W, 3] in [-1, 1].

        Returns:
            float32 [B, C].
        """
        outputs = self.vision_encoder(images, training=False)
        return self.contrastive_head.embed_images(outputs["pre_logits"])

    def embed_texts(self, labels, seeds=None, training=False):
        """Normalized embeddings of texts.

        Args:
            labels: int [T, L] token ids, padded.
            seeds: uint32 [T] of what is dropped in training.
            training: Whether to drop.

        Returns:
            float32 [T, C].
        """
        return contrastive.embed_texts(self, labels, seeds, training)

    # Training.

    # `Captioner` defines it, too, and comes first.
    example_losses = WholeBatchTask.example_losses

    def embed(self, batch, training):
        """Embeddings of the pairs of a batch, and its captioning losses.

        Args:
            batch: As for `Captioner.compute_losses`.
            training: Whether to choose objectives and apply dropout.

        Returns:
            As `WholeBatchTask.embed`.
        """
        labels = batch["labels"]
        seeds = self._example_seeds(batch, training)
        outputs = self.vision_encoder(
            batch["image"],
            seeds=seeds,
            training=self.trains("vision_encoder", training),
        )
        images = self.contrastive_head.embed_images(outputs["pre_logits"])
        texts = self.embed_texts(
            contrastive.first_captions(labels), seeds, training
        )
        parts = self._decoder_losses(
            labels, outputs["encoded"], seeds, training
        )
        losses = self._figures(parts, training)
        return images, texts, losses.times(self.captioning_weight)

    def batch_losses(self, images, texts, own, mask=None):
        """Weighted losses of own pairs against the global batch."""
        losses = self.contrastive_head.losses(images, texts, own, mask)
        return losses.times(self.contrastive_weight)

    def shapes(self, size, captions=1):
        """Shapes of the captioner, the text encoder and the embeddings."""
        text = self.text_encoder
        return {
            **super().shapes(size, captions),
            "encoded_text": (size, text.max_length, text.hidden_dim),
            "embeddings": (size, self.embedding_width),
        }

    def check_data(self, data, name):
        """Checks that vocabulary and sizes of a data set fit both towers."""
        check_without_prompts(data, name, type(self).__name__)
        super().check_data(data, name)
        check_texts(data, self.text_encoder, "TextEncoder")

    # Scores.

    @property
    def score_kinds(self):
        """Kinds of scores of the captioner, and the cosine of embeddings."""
        return (*super().score_kinds, contrastive.COSINE)

    def score_texts(self, images, labels, kind, prompt_lengths=None):
        """Scores of every text for every image, float32 [B, T]."""
        if kind == contrastive.COSINE:
            texts = self.embed_texts(labels)
            return tf.matmul(self.embed_images(images), texts, transpose_b=True)
        return super().score_texts(images, labels, kind, prompt_lengths)

    def score_own_texts(self, images, labels, kind, prompt_lengths=None):
        """Scores of each image's own texts, float32 [B, K]."""
        if kind == contrastive.COSINE:
            return contrastive.own_cosines(self, images, labels)
        return super().score_own_texts(images, labels, kind, prompt_lengths)


def _check_texts_fit(decoder, encoder):
    """Checks that both read the same token ids, and the encoder all texts."""
    names = ("vocabulary_size", "max_length", "pad", "eos")
    sides = [
        (tower.vocabulary_size, tower.max_length, special.pad, special.eos)
        for tower in (decoder, encoder)
        for special in [tower.special_tokens]
    ]
    first, second = (dict(zip(names, side)) for side in sides)
    longer = second["max_length"] >= first["max_length"]
    if {**first, "max_length": 0} != {**second, "max_length": 0} or not longer:
        raise ValueError(
            "The text encoder must have the decoder's vocabulary and special "
            "tokens, and at least its `max_length`. Received: text_decoder "
            f"with {first}, text_encoder with {second}"
        )


def _check_widths_fit(vision_encoder, text_encoder, head):
    widths = (vision_encoder.hidden_dim, text_encoder.hidden_dim)
    if (head.image_dim, head.text_dim) != widths:
        raise ValueError(
            "`image_dim` and `text_dim` of the contrastive head must be the "
            f"widths of the encoders, {widths}. Received: "
            f"image_dim={head.image_dim}, text_dim={head.text_dim}"
        )
