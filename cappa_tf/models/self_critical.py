"""Captioner that is fine-tuned for the scores of the captions it samples.

Abbreviations for dimensions:
    B: batch (of images).      K: captions per image.
    S: samples per image.      L: length of the text.
    N: B * S.                  P: number of patches.  D: width.
"""

import keras
import tensorflow as tf

from cappa_tf.models import generation, sampling, stateless_random
from cappa_tf.models.captioner import Captioner
from cappa_tf.models.counted_captions import counted_captions
from cappa_tf.models.data_checks import check_without_prompts
from cappa_tf.models.losses import bleu, cider
from cappa_tf.models.task import ExampleLosses
from cappa_tf.utils.arguments import (
    check_counts,
    check_integer,
    check_number,
)

_SAMPLES_SALT = stateless_random.salt_of("self_critical/samples")


@keras.saving.register_keras_serializable("cappa_tf")
class SelfCriticalCaptioner(Captioner):
    """Captioner trained on its own samples: those of high CIDEr get likelier.

    For each image some captions are sampled left to right. Each one's reward is
    its CIDEr-D against the captions of the image, and, if it has a weight, its
    BLEU-4; the gradient is that of the expected reward (REINFORCE), with the
    mean reward of the image's other samples as the baseline. Samples are of the
    decoder without dropout, as in inference.

    It is meant for a captioner that is trained already: one that knows nothing
    samples nothing that is worth a reward. Captions become more like the
    references on average, and less different from each other.

    Args:
        vision_encoder: As in `Captioner`.
        text_decoder: As in `Captioner`.
        num_samples: S, at least 2; 0 trains as `Captioner` does, as in the
            first stage of a run.
        bleu_weight: Weight of BLEU-4, in [0, 1], in a reward where CIDEr-D, in
            [0, 10], has the weight 1.
        captioning_weight: Weight of `Captioner`'s loss, which is added. With 0
            captions lose their grammar to n-grams that are often right.
        counted_images: Number of training images whose captions `prepare`
            counts, for how rare n-grams are.
        **kwargs: Further arguments of `Captioner`.

    Reference: arXiv 1612.00563 (self-critical sequence training); arXiv
    2003.09971 for the baseline. Deviation: the scores are those of tokens, eos
    among them, not of words.
    """

    short_names = {
        **Captioner.short_names,
        "sampled/cider": "cider",
        "sampled/bleu_4": "bleu",
    }
    _ARGUMENTS = (
        *Captioner._ARGUMENTS,
        "num_samples",
        "bleu_weight",
        "captioning_weight",
        "counted_images",
    )

    def __init__(
        self,
        vision_encoder,
        text_decoder,
        *,
        num_samples=5,
        bleu_weight=0.0,
        captioning_weight=1.0,
        counted_images=100_000,
        **kwargs,
    ):
        super().__init__(vision_encoder, text_decoder, **kwargs)
        check_integer("num_samples", num_samples, 0)
        check_number("bleu_weight", bleu_weight)
        check_number("captioning_weight", captioning_weight)
        check_counts(counted_images=counted_images)
        if num_samples == 1:
            raise ValueError(
                "`num_samples` must be 0 or at least 2: the other samples are "
                f"the baseline. Received: num_samples={num_samples}"
            )
        if num_samples and not self.predicts_texts:
            raise ValueError(
                "Captions are sampled left to right, which `masked_pred_prob` "
                "1 does not train. Received: "
                f"masked_pred_prob={self.masked_pred_prob}"
            )
        self.num_samples = num_samples
        self.bleu_weight = bleu_weight
        self.captioning_weight = captioning_weight
        self.counted_images = counted_images
        self.rarity = NgramRarity(name="rarity")

    def build(self, input_shape=None):
        """Creates all weights, whose sizes the constructors determine."""
        if not self.rarity.built:
            self.rarity.build()
        super().build(input_shape)

    def prepare(self, data):
        """Counts in how many images' captions of the data n-grams occur.

        Args:
            data: Has `tokenizer` and `read_captions(limit)`.

        Returns:
            A log line that says how many images were counted.
        """
        pad = self._special_tokens.pad
        counts = documents = 0
        for images in counted_captions(data, self.counted_images):
            counts = counts + cider.count_documents(images, pad)
            documents += len(images)
        self.rarity.frequencies.assign(counts)
        self.rarity.documents.assign([documents])
        return f"n-grams counted in the captions of {documents:,} images"

    def check_data(self, data, name):
        """Checks that vocabulary and sizes of a data set fit the model."""
        check_without_prompts(data, name, type(self).__name__)
        super().check_data(data, name)

    def example_losses(self, batch, training):
        """Losses of a batch: in training, of samples and their rewards.

        Args:
            batch: As in `Captioner.compute_losses`. Its captions are the
                references of an image: `captions_per_image` should be "all".
            training: Whether to sample; if not, as `Captioner`.

        Returns:
            `ExampleLosses`, with the metrics `sampled/cider` and, if it is
            rewarded, `sampled/bleu_4`: means over the samples.
        """
        if not training or not self.num_samples:
            return super().example_losses(batch, training)
        seeds = self._example_seeds(batch, training)
        encoded = self._encoded(batch, seeds, training)
        losses = self._sampled_losses(batch["labels"], encoded, seeds)
        if self.captioning_weight:
            parts = self._decoder_losses(
                batch["labels"], encoded, seeds, training
            )
            figures = self._figures(parts, training)
            tokens = losses.counts["tokens"] + figures.counts["tokens"]
            losses = losses.plus(figures.times(self.captioning_weight))
            losses = losses._replace(counts={"tokens": tokens})
        return losses

    def _sampled_losses(self, references, encoded, seeds):
        """The loss of the samples, whose gradient is that of the reward."""
        samples = self._sample(tf.stop_gradient(encoded), seeds)  # [B, S, L]
        pad = self._special_tokens.pad
        scores = {
            "sampled/cider": cider.cider_d(
                samples,
                references,
                tf.convert_to_tensor(self.rarity.frequencies),
                tf.convert_to_tensor(self.rarity.documents)[0],
                pad,
            )
        }
        rewards = scores["sampled/cider"]  # [B, S]
        if self.bleu_weight:
            found = bleu.bleu_4(samples, references, pad)
            scores["sampled/bleu_4"] = found
            rewards += self.bleu_weight * found
        others = tf.reduce_sum(rewards, 1, keepdims=True) - rewards
        advantage = rewards - others / (self.num_samples - 1)  # [B, S]
        flat = tf.reshape(samples, [-1, samples.shape[2]])  # [N, L]
        hidden = self.text_decoder(
            self.text_decoder.shift_right(flat),
            self.text_decoder.project_memory(encoded),
        )
        nll, _ = self._token_losses(hidden, flat, label_smoothing=0.0)
        nll = tf.reshape(tf.reduce_sum(nll, 1), tf.shape(rewards))
        ones = tf.ones_like(rewards[:, 0])
        real = tf.cast(samples != pad, tf.float32)
        return ExampleLosses(
            tf.reduce_mean(tf.stop_gradient(advantage) * nll, 1),
            {
                name: (tf.reduce_mean(score, 1), ones)
                for name, score in scores.items()
            },
            {"tokens": tf.reduce_sum(real, [1, 2])},
        )

    def _sample(self, encoded, seeds):
        """Samples captions, int32 [B, S, L]."""
        plan = self.plan_generation(
            sampler=sampling.RandomSearch(), num_captions=self.num_samples
        )
        uniform = stateless_random.uniform(
            seeds, (plan.length, plan.sequences), _SAMPLES_SALT
        )
        batch = encoded.shape[0] or tf.shape(encoded)[0]
        tokens, _ = generation.decode(
            self.text_decoder,
            self.text_decoder.project_memory(encoded),
            plan.search,
            plan.rules,
            size=(batch, plan.sequences, plan.length),
            prefix=plan.prefix,
            uniform=uniform,
        )
        return tf.stop_gradient(tokens)


@keras.saving.register_keras_serializable("cappa_tf")
class NgramRarity(keras.layers.Layer):
    """In how many images' captions n-grams occur, by their hash.

    Attributes:
        frequencies: float32 [orders, buckets]; not trained.
        documents: float32 [1], the number of images; 0 until they are counted.
    """

    def __init__(self, **kwargs):
        super().__init__(**{**kwargs, "dtype": "float32"})

    def build(self, input_shape=None):
        """Creates the tables."""
        del input_shape
        self.frequencies, self.documents = (
            self.add_weight(
                name=name, shape=shape, initializer="zeros", trainable=False
            )
            for name, shape in (
                ("frequencies", (cider.ORDERS, cider.BUCKETS)),
                ("documents", (1,)),
            )
        )
        self.built = True
