"""Captioner: encoder, decoder and the two objectives that train them.

Abbreviations for dimensions:
    B: batch (of images).      H, W: height and width of the image in pixels.
    K: captions per image.     N: captions in the batch, B * K.
    L: length of the text.     P: number of patches.
    D: width.                  V: vocabulary.
"""

import dataclasses

import keras
import tensorflow as tf

from cappa_tf.models import stateless_random
from cappa_tf.models.data_checks import check_image_size, check_texts
from cappa_tf.models.inference import Inference
from cappa_tf.models.losses import cross_entropy
from cappa_tf.models.task import ExampleLosses, Task
from cappa_tf.utils.arguments import check_counts, check_fraction

_PARALLEL_SALT = stateless_random.salt_of("captioner/parallel")
_MASKING_SALT = stateless_random.salt_of("captioner/masking")
_CAPTION_SALT = stateless_random.salt_of("captioner/caption")


@keras.saving.register_keras_serializable("cappa_tf")
class Captioner(Inference, Task):
    """Encoder and decoder trained by captioning, "CapPa" by default.

    Each training example is predicted either left to right (autoregressive,
    "Cap") or all at once from MASK tokens (parallel, "Pa"), chosen at random.

    Args:
        vision_encoder: `VisionEncoder`; the decoder attends to its `encoded`.
        text_decoder: `TextDecoder` with `encoder_dim` = the encoder's width.
        masked_pred_prob: Probability that a training example is predicted in
            parallel; 0 is "Cap".
        masking_ratio: Fraction of the L input positions that are MASK in a
            parallel example; the others show their own token.
        label_smoothing: Fraction of the target's probability that is spread
            over the whole vocabulary.
        seed: Seed of all random choices, together with each example's `index`.
        chunk_size: Positions whose logits are held in memory at a time.

    Reference: arXiv 2306.07915, section 3; big_vision
    models/proj/cappa/cappa.py `Model`, trainers/proj/cappa/generative.py.
    """

    selection_metric = "nll_per_token"
    can_generate = True
    short_names = {
        "autoregressive/loss": "cap",
        "autoregressive/nll_per_token": "cap/token",
        "parallel/loss": "pa",
        "parallel/nll_per_token": "pa/token",
        "nll_per_token": None,
    }

    def __init__(
        self,
        vision_encoder,
        text_decoder,
        *,
        masked_pred_prob=0.75,
        masking_ratio=1.0,
        label_smoothing=0.0,
        seed=0,
        chunk_size=cross_entropy.DEFAULT_CHUNK_SIZE,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_fraction(
            masked_pred_prob=masked_pred_prob,
            masking_ratio=masking_ratio,
            label_smoothing=label_smoothing,
        )
        check_counts(chunk_size=chunk_size)
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(f"`seed` must be an int. Received: seed={seed!r}")
        if masked_pred_prob > 0.0:
            text_decoder.special_tokens.require_mask()
        if text_decoder.encoder_dim != vision_encoder.hidden_dim:
            raise ValueError(
                "The decoder's `encoder_dim` must be the encoder's "
                "`hidden_dim`. Received: "
                f"encoder_dim={text_decoder.encoder_dim}, "
                f"hidden_dim={vision_encoder.hidden_dim}"
            )
        self.vision_encoder = vision_encoder
        self.text_decoder = text_decoder
        self.masked_pred_prob = masked_pred_prob
        self.masking_ratio = masking_ratio
        self.label_smoothing = label_smoothing
        self.seed = seed
        self.chunk_size = chunk_size

    @property
    def parts(self):
        """Dict of the two parts, "vision_encoder" and "text_decoder"."""
        return {
            "vision_encoder": self.vision_encoder,
            "text_decoder": self.text_decoder,
        }

    # Predictions.

    def encode(self, images, seeds=None, training=False):
        """Encoded patches [B, P, D] of images [B, H, W, 3]."""
        training = self.trains("vision_encoder", training)
        outputs = self.vision_encoder(images, seeds=seeds, training=training)
        return outputs["encoded"]

    def call(self, inputs, training=False):
        """Autoregressive `logits` of a dict with "image" and "labels"."""
        return self.logits(inputs["image"], inputs["labels"], training=training)

    def logits(self, images, labels, parallel=False, training=False):
        """Logits of every token at every position.

        Args:
            images: float [B, H, W, 3] in [-1, 1].
            labels: int32 [B, L] or [B, K, L], the captions (not shifted),
                padded.
            parallel: If False, position t sees the labels before t; if True,
                every position sees only MASK tokens and the image.
            training: Whether to apply dropout.

        Returns:
            float32 [B, L, V] or [B, K, L, V].
        """
        labels = tf.convert_to_tensor(labels, tf.int32)
        flat = tf.reshape(labels, [-1, labels.shape[-1]])  # -> [N, L]
        decoder = self.text_decoder
        encoded = self.encode(images, training=training)
        memory = decoder.project_memory(encoded)
        if parallel:
            tokens = tf.fill(
                tf.shape(flat), decoder.special_tokens.require_mask()
            )
            everywhere = tf.fill(tf.shape(flat)[:1], True)
        else:
            tokens, everywhere = decoder.shift_right(flat), None
        training = self.trains("text_decoder", training)
        hidden = decoder(tokens, memory, parallel=everywhere, training=training)
        logits = decoder.logits(hidden)
        shape = tf.concat([tf.shape(labels), logits.shape[-1:]], axis=0)
        return tf.reshape(logits, shape)

    # Training.

    def compute_losses(self, batch, training=True):
        """Losses of a batch, one value per example.

        In training the objective of each example is chosen at random; in
        evaluation all examples are autoregressive.

        Args:
            batch: Dict with `image` [B, H, W, 3]; `labels` int32 [B, K, L],
                padded; in training `index` int64 [B], the position of the
                example in the training stream. If L is cut to the batch's
                longest caption (`length_buckets`), parallel prediction sees
                fewer MASK positions than in the reference, which always has
                64: a deviation.
            training: Whether to choose objectives and apply dropout.

        Returns:
            Dict of float32 [B]: `loss`, the mean over each caption's tokens,
            then over the example's K captions (the training loss is the mean
            of this over the global batch); `nll`, summed over all tokens,
            without smoothing; `tokens`, their number; `parallel`, 1 if the
            example was predicted in parallel, else 0.
        """
        labels = batch["labels"]
        if labels.shape.rank != 3:
            raise ValueError(
                "`labels` must be [B, K, L], K captions of each image. "
                f"Received: labels of shape {labels.shape}"
            )
        count, captions = tf.shape(labels)[0], labels.shape[1]
        seeds = caption_seeds = None
        if training:
            seeds = stateless_random.example_seeds(
                self.seed, self._index(batch)
            )
            caption_seeds = self._caption_seeds(seeds, captions)
        parallel = self._sample_parallel(seeds, count)
        encoded = self.encode(batch["image"], seeds, training)
        flat = tf.reshape(labels, [-1, labels.shape[2] or tf.shape(labels)[2]])
        repeated = tf.repeat(parallel, captions)
        hidden = self.text_decoder(
            self._decoder_inputs(flat, repeated, caption_seeds),
            self.text_decoder.project_memory(encoded),
            parallel=repeated,
            seeds=caption_seeds,
            training=self.trains("text_decoder", training),
        )
        loss, nll = self._token_losses(hidden, flat)
        real = labels != self.text_decoder.special_tokens.pad
        per_caption = cross_entropy.caption_mean(
            loss, tf.reshape(real, tf.shape(flat))
        )
        tokens = tf.reduce_sum(tf.cast(real, tf.float32), axis=[1, 2])
        by_image = tf.reshape(tf.reduce_sum(nll, -1), [count, captions])
        return {
            "loss": tf.reduce_mean(
                tf.reshape(per_caption, [count, captions]), axis=1
            ),
            "nll": tf.reduce_sum(by_image, axis=1),
            "tokens": tokens,
            "parallel": tf.cast(parallel, tf.float32),
        }

    def example_losses(self, batch, training):
        """Losses of a batch of `compute_losses`, for the trainer.

        In training the metrics of the two objectives are reported separately.

        Returns:
            `ExampleLosses`.
        """
        parts = self.compute_losses(batch, training)
        nll, tokens = parts["nll"], parts["tokens"]
        metrics = {"nll_per_token": (nll, tokens)}
        if training:
            parallel = parts["parallel"]
            for name, chosen in (
                ("autoregressive", 1.0 - parallel),
                ("parallel", parallel),
            ):
                metrics[f"{name}/loss"] = (chosen * parts["loss"], chosen)
                metrics[f"{name}/nll_per_token"] = (
                    chosen * nll,
                    chosen * tokens,
                )
        return ExampleLosses(parts["loss"], metrics, {"tokens": tokens})

    def batch_spec(self, size, captions=1):
        """Specs of `image`, `labels` and `index`, as `Task` defines them."""
        height, width = self.vision_encoder.image_size
        labels = [size, captions, self.text_decoder.max_length]
        return {
            "image": tf.TensorSpec([size, height, width, 3], tf.float32),
            "labels": tf.TensorSpec(labels, tf.int32),
            "index": tf.TensorSpec([size], tf.int64),
        }

    def shapes(self, size, captions=1):
        """Shapes of `encoded`, `decoded` and `logits`, as `Task` defines."""
        encoder, decoder = self.vision_encoder, self.text_decoder
        patches = encoder.grid[0] * encoder.grid[1]
        hidden = (size * captions, decoder.max_length, decoder.hidden_dim)
        return {
            "encoded": (size, patches, encoder.hidden_dim),  # [B, P, D]
            "decoded": hidden,  # [N, L, D]
            "logits": (*hidden[:2], decoder.vocabulary_size),
        }

    def check_data(self, data, name):
        """Checks that vocabulary and sizes of a data set fit the model.

        Args:
            data: A data set with `tokenizer` and `image_size`.
            name: Name of the argument that holds it, for the message.

        Raises:
            ValueError: If they do not; names the file and the bindings that
                disagree.
        """
        check_texts(data, self.text_decoder, "TextDecoder")
        check_image_size(data, name, self.vision_encoder)

    def _index(self, batch):
        """Positions of the examples in the stream, by default from the step."""
        if "index" in batch:
            return batch["index"]
        count = tf.shape(batch["labels"])[0]
        step = tf.cast(self.optimizer.iterations, tf.int64)
        return step * tf.cast(count, tf.int64) + tf.range(count, dtype=tf.int64)

    def _caption_seeds(self, seeds, captions):
        """A seed for each caption, uint32 [N]."""
        if captions == 1:
            return seeds
        samples = stateless_random.uniform(seeds, (captions,), _CAPTION_SALT)
        return stateless_random.example_seeds(
            self.seed, tf.cast(tf.reshape(samples, [-1]) * 2.0**24, tf.int64)
        )

    def _sample_parallel(self, seeds, count):
        """Which examples are predicted in parallel, bool [B]."""
        if seeds is None or self.masked_pred_prob == 0.0:
            return tf.fill([count], False)
        samples = stateless_random.uniform(seeds, (1,), _PARALLEL_SALT)[:, 0]
        return samples < self.masked_pred_prob

    def _decoder_inputs(self, labels, parallel, seeds):
        """Shifted labels, or masked ones if parallel, int32 [N, L]."""
        shifted = self.text_decoder.shift_right(labels)
        if seeds is None or self.masked_pred_prob == 0.0:
            return shifted
        mask = self.text_decoder.special_tokens.require_mask()
        masked = tf.fill(tf.shape(labels), mask)
        if self.masking_ratio < 1.0:
            length = tf.shape(labels)[1]
            count = tf.cast(length, tf.float32) * self.masking_ratio
            samples = stateless_random.uniform(seeds, (length,), _MASKING_SALT)
            rank = tf.argsort(tf.argsort(samples, axis=1), axis=1)
            chosen = rank < tf.cast(count, tf.int32)
            masked = tf.where(chosen, masked, labels)
        return tf.where(parallel[:, None], masked, shifted)

    def _token_losses(self, hidden, labels):
        """Loss and nll, each float32 [N, L], 0 at padding."""
        shape = tf.shape(labels)
        width = hidden.shape[-1]
        loss, nll = cross_entropy.token_cross_entropy(
            tf.reshape(hidden, [-1, width]),
            tf.reshape(labels, [-1]),
            tf.reshape(labels, [-1]) != self.text_decoder.special_tokens.pad,
            *self.text_decoder.head_weights,
            label_smoothing=self.label_smoothing,
            chunk_size=self.chunk_size,
        )
        return tf.reshape(loss, shape), tf.reshape(nll, shape)

    # Scores.

    @property
    def score_kinds(self):
        """Kinds of scores; "blind" is the decoder without any image."""
        # A model never trained in parallel yields noise as parallel scores.
        parallel = ("parallel",) if self.masked_pred_prob > 0.0 else ()
        return ("autoregressive", *parallel, "blind")

    def score_texts(self, images, labels, kind):
        """Log-likelihood of every text for every image, float32 [B, T]."""
        images = None if kind == "blind" else images
        return self.score(images, labels, parallel=kind == "parallel")

    def score_own_texts(self, images, labels, kind):
        """Log-likelihoods of each image's own texts, float32 [B, K]."""
        return self.score_captions(images, labels, parallel=kind == "parallel")

    # Serialization.

    def get_config(self):
        """Returns the constructor's arguments."""
        names = (
            "masked_pred_prob masking_ratio label_smoothing seed chunk_size"
        ).split()
        serialize = keras.saving.serialize_keras_object
        return {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": serialize(self.dtype_policy),
            "vision_encoder": serialize(self.vision_encoder),
            "text_decoder": serialize(self.text_decoder),
            **{name: getattr(self, name) for name in names},
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Builds a captioner from `get_config`'s result."""
        config = dict(config)
        for part in ("vision_encoder", "text_decoder"):
            config[part] = keras.saving.deserialize_keras_object(
                config[part], custom_objects=custom_objects
            )
        eos = config.pop("eos_id", None)  # Files of version 0.1.0.
        if eos is not None:
            decoder = config["text_decoder"]
            decoder.special_tokens = dataclasses.replace(
                decoder.special_tokens, eos=eos
            )
        return cls(**config)
