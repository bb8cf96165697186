"""Caption decoder: images to captions with their probabilities.

Abbreviations for dimensions:
    B: batch (of images).      H, W: height and width of the image in pixels.
    K: captions per image.     L: length of the text in tokens.
"""

import dataclasses
import functools
import zlib

import numpy as np
import tensorflow as tf

from cappa_tf.data.images.image_files import UnusableError


@dataclasses.dataclass
class CaptionRow:
    """One captioned image.

    Attributes:
        key: Name of the image.
        caption: The best caption; the greedy one by default.
        log_likelihood: Log-likelihood of the caption including eos, the sum of
            the logarithms of `probabilities`.
        pieces: The caption's tokens as text, with a leading space at the
            beginning of a word; the last is "<eos>" unless the caption was
            truncated.
        probabilities: Probability of each piece, given the image and the
            pieces before it.
        references: Captions written by people; empty if there are none.
        image: Encoded bytes of the image, for the image sheet, or None.
        others: Further `CaptionRow`s of the image, best first, if several
            captions were requested.
    """

    key: str
    caption: str
    log_likelihood: float
    pieces: list
    probabilities: list
    references: list = dataclasses.field(default_factory=list)
    image: bytes | None = dataclasses.field(default=None, repr=False)
    others: list = dataclasses.field(default_factory=list)

    @property
    def exact_match(self):
        """Whether the normalized caption is one of the references."""
        return normalize(self.caption) in map(normalize, self.references)


def normalize(caption):
    """Lower-cases a caption and collapses spaces, for exact match."""
    return " ".join(caption.lower().split())


