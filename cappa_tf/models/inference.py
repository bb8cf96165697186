"""Inference with a trained captioner: captions and likelihoods.

Abbreviations for dimensions:
    B: batch (of images).      H, W: height and width of the image in pixels.
    K: captions per image.     L: length of the text in tokens.
    T: labels to score.        S: captions to generate per image.
    N: captions in the batch.  M: length of the prompts in tokens.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from cappa_tf.models import generation, likelihood, sampling, stateless_random
from cappa_tf.utils.arguments import check_counts

_SAMPLING_SALT = stateless_random.salt_of("captioner/sampling")


class GenerationPlan(NamedTuple):
    """The options of `Inference.generate` after validation.

    Attributes:
        search: A search of `sampling`, which chooses the tokens.
        rules: `sampling.Rules`.
        prefix: int32 [B or 1, tokens], the beginning of each caption.
        length: L, the maximum length of a caption.
        sequences: Number of beams or samples per image.
    """

    search: object
    rules: sampling.Rules
    prefix: tf.Tensor
    length: int
    sequences: int


class Inference:
    """Methods of `Captioner` that use trained weights.

    Attributes:
        tokenizer: Optional function from strings [T] to int32 [T, L]. Once a
            caller sets it, `score` and `generate` accept strings.
    """

    tokenizer = None

    @property
    def _special_tokens(self):
        return self.text_decoder.special_tokens

    def generate(
        self,
        images,
        max_length=None,
        *,
        sampler=None,
        prefix=None,
        min_length=0,
        no_repeat_ngram=0,
        num_captions=1,
        seed=0,
        index=None,
        prompts=None,
    ):
        """Generates captions, by default greedily.

        A captioner that is not trained `left_to_right` fills MASK tokens in,
        one position after the other, with a pass over all positions for each.

        Args:
            images: float [B, H, W, 3] in [-1, 1]; None omits the image (the
                blind decoder), with B of `prompts`, or 1.
            max_length: Maximum length L of a caption, including prefix and
                eos; the decoder's by default.
            sampler: None (greedy), `sampling.BeamSearch`, a greedy
                `sampling.GreedySearch(draft=True)`, or a sampler of
                `keras_nlp.samplers` that `sampling.search_of` supports.
            prefix: Beginning of every caption: a string (needs
                `captioner.tokenizer`) or int32 token ids [tokens] or
                [B, tokens], without eos.
            min_length: Minimum number of tokens before eos, including the
                prefix.
            no_repeat_ngram: Size of the token n-grams that may occur only once
                in a caption, including the prefix; 0 allows repetition.
            num_captions: S; more than one needs beams or samples.
            seed: Seed of the samples. The random choices for an image depend
                only on `seed` and its `index`.
            index: int64 [B], position of each image among all images to be
                captioned; 0, 1, ... by default.
            prompts: int32 [B, M], padded and without eos, the prompt that the
                caption of each image answers, of any lengths. Needed if the
                captioner was trained with prompts.

        Returns:
            Dict with `tokens` int32 [B, L] (eos kept, pad after it; without
            the prompt, to which no other length refers either),
            `log_probs` float32 [B, L], the model's log-probability of each
            token, 0 after eos, and `log_likelihood` float32 [B], their sum.
            With S > 1 these are [B, S, L] and [B, S], best first.
        """
        plan = self.plan_generation(
            max_length,
            sampler=sampler,
            prefix=prefix,
            min_length=min_length,
            no_repeat_ngram=no_repeat_ngram,
            num_captions=num_captions,
        )
        prompts = self._checked_prompts(prompts)
        drafts = getattr(plan.search, "draft", False)
        if drafts and prompts is not None:
            raise ValueError(
                "Captions that follow prompts cannot be drafted. Received: "
                f"{plan.search} and prompts of shape {prompts.shape}"
            )
        if images is None:
            rows = tf.zeros([1]) if prompts is None else prompts
            memory = None
        else:
            rows = self.encode(images)
            memory = self.text_decoder.project_memory(rows)
        batch = rows.shape[0] or tf.shape(rows)[0]
        uniform = None
        if isinstance(plan.search, sampling.RandomSearch):
            index = tf.range(batch) if index is None else index
            seeds = stateless_random.example_seeds(seed, index)
            shape = (plan.length, plan.sequences)
            uniform = stateless_random.uniform(seeds, shape, _SAMPLING_SALT)
        tokens, log_probs = generation.decode(
            self.text_decoder,
            memory,
            plan.search,
            plan.rules,
            size=(batch, plan.sequences, plan.length),
            prefix=plan.prefix,
            uniform=uniform,
            masked=not self.left_to_right,
            prompts=prompts,
            drafts=drafts,
        )
        wanted = 0 if num_captions == 1 else slice(num_captions)
        return _captions(tokens[:, wanted], log_probs[:, wanted])

    def plan_generation(
        self,
        max_length=None,
        *,
        sampler=None,
        prefix=None,
        min_length=0,
        no_repeat_ngram=0,
        num_captions=1,
    ):
        """Validates the options of `generate`, without any image.

        Args:
            max_length: As in `generate`, like all other arguments.
            sampler: Chooses the tokens.
            prefix: Beginning of every caption.
            min_length: Minimum number of tokens before eos.
            no_repeat_ngram: Size of n-grams that may occur only once.
            num_captions: S.

        Returns:
            A `GenerationPlan`.

        Raises:
            ValueError: If an option is invalid, alone or with the others.
        """
        search = sampling.search_of(sampler)
        if getattr(search, "draft", False):
            self._special_tokens.require_mask()
            if not self.left_to_right:
                raise ValueError(
                    "Drafts are checked left to right, for which this "
                    f"captioner is not trained. Received: sampler={search}"
                )
        prefix = self._prefix_ids(prefix)
        length = self._caption_length(max_length, prefix.shape[1], min_length)
        return GenerationPlan(
            search=search,
            rules=sampling.Rules(
                min_length, no_repeat_ngram, self._special_tokens
            ),
            prefix=prefix,
            length=length,
            sequences=self._num_sequences(search, num_captions),
        )

    def _checked_prompts(self, prompts):
        """Prompts of `generate` as a tensor, or None if there are none."""
        if prompts is None:
            if self.prompts and "" not in self.prompts:
                raise ValueError(
                    "This captioner was trained with prompts, "
                    f"{list(self.prompts)}, and needs one for each image. "
                    "Received: prompts=None"
                )
            return None
        prompts = tf.convert_to_tensor(prompts, tf.int32)
        most = self.text_decoder.max_length - 1
        if prompts.shape.rank != 2 or (prompts.shape[1] or 0) > most:
            raise ValueError(
                "`prompts` must be [B, M] with M at most the decoder's "
                f"max_length - 1 = {most}. Received: shape {prompts.shape}"
            )
        return prompts

    def _prefix_ids(self, prefix):
        """Token ids int32 [B or 1, tokens] of a string or of token ids."""
        if prefix is None:
            return tf.zeros([1, 0], tf.int32)
        if isinstance(prefix, str):
            prefix = self._whole_ids(prefix)
        prefix = tf.convert_to_tensor(prefix, tf.int32)
        return prefix[None] if prefix.shape.rank == 1 else prefix

    def _caption_length(self, max_length, prefix=0, min_length=0):
        most = self.text_decoder.max_length
        length = most if max_length is None else max_length
        if not 1 <= length <= most:
            raise ValueError(
                "`max_length` must be between 1 and the decoder's "
                f"{most}. Received: max_length={max_length}"
            )
        if prefix >= length or min_length >= length:
            raise ValueError(
                "A prefix and `min_length` must leave room for eos. Received: "
                f"{prefix} tokens of prefix, min_length={min_length}, "
                f"max_length={length}"
            )
        return length

    def _num_sequences(self, search, num_captions):
        check_counts(num_captions=num_captions)
        if isinstance(search, sampling.RandomSearch):
            return num_captions
        sequences = getattr(search, "num_beams", 1)
        if num_captions > sequences:
            raise ValueError(
                "Several captions need as many beams, or a random sampler. "
                f"Received: num_captions={num_captions}, {search}"
            )
        return sequences

    def score(self, images, labels, *, parallel=False, prompt_lengths=None):
        """Log-likelihood of each label for each image.

        Summed over tokens up to and including eos, not normalized by length
        (paper, section 4.2). An image is encoded once, and a prefix that
        several labels share is decoded once (`models/likelihood.py`).

        Args:
            images: float [B, H, W, 3] in [-1, 1]; None omits the image (the
                blind decoder), B = 1.
            labels: int32 [T, L] token ids, padded, or T strings (needs
                `captioner.tokenizer`). Prefixes are shared only if the ids are
                known when a graph is traced.
            parallel: If False, left to right; if True, all tokens at once from
                MASK tokens and the image, in one decoder pass per image.
            prompt_lengths: int32 [T], how many first tokens of each label are
                its prompt: read, not scored. None for none.

        Returns:
            float32 [B, T].
        """
        labels = likelihood.cut_padding(
            self._label_ids(labels), self._special_tokens.pad
        )
        memory = self._memory(images)
        known = tf.get_static_value(labels)
        if not parallel and known is not None:
            if prompt_lengths is not None:
                prompt_lengths = np.asarray(prompt_lengths)
            groups = likelihood.group_by_prefix(
                known, self._special_tokens, prompt_lengths=prompt_lengths
            )
            return likelihood.score_groups(self.text_decoder, memory, groups)
        count = 1 if images is None else tf.shape(images)[0]
        labels = tf.repeat(labels[None], count, axis=0)  # -> [B, T, L]
        if prompt_lengths is not None:
            prompt_lengths = tf.convert_to_tensor(prompt_lengths, tf.int32)
            prompt_lengths = tf.repeat(prompt_lengths[None], count, axis=0)
        return self._score_each(memory, labels, parallel, prompt_lengths)

    def score_captions(
        self, images, labels, *, parallel=False, prompt_lengths=None
    ):
        """Log-likelihood of each image's own captions.

        Args:
            images: float [B, H, W, 3] in [-1, 1]; None omits the images (the
                blind decoder).
            labels: int32 [B, K, L] token ids, padded.
            parallel: As in `score`.
            prompt_lengths: int32 [B, K], how many first tokens of each caption
                are its prompt: read, not scored. None for none.

        Returns:
            float32 [B, K]; 0 for a caption that consists of padding.
        """
        labels = likelihood.cut_padding(labels, self._special_tokens.pad)
        shape = tf.shape(labels)
        if images is None:
            labels = tf.reshape(labels, [1, -1, shape[2]])
            if prompt_lengths is not None:
                prompt_lengths = tf.reshape(prompt_lengths, [1, -1])
        scores = self._score_each(
            self._memory(images), labels, parallel, prompt_lengths
        )
        return tf.reshape(scores, shape[:2])

    def _score_each(self, memory, labels, parallel, prompt_lengths=None):
        """Scores [B, K] of labels [B, K, L] for the images of `memory`."""
        if parallel:
            return likelihood.score_parallel(
                self.text_decoder, memory, labels, prompt_lengths
            )
        shape = tf.shape(labels)
        if prompt_lengths is not None:
            prompt_lengths = tf.reshape(prompt_lengths, [-1])
        nll = self._captions_nll(
            tf.reshape(labels, [-1, shape[2]]), memory, prompt_lengths
        )
        return -tf.reshape(nll, shape[:2])

    def _memory(self, images):
        """Cross-attention keys and values of images; None without images."""
        if images is None:
            return None
        return self.text_decoder.project_memory(self.encode(images))

    def _captions_nll(self, labels, memory, prompt_lengths=None):
        """Summed negative log-likelihood [N] of labels [N, L]."""
        inputs = self.text_decoder.shift_right(labels)
        hidden = self.text_decoder(inputs, memory)
        scored = likelihood.scored_tokens(
            labels, prompt_lengths, self._special_tokens.pad
        )
        nll = self._token_losses(hidden, labels, scored)[1]
        return tf.reduce_sum(nll, axis=-1)

    def _label_ids(self, labels):
        """Token ids int32 [T, L] of token ids or of strings."""
        known = tf.get_static_value(labels) if tf.is_tensor(labels) else labels
        if known is not None:
            # The values are known now, even while a graph is traced.
            with tf.init_scope():
                return self._ids_of_tensor(tf.convert_to_tensor(known))
        return self._ids_of_tensor(labels)

    def _ids_of_tensor(self, labels):
        if labels.dtype == tf.string:
            if self.tokenizer is None:
                raise ValueError(
                    "Strings need `captioner.tokenizer` (or pass token ids). "
                    f"Received: {labels!r}"
                )
            labels = self.tokenizer(labels)
        return tf.convert_to_tensor(tf.cast(labels, tf.int32))

    def _whole_ids(self, text):
        """Ids of a text, which a `Tokenizer` does not truncate."""
        if hasattr(self.tokenizer, "encode"):
            return self.tokenizer.encode(text)[0]
        ids = np.asarray(self._label_ids([text]))[0]
        special = self._special_tokens
        return ids[(ids != special.pad) & (ids != special.eos)]


def _captions(tokens, log_probs):
    return {
        "tokens": tokens,
        "log_probs": log_probs,
        "log_likelihood": tf.reduce_sum(log_probs, axis=-1),
    }
