"""Captioner: encoder, decoder and the two objectives that train them.

Abbreviations for dimensions:
    B: batch (of images).      H, W: height and width of the image in pixels.
    K: captions per image.     N: captions in the batch, B * K.
    L: length of the text.     P: number of patches.
    D: width.                  V: vocabulary.
"""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

from cappa_tf.models import likelihood, stateless_random
from cappa_tf.models.data_checks import check_image_size, check_texts
from cappa_tf.models.inference import Inference
from cappa_tf.models.losses import cross_entropy
from cappa_tf.models.task import ExampleLosses, Task
from cappa_tf.utils.arguments import (
    check_counts,
    check_fraction,
    check_number,
)

_PARALLEL_SALT = stateless_random.salt_of("captioner/parallel")
_MASKING_SALT = stateless_random.salt_of("captioner/masking")
_RATIO_SALT = stateless_random.salt_of("captioner/ratio")
_CAPTION_SALT = stateless_random.salt_of("captioner/caption")
_TOKENS_SALT = stateless_random.salt_of("captioner/tokens")


@keras.saving.register_keras_serializable("cappa_tf")
class Captioner(Inference, Task):
    """Encoder and decoder trained by captioning, "CapPa" by default.

    Each training example is predicted either left to right (autoregressive,
    "Cap") or all at once from MASK tokens (parallel, "Pa"), chosen at random.

    With a `masking_ratio` that is sampled, a parallel example is one of masked
    diffusion captioning ("MDC"): the ratio r of each caption is sampled
    uniformly, each of its positions is MASK with probability r, and the loss
    of the masked tokens is weighted by 1 / r. Its expectation is an upper
    bound of the caption's negative log-likelihood.

    A caption may answer a prompt, such as "caption:" or a question. The prompt
    is in the decoder's input and not in the loss: its tokens come first in
    `labels`, and `prompt_lengths` says how many they are. Parallel examples
    show the tokens of the prompt, and predict the rest.

    Args:
        vision_encoder: `VisionEncoder`; the decoder attends to its `encoded`.
        text_decoder: `TextDecoder` with `encoder_dim` = the encoder's width,
            which it gets here if it was made without one.
        masked_pred_prob: Probability that a training example is predicted in
            parallel; 0 is "Cap".
        masking_ratio: Fraction of the L input positions that are MASK in a
            parallel example (unless they belong to the prompt); the others
            show their own token, and all tokens are predicted. Or a pair
            (low, high): the range (low, high] from which it is sampled for
            each caption.
        label_smoothing: Fraction of the target's probability that is spread
            over the whole vocabulary.
        visual_tokens_kept: Fraction of an image's tokens that the decoder
            attends to in training, sampled for each image from what the
            encoder returns (after its `patch_dropout`); a class token and
            registers always stay. Not used in inference.
        seed: Seed of all random choices, together with each example's `index`.
        chunk_size: Positions whose logits are held in memory at a time.
        prompts: Templates of the prompts that the decoder is trained with, such
            as "caption:" and "answer: {question}"; "" if some captions have
            none. Training takes them from its data, see `adopt`.

    Reference: arXiv 2306.07915, section 3; big_vision
    models/proj/cappa/cappa.py `Model`, trainers/proj/cappa/generative.py.
    arXiv 2510.26799 for the sampled ratio; arXiv 2509.01644 (OpenVision 2,
    which keeps about a third) for the visual tokens.
    """

    can_generate = True
    takes_features = True
    short_names = {
        "autoregressive/loss": "cap",
        "autoregressive/nll_per_token": "cap/token",
        "parallel/loss": "pa",
        "parallel/nll_per_token": "pa/token",
        "nll_per_token": None,
        "masked/nll_per_token": "masked/token",
    }
    # The parts that the constructor takes, and its other arguments.
    _PARTS = ("vision_encoder", "text_decoder")
    _ARGUMENTS = (
        "masked_pred_prob",
        "masking_ratio",
        "label_smoothing",
        "visual_tokens_kept",
        "seed",
        "chunk_size",
        "prompts",
    )

    def __init__(
        self,
        vision_encoder,
        text_decoder,
        *,
        masked_pred_prob=0.75,
        masking_ratio=1.0,
        label_smoothing=0.0,
        visual_tokens_kept=1.0,
        seed=0,
        chunk_size=cross_entropy.DEFAULT_CHUNK_SIZE,
        prompts: list | tuple = (),
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_fraction(
            masked_pred_prob=masked_pred_prob, label_smoothing=label_smoothing
        )
        check_number("visual_tokens_kept", visual_tokens_kept, 0.0, 1.0, True)
        check_counts(chunk_size=chunk_size)
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(f"`seed` must be an int. Received: seed={seed!r}")
        if masked_pred_prob > 0.0:
            text_decoder.special_tokens.require_mask()
        text_decoder.default_encoder_dim(vision_encoder.hidden_dim)
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
        self.masking_ratio = _checked_ratio(masking_ratio)
        self.label_smoothing = label_smoothing
        self.visual_tokens_kept = visual_tokens_kept
        self.seed = seed
        self.chunk_size = chunk_size
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(
                f"`prompts` must be strings. Received: prompts={prompts!r}"
            )
        self.prompts = tuple(prompts)

    @property
    def parts(self):
        """Dict of the two parts, "vision_encoder" and "text_decoder"."""
        return {name: getattr(self, name) for name in self._PARTS}

    @property
    def samples_ratio(self):
        """Whether the masking ratio is sampled for each caption."""
        return isinstance(self.masking_ratio, tuple)

    @property
    def left_to_right(self):
        """Whether any caption is predicted left to right in training.

        One that is not fills MASK tokens in: it is evaluated on masked
        captions, and generates by filling one position after the other.
        """
        return not (self.samples_ratio and self.masked_pred_prob == 1.0)

    @property
    def texts_may_be_cut(self):
        """Whether no caption is predicted in parallel.

        Those that are attend to MASK tokens at all L positions, in training and
        when they are scored; what is left to right sees no padding.
        """
        return self.masked_pred_prob == 0.0

    @property
    def predicts_texts(self):
        """Whether texts have a likelihood without images, too."""
        return self.masked_pred_prob < 1.0

    @property
    def selection_metric(self):
        """The name of the metric that selects the best weights."""
        return "nll_per_token" if self.left_to_right else "loss"

    # Predictions.

    def encode(self, images, seeds=None, training=False):
        """Encoded patches [B, P, D] of images [B, H, W, 3]."""
        training = self.trains("vision_encoder", training)
        outputs = self.vision_encoder(images, seeds=seeds, training=training)
        return outputs["encoded"]

    def _encoded(self, batch, seeds, training):
        """Encoded patches of a batch, its features if it has these."""
        if "image_features" in batch:
            return batch["image_features"]
        return self.encode(batch["image"], seeds, training)

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
        evaluation all examples are autoregressive, or masked if the captioner
        is not trained `left_to_right`. The masks of evaluation are a function
        of the caption.

        Args:
            batch: Dict with `image` [B, H, W, 3], or in its place
                `image_features` [B, P, D], its `encoded`; `labels` int32
                [B, K, L], padded; optionally `prompt_lengths` int32 [B, K],
                how many first tokens of a caption are its prompt; in training
                `index` int64 [B], the position of the example in the training
                stream. If L is cut to the batch's longest caption
                (`length_buckets`), parallel prediction sees fewer MASK
                positions than in the reference, which always has 64: a
                deviation, which `texts_may_be_cut` denies.
            training: Whether to choose objectives and apply dropout.

        Returns:
            Dict of float32 [B]: `loss`, the mean over each caption's tokens,
            then over the example's K captions (the training loss is the mean
            of this over the global batch); `nll`, summed over all predicted
            tokens, without smoothing or weights; `predicted`, their number;
            `tokens`, the number of all tokens, of which a caption whose ratio
            is sampled predicts the masked ones only; `parallel`, 1 if the
            example was predicted in parallel, else 0. The tokens of a prompt
            count nowhere.
        """
        seeds = self._example_seeds(batch, training)
        encoded = self._encoded(batch, seeds, training)
        return self._decoder_losses(
            batch["labels"],
            encoded,
            seeds,
            training,
            batch.get("prompt_lengths"),
        )

    def _decoder_losses(
        self, labels, encoded, seeds, training, prompt_lengths=None
    ):
        """`compute_losses` of labels [B, K, L] for encoded images [B, P, D]."""
        if labels.shape.rank != 3:
            raise ValueError(
                "`labels` must be [B, K, L], K captions of each image. "
                f"Received: labels of shape {labels.shape}"
            )
        training_decoder = self.trains("text_decoder", training)
        if training_decoder and self.visual_tokens_kept < 1.0:
            encoded = self._keep_tokens(encoded, seeds)
        count, captions = tf.shape(labels)[0], labels.shape[1]
        flat = tf.reshape(labels, [-1, labels.shape[2] or tf.shape(labels)[2]])
        pad = self.text_decoder.special_tokens.pad
        real = flat != pad
        if prompt_lengths is not None:
            prompt_lengths = tf.reshape(prompt_lengths, [-1])
        caption_seeds = None
        if training:
            caption_seeds = self._caption_seeds(seeds, captions)
        elif not self.left_to_right:
            caption_seeds = self._seeds_of_captions(flat, real)
        parallel = self._sample_parallel(seeds, count)
        repeated = tf.repeat(parallel, captions)
        inputs, predicted, weight = self._decoder_inputs(
            flat, repeated, caption_seeds, prompt_lengths
        )
        hidden = self.text_decoder(
            inputs,
            self.text_decoder.project_memory(encoded),
            parallel=repeated,
            seeds=caption_seeds,
            training=training_decoder,
        )
        if prompt_lengths is not None:  # From here on without prompts.
            real = likelihood.scored_tokens(flat, prompt_lengths, pad)
            predicted = real if predicted is None else predicted
        if predicted is not None:
            predicted = tf.logical_and(predicted, real)
        loss, nll = self._token_losses(hidden, flat, predicted)
        if weight is not None:
            loss = loss * weight[:, None]
        per_caption = cross_entropy.caption_mean(loss, real)

        def by_image(values):
            values = tf.reduce_sum(values, axis=-1)  # [N, L] -> [N]
            values = tf.reshape(values, [count, captions])
            return tf.reduce_sum(values, axis=1)

        tokens = by_image(tf.cast(real, tf.float32))
        if predicted is not None:
            predicted = by_image(tf.cast(predicted, tf.float32))
        return {
            "loss": tf.reduce_mean(
                tf.reshape(per_caption, [count, captions]), axis=1
            ),
            "nll": by_image(nll),
            "predicted": tokens if predicted is None else predicted,
            "tokens": tokens,
            "parallel": tf.cast(parallel, tf.float32),
        }

    def _keep_tokens(self, encoded, seeds):
        """A random subset of the patches in `encoded` [B, P, D].

        Args:
            encoded: Class token first and registers last, if there are any.
            seeds: uint32 [B].
        """
        encoder = self.vision_encoder
        first = int(encoder.pooling == "tok")
        end = encoded.shape[1] - getattr(encoder, "kept_registers", 0)
        kept = stateless_random.keep_tokens(
            encoded[:, first:end], self.visual_tokens_kept, seeds, _TOKENS_SALT
        )
        return tf.concat([encoded[:, :first], kept, encoded[:, end:]], axis=1)

    def example_losses(self, batch, training):
        """Losses of a batch of `compute_losses`, for the trainer.

        In training the metrics of the two objectives are reported separately.

        Returns:
            `ExampleLosses`.
        """
        return self._figures(self.compute_losses(batch, training), training)

    def _figures(self, parts, training):
        """`ExampleLosses` of what `compute_losses` returns."""
        nll, predicted = parts["nll"], parts["predicted"]
        per_token = (nll, predicted)
        metrics = {"nll_per_token": per_token}
        if not self.left_to_right:
            metrics = {"masked/nll_per_token": per_token}
        elif training:
            parallel = parts["parallel"]
            for name, chosen in (
                ("autoregressive", 1.0 - parallel),
                ("parallel", parallel),
            ):
                metrics[f"{name}/loss"] = (chosen * parts["loss"], chosen)
                metrics[f"{name}/nll_per_token"] = (
                    chosen * nll,
                    chosen * predicted,
                )
        return ExampleLosses(
            parts["loss"], metrics, {"tokens": parts["tokens"]}
        )

    def _kind_of_features(self, pools):
        """The decoder attends to patches, so pooling is not needed."""
        return "encoded"

    def batch_spec(self, size, captions=1):
        """Specs of `image`, `labels` and `index`, as `Task` defines them.

        Those of data with prompts also have `prompt_lengths`, int32 [B, K].
        """
        labels = [size, captions, self.text_decoder.max_length]
        return {
            **self.image_spec(size),
            "labels": tf.TensorSpec(labels, tf.int32),
            "index": tf.TensorSpec([size], tf.int64),
        }

    def shapes(self, size, captions=1):
        """Shapes of `encoded`, `decoded` and `logits`, as `Task` defines."""
        encoder, decoder = self.vision_encoder, self.text_decoder
        hidden = (size * captions, decoder.max_length, decoder.hidden_dim)
        return {
            "encoded": (size, *encoder.output_shapes()["encoded"]),  # [B, P, D]
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
        unknown = [p for p in _prompts_of(data) if p not in self.prompts]
        missing = self.prompts and not _prompts_of(data)
        if name != "train_data" and (unknown or missing):
            raise ValueError(
                f"The prompts of `{name}` (CaptionDataset.prompt, or those of "
                "its source) must be among those of the training data, "
                f"{list(self.prompts)}. Received: {list(_prompts_of(data))}"
            )

    def adopt(self, data):
        """Takes over the templates of the prompts of the training data."""
        self.prompts = _prompts_of(data)

    def _example_seeds(self, batch, training):
        """A seed for each example uint32 [B], None in evaluation."""
        if not training:
            return None
        return stateless_random.example_seeds(self.seed, self._index(batch))

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

    def _seeds_of_captions(self, labels, real):
        """A seed for each caption, uint32 [N], from its tokens alone.

        The same caption gets the same mask in every evaluation, whatever the
        batch is and however long the padding.
        """
        length = labels.shape[1]
        if length is None:
            length = self.text_decoder.max_length
        powers = [pow(_HASH_BASE, i, 2**31) for i in range(length)]
        powers = tf.constant(np.array(powers), tf.int64)[: tf.shape(labels)[1]]
        tokens = tf.where(real, tf.cast(labels, tf.int64) + 1, 0)
        return stateless_random.example_seeds(
            self.seed, tf.reduce_sum(tokens * powers, axis=1)
        )

    def _sample_parallel(self, seeds, count):
        """Which examples are predicted in parallel, bool [B]."""
        if not self.left_to_right:
            return tf.fill([count], True)
        if seeds is None or self.masked_pred_prob == 0.0:
            return tf.fill([count], False)
        samples = stateless_random.uniform(seeds, (1,), _PARALLEL_SALT)[:, 0]
        return samples < self.masked_pred_prob

    def _decoder_inputs(self, labels, parallel, seeds, prompt_lengths=None):
        """What the decoder reads, and what it has to predict.

        Args:
            labels: int32 [N, L].
            parallel: bool [N].
            seeds: uint32 [N] of the masks; None if no caption is parallel.
            prompt_lengths: int32 [N], how many first tokens are never masked;
                None for none.

        Returns:
            (inputs, predicted, weight): the shifted labels, or the masked ones
            of parallel captions, int32 [N, L]; bool [N, L] of the positions
            to predict, or None for all; float32 [N], the weight of the
            caption's loss, or None for 1. The caller leaves prompts out.
        """
        shifted = self.text_decoder.shift_right(labels)
        if seeds is None or self.masked_pred_prob == 0.0:
            return shifted, None, None
        predicted = weight = None
        length = tf.shape(labels)[1]
        mask = self.text_decoder.special_tokens.require_mask()
        masked = tf.fill(tf.shape(labels), mask)
        if self.samples_ratio:
            low, high = self.masking_ratio
            samples = stateless_random.uniform(seeds, (1,), _RATIO_SALT)
            ratio = high - (high - low) * samples  # [N, 1] in (low, high]
            samples = stateless_random.uniform(seeds, (length,), _MASKING_SALT)
            chosen = samples < ratio
            masked = tf.where(chosen, masked, labels)
            predicted = tf.logical_or(chosen, ~parallel[:, None])
            weight = tf.where(parallel, 1.0 / ratio[:, 0], 1.0)
        elif self.masking_ratio < 1.0:
            count = tf.cast(length, tf.float32) * self.masking_ratio
            samples = stateless_random.uniform(seeds, (length,), _MASKING_SALT)
            rank = tf.argsort(tf.argsort(samples, axis=1), axis=1)
            chosen = rank < tf.cast(count, tf.int32)
            masked = tf.where(chosen, masked, labels)
        if prompt_lengths is not None:
            masked = likelihood.show_prompts(masked, labels, prompt_lengths)
        inputs = tf.where(parallel[:, None], masked, shifted)
        return inputs, predicted, weight

    def _token_losses(
        self, hidden, labels, predicted=None, label_smoothing=None
    ):
        """Loss and nll, each float32 [N, L], 0 where nothing is predicted.

        `predicted` is bool [N, L], by default True for all but padding. Only
        the loss has a gradient.
        """
        if label_smoothing is None:
            label_smoothing = self.label_smoothing
        if predicted is None:
            predicted = labels != self.text_decoder.special_tokens.pad
        shape = tf.shape(labels)
        width = hidden.shape[-1]
        loss, nll = cross_entropy.token_cross_entropy(
            tf.reshape(hidden, [-1, width]),
            tf.reshape(labels, [-1]),
            tf.reshape(predicted, [-1]),
            *self.text_decoder.head_weights,
            label_smoothing=label_smoothing,
            chunk_size=self.chunk_size,
        )
        return tf.reshape(loss, shape), tf.reshape(nll, shape)

    # Scores.

    @property
    def score_kinds(self):
        """Kinds of scores; "blind" is the decoder without any image."""
        # A model that was never trained one way has no meaningful score of it.
        if self.masked_pred_prob == 1.0:
            return ("parallel",)
        parallel = ("parallel",) if self.masked_pred_prob > 0.0 else ()
        return ("autoregressive", *parallel, "blind")

    def score_texts(self, images, labels, kind, prompt_lengths=None):
        """Log-likelihood of every text for every image, float32 [B, T]."""
        images = None if kind == "blind" else images
        return self.score(
            images,
            labels,
            parallel=kind == "parallel",
            prompt_lengths=prompt_lengths,
        )

    def score_own_texts(self, images, labels, kind, prompt_lengths=None):
        """Log-likelihoods of each image's own texts, float32 [B, K]."""
        return self.score_captions(
            images,
            labels,
            parallel=kind == "parallel",
            prompt_lengths=prompt_lengths,
        )

    def text_nll(self, batch, with_images=True):
        """Negative log-likelihood of captions, left to right.

        Defined by `Task`; a prompt is read and not counted.
        """
        lengths = batch.get("prompt_lengths")
        if with_images:
            losses = self.compute_losses(batch, training=False)
            return losses["nll"], losses["predicted"]
        scores = self.score_captions(
            None, batch["labels"], prompt_lengths=lengths
        )
        scored = likelihood.scored_tokens(
            batch["labels"], lengths, self._special_tokens.pad
        )
        tokens = tf.reduce_sum(tf.cast(scored, tf.float32), axis=[1, 2])
        return -tf.reduce_sum(scores, axis=1), tokens

    # Serialization.

    def get_config(self):
        """Returns the constructor's arguments."""
        serialize = keras.saving.serialize_keras_object
        return {
            "name": self.name,
            "trainable": self.trainable,
            "dtype": serialize(self.dtype_policy),
            **{name: serialize(getattr(self, name)) for name in self._PARTS},
            **{name: getattr(self, name) for name in self._ARGUMENTS},
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Builds a captioner from `get_config`'s result."""
        config = dict(config)
        for part in cls._PARTS:
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


# Of the hash by which the masks of evaluation follow from a caption.
_HASH_BASE = 1_000_003


def _prompts_of(data):
    """Templates of a data set's prompts; none if it knows of none."""
    return tuple(getattr(data, "prompts", ()))


def _checked_ratio(ratio):
    """A masking ratio, or the range that it is sampled from as a tuple."""
    if not isinstance(ratio, list | tuple):
        check_fraction(masking_ratio=ratio)
        return ratio
    valid = len(ratio) == 2 and all(
        isinstance(x, int | float) and not isinstance(x, bool) for x in ratio
    )
    if not valid or not 0.0 <= ratio[0] < ratio[1] <= 1.0:
        raise ValueError(
            "`masking_ratio` must be a fraction, or a pair (low, high) with "
            "0 <= low < high <= 1 to sample it from. Received: "
            f"masking_ratio={ratio!r}"
        )
    return tuple(ratio)
