"""A trained captioner with its vocabulary and preprocessing: texts to scores.

Abbreviations for dimensions:
    B: images that go through at once.   H, W: of the image in pixels.
    T: texts, the same for all images.   K: texts of one image.
    L: length of a text in tokens.
"""

import functools

import numpy as np
import tensorflow as tf

from cappa_tf.evaluation.captioning import CaptionDecoder
from cappa_tf.evaluation.picture_captions import PictureReader
from cappa_tf.utils.arguments import check_choice, check_counts

# How a text is scored: left to right as captions are written; all tokens at
# once from MASK tokens and the image; and left to right without any image,
# which is what the model thinks of the text alone.
AUTOREGRESSIVE = "autoregressive"
PARALLEL = "parallel"
BLIND = "blind"
MODES = (AUTOREGRESSIVE, PARALLEL, BLIND)

# Texts of an image that are scored at once, each by itself in memory.
_TEXTS_PER_PASS = 16
# Lengths are rounded up to these: few shapes, so few graphs.
_LENGTH_MULTIPLE = 8
# Sets of texts whose graphs are kept: those of one evaluator and a few more.
_GRAPHS = 4


class Scorer:
    """Log-likelihoods of texts, in nats, summed over tokens, eos included.

    Args:
        captioner: A built `Captioner`.
        tokenizer: The `Tokenizer` it was trained with.
        preprocessing: Arguments of `PictureReader` and `CaptionDataset` that
            decide how pictures are prepared: `image_size`, `resize`,
            `resize_small`, `antialias`, `reduced_decode`, `max_pixels`.
        batch_size: B.
        hosts: The `Hosts` of a run on several, for evaluators that share the
            work; None where there is one process.
    """

    def __init__(
        self, captioner, tokenizer, preprocessing, batch_size=32, hosts=None
    ):
        check_counts(batch_size=batch_size)
        self.captioner = captioner
        self.tokenizer = tokenizer
        self.preprocessing = dict(preprocessing)
        self.batch_size = batch_size
        self.hosts = hosts
        self._graphs = {}

    @functools.cached_property
    def reader(self):
        """Reads picture files as the model takes them."""
        return PictureReader(**self.preprocessing)

    @functools.cached_property
    def decoder(self):
        """Captions B images at once."""
        return CaptionDecoder(self.captioner, self.tokenizer, self.batch_size)

    @property
    def modes(self):
        """The modes that mean something for this model.

        A model that was never trained in parallel gives noise there.
        """
        trained = self.captioner.masked_pred_prob > 0
        return MODES if trained else (AUTOREGRESSIVE, BLIND)

    def check_mode(self, mode):
        """Refuses a mode that this model does not have."""
        check_choice(self.modes, mode=mode)

    def tokens(self, texts):
        """Token ids int32 [T, L], L the longest text rounded up to 8."""
        ids = np.asarray(self.tokenizer(list(texts)), np.int32)
        longest = int((ids != self.tokenizer.pad_id).sum(-1).max(initial=1))
        length = -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        return ids[:, :length]

    def count_tokens(self, texts):
        """Tokens of each text, eos counted: int64 [T]."""
        return (self.tokens(texts) != self.tokenizer.pad_id).sum(-1)

    def labels(self, images, texts, mode=AUTOREGRESSIVE):
        """Scores of every text for every image.

        Args:
            images: float32 [at most B, H, W, 3] in [-1, 1].
            texts: T strings.
            mode: One of `modes`.

        Returns:
            float64 [images, T].
        """
        self.check_mode(mode)
        count, ids = len(images), self.tokens(texts)
        if mode == BLIND:
            scores = self.captioner.score(None, ids)  # -> [1, T]
            return np.repeat(np.asarray(scores, np.float64), count, axis=0)
        scores = self._compiled(ids, mode == PARALLEL)(self._filled(images))
        return np.asarray(scores, np.float64)[:count]

    def _compiled(self, ids, parallel):
        """Scores of fixed texts: their prefixes are part of the graph."""
        key = (ids.shape, ids.tobytes(), parallel)
        if key not in self._graphs:
            if len(self._graphs) >= _GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            # AutoGraph would find nothing to convert, and take long over it.
            self._graphs[key] = tf.function(
                lambda images: self.captioner.score(
                    images, ids, parallel=parallel
                ),
                autograph=False,
            )
        return self._graphs[key]

    def blind(self, texts):
        """Scores of texts without any image: float64 [T]."""
        return self.labels([None], texts, BLIND)[0]

    def captions(self, images, texts, mode=AUTOREGRESSIVE):
        """Scores of each image's own texts.

        Args:
            images: float32 [at most B, H, W, 3] in [-1, 1].
            texts: A list of texts, at least one, for each image.
            mode: One of `modes`.

        Returns:
            A list of float64 [K], one array an image.
        """
        self.check_mode(mode)
        if len(images) != len(texts) or not all(texts):
            raise ValueError(
                "Each image needs a list of at least one text. Received: "
                f"{len(images)} images, lists of {[*map(len, texts)]} texts"
            )
        if mode == BLIND:
            flat = self.blind([text for some in texts for text in some])
            ends = np.cumsum([len(some) for some in texts])[:-1]
            return np.split(flat, ends)
        images = self._filled(images)
        most = max(map(len, texts))
        parts = []
        for start in range(0, most, _TEXTS_PER_PASS):
            some = [t[start : start + _TEXTS_PER_PASS] for t in texts]
            scores = self.captioner.score_captions(
                images, self._padded(some), parallel=mode == PARALLEL
            )
            parts.append(np.asarray(scores, np.float64))
        scores = np.concatenate(parts, axis=1)
        return [row[: len(some)] for row, some in zip(scores, texts)]

    def _padded(self, texts):
        """int32 [B, K, L] of ragged lists; what is missing is padding."""
        ids = self.tokens([text for some in texts for text in some])
        most = max(map(len, texts))
        shape = (self.batch_size, most, ids.shape[1])
        labels = np.full(shape, self.tokenizer.pad_id, np.int32)
        counts = np.array([len(some) for some in texts])
        labels[: len(texts)][np.arange(most) < counts[:, None]] = ids
        return labels

    def _filled(self, images):
        """The images, followed by grey ones up to B: one shape, one graph."""
        images = np.asarray(images, np.float32)
        missing = self.batch_size - len(images)
        if missing < 0:
            raise ValueError(
                "No more images than `batch_size` go through at once. "
                f"Received: {len(images)} images, "
                f"batch_size={self.batch_size}"
            )
        return np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)])
