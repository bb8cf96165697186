"""A trained captioner with its vocabulary and preprocessing: texts to scores.

Abbreviations for dimensions:
    B: images that go through at once.   H, W: of the image in pixels.
    T: texts, the same for all images.   K: texts of one image.
    L: length of a text in tokens.
"""

import functools

import numpy as np

from cappa_tf.checks import check_choice, check_counts
from cappa_tf.evaluation.captioning import CaptionDecoder
from cappa_tf.evaluation.picture_captions import PictureReader

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


class Scorer:
    """Log-likelihoods of texts, in nats, summed over tokens, eos included.

    Args:
        captioner: A built `Captioner`.
        tokenizer: The `Tokenizer` it was trained with.
        preprocessing: Arguments of `PictureReader` and `CaptionDataset` that
            decide how pictures are prepared: `image_size`, `resize`,
            `resize_small`, `antialias`, `max_pixels`.
        batch_size: B.
    """

    def __init__(self, captioner, tokenizer, preprocessing, batch_size=32):
        check_counts(batch_size=batch_size)
        self.captioner = captioner
        self.tokenizer = tokenizer
        self.preprocessing = dict(preprocessing)
        self.batch_size = batch_size

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
        return _cut(self._whole(texts), self.tokenizer.pad_id)

    def _whole(self, texts):
        """Token ids int32 [T, L] of the tokenizer's length.

        What parallel mode is given: there the number of MASK positions
        matters, and in training it is this.
        """
        return np.asarray(self.tokenizer(list(texts)), np.int32)

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
        count = len(images)
        ids = self._whole(texts) if mode == PARALLEL else self.tokens(texts)
        if mode == BLIND:
            scores = self.captioner.score(None, ids)  # -> [1, T]
            return np.repeat(np.asarray(scores, np.float64), count, axis=0)
        scores = self.captioner.score(
            self._filled(images), ids, parallel=mode == PARALLEL
        )
        return np.asarray(scores, np.float64)[:count]

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
                images, self._padded(some, mode), parallel=mode == PARALLEL
            )
            parts.append(np.asarray(scores, np.float64))
        scores = np.concatenate(parts, axis=1)
        return [row[: len(some)] for row, some in zip(scores, texts)]

    def _padded(self, texts, mode):
        """int32 [B, K, L] of ragged lists; what is missing is padding."""
        flat = [text for some in texts for text in some]
        ids = self._whole(flat) if mode == PARALLEL else self.tokens(flat)
        most = max(map(len, texts))
        labels = np.zeros((self.batch_size, most, ids.shape[1]), np.int32)
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


def _cut(ids, pad_id):
    """Drops positions that are padding in all of ids [T, L]."""
    longest = int((ids != pad_id).sum(-1).max(initial=1))
    return ids[:, : -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE]
