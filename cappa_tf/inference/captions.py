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
from cappa_tf.inference import prompting


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
        prompt: What the caption answers, "" for nothing. It is not part of any
            of the above.
        tokens: Ids of `pieces`.
    """

    key: str
    caption: str
    log_likelihood: float
    pieces: list
    probabilities: list
    references: list = dataclasses.field(default_factory=list)
    image: bytes | None = dataclasses.field(default=None, repr=False)
    others: list = dataclasses.field(default_factory=list)
    prompt: str = ""
    tokens: list = dataclasses.field(default_factory=list, repr=False)

    @property
    def exact_match(self):
        """Whether the normalized caption is one of the references."""
        return normalize(self.caption) in map(normalize, self.references)

    @property
    def words(self):
        """(word, probability) of each word, the product of its pieces'."""
        return [
            (word, float(np.prod(self.probabilities[pieces])))
            for word, pieces in word_slices(self.pieces)
        ]

    @property
    def end_probability(self):
        """Probability of the end of the caption; None if it was truncated."""
        ended = self.pieces and self.pieces[-1] == "<eos>"
        return self.probabilities[-1] if ended else None


def word_slices(pieces):
    """(word, slice of its pieces) of each word of a caption.

    word_slices([" a", " ", "do", "g", " ", "<eos>"])
        -> [("a", slice(0, 1)), ("dog", slice(1, 5))]

    Args:
        pieces: As of `CaptionRow`; the end of the caption is no word. Spaces
            that begin none belong to the word before.
    """
    words = []
    for i, piece in enumerate(pieces):
        if piece == "<eos>":
            break
        if words and (not piece.startswith(" ") or not words[-1][0]):
            before, some = words[-1]
            words[-1] = (before + piece.strip(), slice(some.start, i + 1))
        else:
            words.append((piece.strip(), slice(i, i + 1)))
    if words and not words[-1][0]:
        _, spaces = words.pop()
        if words:
            word, some = words[-1]
            words[-1] = (word, slice(some.start, spaces.stop))
    return words


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
        prompt: What the captions answer where `decode` gets no other prompts,
            for a captioner that was trained with prompts.
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
        prompt=None,
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
        self._captioner, self._prompt = captioner, prompt
        if prompt is not None:
            prompting.check(captioner, tokenizer, prompt)
        self._generate = compiled(
            lambda images, options: captioner.generate(
                images, max_length=max_length, **generation, **options
            )
        )
        self._generation = generation
        self.left_to_right = captioner.left_to_right
        self._losses = compiled(
            lambda batch: captioner.compute_losses(batch, training=False)
        )

    def decode(self, images, keys, references=None, prompts=None):
        """Captions up to B images.

        Args:
            images: float [B, H, W, 3] in [-1, 1], or fewer; None for none (the
                blind decoder).
            keys: The names of the images. Any images beyond them are padding.
            references: Optional list of lists of captions.
            prompts: Optional list of strings, what each caption answers.

        Returns:
            A list of `CaptionRow`s, one per key.

        Raises:
            ValueError: The captioner was trained with other prompts, or needs
                some; see `prompting.check`.
        """
        options = {"index": self._index(keys)} if self._generation else {}
        if prompts is None:
            prompts = [self._prompt or ""] * len(keys)
        ids = prompting.encode(
            self._captioner, self.tokenizer, prompts, self.batch_size
        )
        if images is None:
            if ids is None:
                # Empty prompts say how many captions there are. Keras warns
                # of an attention to a single place.
                ids = np.full((self.batch_size, 2), self.tokenizer.pad_id)
        else:
            images = self._fill(images)
        if ids is not None:
            options["prompts"] = tf.constant(ids, tf.int32)
        output = self._generate(images, options)
        tokens, log_probs = (
            self._by_image(output[name])[: len(keys)]
            for name in ("tokens", "log_probs")
        )  # -> [images, captions, L]
        references = references or [[] for _ in keys]
        rows = []
        for key, texts, probs, ours, prompt in zip(
            keys, tokens, log_probs, references, prompts
        ):
            captions = self.tokenizer.detokenize(texts)
            best, *others = (
                self._row(key, *columns, ours, prompt)
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

    def _row(self, key, caption, tokens, log_probs, references, prompt):
        eos, pad = self.tokenizer.eos_id, self.tokenizer.pad_id
        # Behind a long prompt there may be no room for eos, only padding.
        ends = np.flatnonzero((tokens == eos) | (tokens == pad))
        count = len(tokens)
        if ends.size:
            count = ends[0] + (tokens[ends[0]] == eos)
        return CaptionRow(
            key=key,
            caption=caption,
            log_likelihood=float(log_probs[:count].sum()),
            pieces=self._pieces(tokens[:count]),
            probabilities=np.exp(log_probs[:count]).tolist(),
            references=list(references),
            prompt=prompt,
            tokens=tokens[:count].tolist(),
        )

    def _pieces(self, tokens):
        return [
            "<eos>" if token == self.tokenizer.eos_id else piece
            for token, piece in zip(tokens, self.tokenizer.pieces(tokens))
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

    def reference_nll(self, images, references, most=None, prompts=None):
        """Negative log-likelihood of captions written by people, left to right.

        Args:
            images: float [B, H, W, 3] in [-1, 1], or fewer.
            references: A list of lists of captions, of the first images.
            most: K, if it must be the same for all batches: each K, and each
                length rounded up to a multiple of 8 tokens, needs its own
                graph.
            prompts: Lists of the prompts that they answer, or None.

        Returns:
            The negative log-likelihood in nats, summed over all references,
            and their number of tokens (including eos, without padding and
            prompts).
        """
        batch = {
            "image": self._fill(images),
            **self._labels(references, most, prompts),
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

    def _labels(self, references, most, prompts):
        """Labels int32 [B, K, L] of ragged lists, filled up with padding.

        In a dict, beside the lengths of prompts int32 [B, K] if there are any.
        """
        most = most or max(len(captions) for captions in references)
        flat = tf.constant([c for captions in references for c in captions])
        lengths = None
        if prompts is None:
            tokens = np.asarray(self.tokenizer(flat))
        else:
            asked = tf.constant([p for some in prompts for p in some])
            tokens, lengths = self.tokenizer.with_prompts(asked, flat)
        labels = np.full(
            (self.batch_size, most, tokens.shape[-1]),
            self.tokenizer.pad_id,
            np.int32,
        )
        counts = np.array([len(captions) for captions in references])
        filled = np.arange(most) < counts[:, None]  # [images, K]
        labels[: len(references)][filled] = tokens
        found = {"labels": tf.constant(_cut(labels, self.tokenizer.pad_id))}
        if lengths is not None:
            by_image = np.zeros((self.batch_size, most), np.int32)
            by_image[: len(references)][filled] = lengths
            found["prompt_lengths"] = tf.constant(by_image)
        return found


def _cut(labels, pad, multiple=8):
    """Drops positions at the end that are padding in all captions."""
    longest = int((labels != pad).sum(-1).max())
    return labels[..., : max(multiple * -(-longest // multiple), multiple)]