class CaptionDecoder:
    """Captions batches of images, padded to B so that one graph suffices.

    Reuse one object if a model is evaluated repeatedly.

    Args:
        captioner: A built `Captioner`.
        tokenizer: The `Tokenizer` it was trained with.
        batch_size: B.
        max_length: Maximum length L of a caption in tokens; the decoder's by
            default.
        compiled: Compiles a function of batches; by default for one device.
        **generation: Options of `captioner.generate`. If it samples, the
            samples of an image are a function of the seed and its key.

    Attributes:
        left_to_right: Whether `reference_nll` is defined: whether the captioner
            is trained left to right.
    """

    def __init__(
        self,
        captioner,
        tokenizer,
        batch_size=64,
        max_length=None,
        compiled=None,
        **generation,
    ):
        if batch_size < 1:
            raise ValueError(
                "`batch_size` must be at least 1. Received: "
                f"batch_size={batch_size}"
            )
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        if compiled is None:
            # AutoGraph has nothing to convert here, but would take long.
            compiled = functools.partial(tf.function, autograph=False)
        self._generate = compiled(
            lambda images, **index: captioner.generate(
                images, max_length=max_length, **generation, **index
            )
        )
        self._generation = generation
        self.left_to_right = captioner.left_to_right
        self._losses = compiled(
            lambda batch: captioner.compute_losses(batch, training=False)
        )

    def decode(self, images, keys, references=None):
        """Captions up to B images.

        Args:
            images: float [B, H, W, 3] in [-1, 1], or fewer.
            keys: The names of the images. Any images beyond them are padding.
            references: Optional list of lists of captions.

        Returns:
            A list of `CaptionRow`s, one per key.
        """
        index = {"index": self._index(keys)} if self._generation else {}
        output = self._generate(self._fill(images), **index)
        tokens, log_probs = (
            self._by_image(output[name])[: len(keys)]
            for name in ("tokens", "log_probs")
        )  # -> [images, captions, L]
        references = references or [[] for _ in keys]
        rows = []
        for key, texts, probs, ours in zip(keys, tokens, log_probs, references):
            captions = self.tokenizer.detokenize(texts)
            best, *others = (
                self._row(key, *columns, ours)
                for columns in zip(captions, texts, probs)
            )
            rows.append(dataclasses.replace(best, others=others))
        return rows

    def _index(self, keys):
        """Index of each image's random numbers, int64 [B], from its key."""
        index = [zlib.crc32(key.encode(errors="surrogatepass")) for key in keys]
        return tf.constant(index + [0] * (self.batch_size - len(keys)), "int64")

    def _by_image(self, values):
        """Reshapes [B, L] or [B, captions, L] to [B, captions, L]."""
        array = values.numpy()
        return array.reshape(self.batch_size, -1, array.shape[-1])

    def _row(self, key, caption, tokens, log_probs, references):
        ended = np.flatnonzero(tokens == self.tokenizer.eos_id)
        count = ended[0] + 1 if ended.size else len(tokens)
        return CaptionRow(
            key=key,
            caption=caption,
            log_likelihood=float(log_probs[:count].sum()),
            pieces=self._pieces(tokens[:count]),
            probabilities=np.exp(log_probs[:count]).tolist(),
            references=list(references),
        )

    def _pieces(self, tokens):
        strings = self.tokenizer.load().id_to_string(tokens).numpy()
        return [
            "<eos>"
            if token == self.tokenizer.eos_id
            else string.decode(errors="replace").replace("\u2581", " ")
            for token, string in zip(tokens, strings)
        ]

    def caption_files(self, paths, preprocessing):
        """Captions image files, one batch at a time.

        Args:
            paths: Paths of the files.
            preprocessing: The model's `ImagePreprocessing`.

        Yields:
            (path, row, reason) in the order of `paths`: a `CaptionRow` and
            None, or None and the reason why the file cannot be used.
        """
        for start in range(0, len(paths), self.batch_size):
            some = paths[start : start + self.batch_size]
            images, reasons = {}, {}
            for path in some:
                try:
                    images[path] = preprocessing.read(path)
                except UnusableError as error:
                    reasons[path] = error.reason
            rows = {}
            if images:
                stacked = np.stack(list(images.values()))  # [<= B, H, W, 3]
                decoded = self.decode(stacked, list(images))
                rows = {row.key: row for row in decoded}
            for path in some:
                yield path, rows.get(path), reasons.get(path)

    def reference_nll(self, images, references, most=None):
        """Negative log-likelihood of captions written by people, left to right.

        Args:
            images: float [B, H, W, 3] in [-1, 1], or fewer.
            references: A list of lists of captions, of the first images.
            most: K, if it must be the same for all batches: each K, and each
                length rounded up to a multiple of 8 tokens, needs its own
                graph.

        Returns:
            The negative log-likelihood in nats, summed over all references,
            and their number of tokens (including eos, without padding).
        """
        batch = {
            "image": self._fill(images),
            "labels": self._labels(references, most),
        }
        losses = self._losses(batch)
        return tuple(
            float(losses[name].numpy().sum(dtype=np.float64))
            for name in ("nll", "tokens")
        )

    def _fill(self, images):
        """Pads images to [B, H, W, 3] with gray ones."""
        images = tf.convert_to_tensor(images, tf.float32)
        missing = self.batch_size - images.shape[0]
        if missing < 0:
            raise ValueError(
                "There must be at most `batch_size` images. "
                f"Received: {images.shape[0]} images, "
                f"batch_size={self.batch_size}"
            )
        return tf.pad(images, [[0, missing], [0, 0], [0, 0], [0, 0]])

    def _labels(self, references, most):
        """Labels int32 [B, K, L] of ragged lists, filled up with padding."""
        most = most or max(len(captions) for captions in references)
        flat = [caption for captions in references for caption in captions]
        tokens = np.asarray(self.tokenizer(tf.constant(flat)))
        labels = np.full(
            (self.batch_size, most, tokens.shape[-1]),
            self.tokenizer.pad_id,
            tokens.dtype,
        )
        counts = np.array([len(captions) for captions in references])
        filled = np.arange(most) < counts[:, None]  # [images, K]
        labels[: len(references)][filled] = tokens
        return tf.constant(_cut(labels, self.tokenizer.pad_id))


def _cut(labels, pad, multiple=8):
    """Drops positions at the end that are padding in all captions."""
    longest = int((labels != pad).sum(-1).max())
    return labels[..., : max(multiple * -(-longest // multiple), multiple)]
