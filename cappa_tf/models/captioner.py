"""The captioner: encoder, decoder and the two objectives that train them.

Abbreviations for dimensions:
    B: batch (of images).      H, W: height and width of the image in pixels.
    K: captions an image.      N: captions in the batch, B * K.
    L: length of the text.     P: number of patches.
    D: width.                  V: vocabulary.
"""

import keras
import tensorflow as tf

from cappa_tf.checks import check_counts, check_fraction
from cappa_tf.models import losses, random

# A saved captioner names its encoder's class; importing registers it.
from cappa_tf.models import vision_encoder as _  # noqa: F401
from cappa_tf.models.inference import Inference
from cappa_tf.models.text_decoder import shift_right

_PARALLEL_SALT = random.salt_of("captioner/parallel")
_MASKING_SALT = random.salt_of("captioner/masking")
_CAPTION_SALT = random.salt_of("captioner/caption")


@keras.saving.register_keras_serializable("cappa_tf")
class Captioner(Inference, keras.Model):
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
        label_smoothing: See `losses.token_cross_entropy`.
        seed: Of all draws, together with each example's `index`.
        eos_id: Token that ends a caption.
        chunk_size: Positions whose logits are held at once in the loss.

    Reference: arXiv 2306.07915, section 3; big_vision
    models/proj/cappa/cappa.py `Model`, trainers/proj/cappa/generative.py.
    """

    def __init__(
        self,
        vision_encoder,
        text_decoder,
        *,
        masked_pred_prob=0.75,
        masking_ratio=1.0,
        label_smoothing=0.0,
        seed=0,
        eos_id=1,
        chunk_size=losses.DEFAULT_CHUNK_SIZE,
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
        if masked_pred_prob > 0.0 and not text_decoder.use_mask_token:
            raise ValueError(
                "Parallel prediction needs a decoder with a MASK token. "
                f"Received: masked_pred_prob={masked_pred_prob} with "
                "text_decoder.use_mask_token=False"
            )
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
        self.eos_id = eos_id
        self.chunk_size = chunk_size
        self._loss_metric = keras.metrics.Mean("loss")
        self._nll_metric = keras.metrics.Mean("nll_per_token")

    def build(self, input_shape=None):
        """Creates all weights; the sizes are known from the constructors."""
        del input_shape
        for part in (self.vision_encoder, self.text_decoder):
            if not part.built:
                part.build()
        self.built = True

    def build_from_config(self, config):
        """Builds a model that is being loaded."""
        del config
        self.build()

    @property
    def metrics(self):
        """What `fit` and `evaluate` report."""
        return [self._loss_metric, self._nll_metric]

    # Predictions.

    def encode(self, images, seeds=None, training=False):
        """Encoded patches [B, P, D] of images [B, H, W, 3]."""
        outputs = self.vision_encoder(images, seeds=seeds, training=training)
        return outputs["encoded"]

    def call(self, inputs, training=False):
        """Autoregressive logits of {"image", "labels"}: see `logits`."""
        return self.logits(inputs["image"], inputs["labels"])

    def logits(self, images, labels, parallel=False):
        """Scores of every token at every position.

        Args:
            images: float [B, H, W, 3] in [-1, 1].
            labels: int32 [B, L], the caption (not shifted), padded with 0.
            parallel: False: position t sees the labels before t; True: every
                position sees only MASK tokens and the image.

        Returns:
            float32 [B, L, V].
        """
        labels = tf.convert_to_tensor(labels, tf.int32)
        memory = self.text_decoder.project_memory(self.encode(images))
        if parallel:
            tokens = tf.fill(tf.shape(labels), self._mask_id())
            everywhere = tf.fill(tf.shape(labels)[:1], True)
            hidden = self.text_decoder(tokens, memory, parallel=everywhere)
        else:
            hidden = self.text_decoder(shift_right(labels), memory)
        return self.text_decoder.logits(hidden)

    # Training.

    def compute_losses(self, batch, training=True):
        """Losses of a batch, one value an example.

        In training each example is drawn autoregressive or parallel; in
        evaluation all are autoregressive.

        Args:
            batch: Dict with `image` [B, H, W, 3]; `labels` int32 [B, L] or
                [B, K, L], padded with 0; in training `index` int64 [B], the
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
        if labels.shape.rank == 2:
            labels = labels[:, None]  # -> [B, 1, L]
        count, captions = tf.shape(labels)[0], labels.shape[1]
        seeds = caption_seeds = None
        if training:
            seeds = random.example_seeds(self.seed, self._index(batch))
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
            training=training,
        )
        loss, nll = self._token_losses(hidden, flat)
        per_caption = losses.caption_mean(loss, flat != 0)
        tokens = tf.reduce_sum(tf.cast(labels != 0, tf.float32), axis=[1, 2])
        by_image = tf.reshape(tf.reduce_sum(nll, -1), [count, captions])
        return {
            "loss": tf.reduce_mean(
                tf.reshape(per_caption, [count, captions]), axis=1
            ),
            "nll": tf.reduce_sum(by_image, axis=1),
            "tokens": tokens,
            "parallel": tf.cast(parallel, tf.float32),
        }

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
        draws = random.uniform(seeds, (captions,), _CAPTION_SALT)
        return random.example_seeds(
            self.seed, tf.cast(tf.reshape(draws, [-1]) * 2.0**24, tf.int64)
        )

    def _draw_parallel(self, seeds, count):
        """Which examples are predicted in parallel, bool [B]."""
        if seeds is None or self.masked_pred_prob == 0.0:
            return tf.fill([count], False)
        draws = random.uniform(seeds, (1,), _PARALLEL_SALT)[:, 0]
        return draws < self.masked_pred_prob

    def _decoder_inputs(self, labels, parallel, seeds):
        """Shifted labels; for parallel captions masked ones. int32 [N, L]."""
        shifted = shift_right(labels)
        if seeds is None or self.masked_pred_prob == 0.0:
            return shifted
        masked = tf.fill(tf.shape(labels), self._mask_id())
        if self.masking_ratio < 1.0:
            length = tf.shape(labels)[1]
            count = tf.cast(length, tf.float32) * self.masking_ratio
            draws = random.uniform(seeds, (length,), _MASKING_SALT)
            rank = tf.argsort(tf.argsort(draws, axis=1), axis=1)
            chosen = rank < tf.cast(count, tf.int32)
            masked = tf.where(chosen, masked, labels)
        return tf.where(parallel[:, None], masked, shifted)

    def _mask_id(self):
        if self.text_decoder.mask_id is None:
            raise ValueError(
                "Parallel prediction needs a decoder with a MASK token. "
                "Received: text_decoder.use_mask_token=False"
            )
        return self.text_decoder.mask_id

    def _token_losses(self, hidden, labels):
        """Loss and nll, each float32 [N, L], 0 at padding."""
        shape = tf.shape(labels)
        width = hidden.shape[-1]
        loss, nll = losses.token_cross_entropy(
            tf.reshape(hidden, [-1, width]),
            tf.reshape(labels, [-1]),
            tf.reshape(labels, [-1]) != 0,
            *self.text_decoder.head_weights,
            label_smoothing=self.label_smoothing,
            chunk_size=self.chunk_size,
        )
        return tf.reshape(loss, shape), tf.reshape(nll, shape)

    def train_step(self, batch):
        """One step of `fit` on a batch as `compute_losses` takes it."""
        with tf.GradientTape() as tape:
            parts = self.compute_losses(batch, training=True)
            # Gradients are summed over replicas: divide by all of them.
            replicas = tf.distribute.get_strategy().num_replicas_in_sync
            loss = tf.reduce_mean(parts["loss"]) / replicas
            scaled = self.optimizer.scale_loss(loss)
        variables = self.trainable_variables
        gradients = tape.gradient(scaled, variables)
        # Sums over replicas, which `apply` of this project leaves to others.
        self.optimizer.apply_gradients(zip(gradients, variables))
        return self._update_metrics(parts)

    def test_step(self, batch):
        """One step of `evaluate`; `_mask` [B] (0 = padding) is respected."""
        return self._update_metrics(
            self.compute_losses(batch, training=False), batch.get("_mask")
        )

    def _update_metrics(self, parts, mask=None):
        mask = tf.ones_like(parts["loss"]) if mask is None else mask
        self._loss_metric.update_state(parts["loss"], mask)
        tokens = parts["tokens"] * mask
        mean = tf.math.divide_no_nan(parts["nll"], parts["tokens"])
        self._nll_metric.update_state(mean, tokens)
        return {metric.name: metric.result() for metric in self.metrics}

    # Serialization.

    def get_config(self):
        """Returns the constructor's arguments."""
        names = (
            "masked_pred_prob masking_ratio label_smoothing seed eos_id "
            "chunk_size"
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
        return cls(**config)
