"""The captioner: encoder, decoder and the two objectives that train them.

Abbreviations for dimensions:
    B: batch (of images).      H, W: height and width of the image in pixels.
    K: captions an image.      N: captions in the batch, B * K.
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

    Each training example is drawn to be predicted left to right
    (autoregressive, "Cap") or all at once from MASK tokens (parallel, "Pa").

    Args:
        vision_encoder: `VisionEncoder`; its `encoded` is what is captioned.
        text_decoder: `TextDecoder` with `encoder_dim` = the encoder's width.
        masked_pred_prob: Probability that an example is predicted in
            parallel, in training; 0 is "Cap".
        masking_ratio: Share of the L input positions that are MASK in a
            parallel example; the others show their own token.
        label_smoothing: See `cross_entropy.token_cross_entropy`.
        seed: Of all draws, together with each example's `index`.
        chunk_size: Positions whose logits are held at once in the loss.

    Reference: arXiv 2306.07915, section 3; big_vision
    models/proj/cappa/cappa.py `Model`, trainers/proj/cappa/generative.py.
    """

    selection_metric = "nll_per_token"
    can_generate = True
    # Cap is autoregressive, Pa parallel prediction.
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
        """See `Task.parts`."""
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
        """Autoregressive logits of {"image", "labels"}: see `logits`."""
        return self.logits(inputs["image"], inputs["labels"], training=training)

    def logits(self, images, labels, parallel=False, training=False):
        """Scores of every token at every position.

        Args:
            images: float [B, H, W, 3] in [-1, 1].
            labels: int32 [B, L] or [B, K, L], the captions (not shifted),
                padded.
            parallel: False: position t sees the labels before t; True: every
                position sees only MASK tokens and the image.
            training: Whether to drop.

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
        """Losses of a batch, one value an example.

        In training each example is drawn autoregressive or parallel; in
        evaluation all are autoregressive.

        Args:
            batch: Dict with `image` [B, H, W, 3]; `labels` int32 [B, K, L],
                padded; in training `index` int64 [B], the
                position of the example in the training stream. Where L is
                cut to the batch's longest caption (`length_buckets`),
                parallel prediction sees fewer MASK positions than the
                reference, which always has 64: a deviation.
            training: Whether to draw objectives and to drop.

        Returns:
            Dict of float32 [B]: `loss`, the mean over each caption's tokens,
            then over the example's K captions (the training loss is the mean
            of this over the global batch); `nll`, summed over all tokens,
            without smoothing; `tokens`, how many; `parallel`, 1 where the
            example was predicted in parallel.
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
        parallel = self._draw_parallel(seeds, count)
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
        """See `Task.example_losses`; the batch, `compute_losses`.

        In training the figures of the two objectives are given apart.
        """
        parts = self.compute_losses(batch, training)
        nll, tokens = parts["nll"], parts["tokens"]
        metrics = {"nll_per_token": (nll, tokens)}
        if training:
            parallel = parts["parallel"]
            for name, drawn in (
                ("autoregressive", 1.0 - parallel),
                ("parallel", parallel),
            ):
                metrics[f"{name}/loss"] = (drawn * parts["loss"], drawn)
                metrics[f"{name}/nll_per_token"] = (drawn * nll, drawn * tokens)
        return ExampleLosses(parts["loss"], metrics, {"tokens": tokens})

    def batch_spec(self, size, captions=1):
        """See `Task.batch_spec`."""
        height, width = self.vision_encoder.image_size
        labels = [size, captions, self.text_decoder.max_length]
        return {
            "image": tf.TensorSpec([size, height, width, 3], tf.float32),
            "labels": tf.TensorSpec(labels, tf.int32),
            "index": tf.TensorSpec([size], tf.int64),
        }

    def shapes(self, size, captions=1):
        """See `Task.shapes`."""
        encoder, decoder = self.vision_encoder, self.text_decoder
        patches = encoder.grid[0] * encoder.grid[1]
        hidden = (size * captions, decoder.max_length, decoder.hidden_dim)
        return {
            "encoded": (size, patches, encoder.hidden_dim),  # [B, P, D]
            "decoded": hidden,  # [N, L, D]
            "logits": (*hidden[:2], decoder.vocabulary_size),
        }

    def check_data(self, data, name):
        """Refuses data whose vocabulary or sizes are not the model's.

        Args:
            data: A data set with `tokenizer` and `image_size`.
            name: The argument it came as, for the message.

        Raises:
            ValueError: Naming the file and the bindings that disagree.
        """
        check_texts(data, self.text_decoder, "TextDecoder")
        check_image_size(data, name, self.vision_encoder)

    def _index(self, batch):
        """Positions of the examples in the stream; steps x B without them."""
        if "index" in batch:
            return batch["index"]
        count = tf.shape(batch["labels"])[0]
        step = tf.cast(self.optimizer.iterations, tf.int64)
        return step * tf.cast(count, tf.int64) + tf.range(count, dtype=tf.int64)

    def _caption_seeds(self, seeds, captions):
        """uint32 [N]: each caption of an image draws for itself."""
        if captions == 1:
            return seeds
        draws = stateless_random.uniform(seeds, (captions,), _CAPTION_SALT)
        return stateless_random.example_seeds(
            self.seed, tf.cast(tf.reshape(draws, [-1]) * 2.0**24, tf.int64)
        )

    def _draw_parallel(self, seeds, count):
        """Which examples are predicted in parallel, bool [B]."""
        if seeds is None or self.masked_pred_prob == 0.0:
            return tf.fill([count], False)
        draws = stateless_random.uniform(seeds, (1,), _PARALLEL_SALT)[:, 0]
        return draws < self.masked_pred_prob

    def _decoder_inputs(self, labels, parallel, seeds):
        """Shifted labels; for parallel captions masked ones. int32 [N, L]."""
        shifted = self.text_decoder.shift_right(labels)
        if seeds is None or self.masked_pred_prob == 0.0:
            return shifted
        mask = self.text_decoder.special_tokens.require_mask()
        masked = tf.fill(tf.shape(labels), mask)
        if self.masking_ratio < 1.0:
            length = tf.shape(labels)[1]
            count = tf.cast(length, tf.float32) * self.masking_ratio
            draws = stateless_random.uniform(seeds, (length,), _MASKING_SALT)
            rank = tf.argsort(tf.argsort(draws, axis=1), axis=1)
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
        """See `Task`; "blind" is the decoder without any image.

        A model that was never trained in parallel gives noise there.
        """
        parallel = ("parallel",) if self.masked_pred_prob > 0.0 else ()
        return ("autoregressive", *parallel, "blind")

    def score_texts(self, images, labels, kind):
        """Log-likelihoods; `Task` has the shapes."""
        images = None if kind == "blind" else images
        return self.score(images, labels, parallel=kind == "parallel")

    def score_own_texts(self, images, labels, kind):
        """Log-likelihoods; `Task` has the shapes."""
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
