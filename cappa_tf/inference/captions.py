"""Captions of images, and how right they are on a data set.

Abbreviations for dimensions:
    B: batch (of images).      H, W: height and width of the image in pixels.
    K: captions an image.      L: length of the text in tokens.
"""

import dataclasses
import functools
import itertools
import zlib

import numpy as np
import tensorflow as tf

from cappa_tf.evaluation import caption_metrics


@dataclasses.dataclass
class CaptionRow:
    """One captioned image.

    Attributes:
        key: Name of the image.
        caption: The best caption; the greedy one by default.
        log_likelihood: Of the caption, eos included: the sum of the logs of
            `probabilities`.
        pieces: The caption's tokens as text, "<eos>" at the end of a caption
            that was not cut; a leading space where a word begins.
        probabilities: Of each piece, given the image and those before it.
        references: Captions written by people; empty where there are none.
        image: Encoded bytes of the image, for the picture sheet, or None.
        others: Further `CaptionRow`s of the image, best first, where several
            captions are asked for.
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
        """Whether the caption is, normalised, one of the references."""
        return normalize(self.caption) in map(normalize, self.references)


@dataclasses.dataclass
class CaptionResult:
    """Captions of a data set (`rows`) and their figures (`metrics`)."""

    rows: list
    metrics: dict


def normalize(caption):
    """Lower case and single spaces: what exact match compares."""
    return " ".join(caption.lower().split())


class CaptionDecoder:
    """Captions batches of images, always of B: one graph, compiled once.

    Hold on to one object where a model is evaluated again and again.

    Args:
        captioner: A built `Captioner`.
        tokenizer: The `Tokenizer` it was trained with.
        batch_size: B.
        max_length: Longest caption L in tokens; the decoder's by default.
        compiled: Compiles a function of batches; by default for one device.
        **generation: Options of `captioner.generate`. Where it draws, the
            draws of an image are a function of the seed and its key.
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
            # AutoGraph would find nothing to convert, and take long over it.
            compiled = functools.partial(tf.function, autograph=False)
        self._generate = compiled(
            lambda images, **index: captioner.generate(
                images, max_length=max_length, **generation, **index
            )
        )
        self._generation = generation
        self._losses = compiled(
            lambda batch: captioner.compute_losses(batch, training=False)
        )

    def decode(self, images, keys, references=None):
        """Captions up to B images.

        Args:
            images: float [B, H, W, 3] in [-1, 1], or fewer.
            keys: The names of the images; as many rows come back, and what
                follows them in `images` counts as padding.
            references: Optional list of lists of captions.

        Returns:
            A list of `CaptionRow`s, one for each key.
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
        """int64 [B]: which draws belong to which image."""
        index = [zlib.crc32(key.encode(errors="surrogatepass")) for key in keys]
        return tf.constant(index + [0] * (self.batch_size - len(keys)), "int64")

    def _by_image(self, values):
        """[B, captions, L] of [B, L] or of itself."""
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

    def reference_nll(self, images, references, most=None):
        """Likelihood of captions written by people, left to right.

        Args:
            images: float [B, H, W, 3] in [-1, 1], or fewer.
            references: A list of lists of captions: of the first images.
            most: K, where it must be the same from batch to batch (each K,
                and each multiple of 8 tokens, is a graph of its own).

        Returns:
            The negative log-likelihood in nats, summed over all references,
            and the number of tokens it is of (eos counts, padding does not).
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

    def evaluate(
        self,
        dataset,
        limit=None,
        *,
        corpus_scores=False,
        keep_images=0,
        progress=None,
        hosts=None,
    ):
        """Captions every image of a split and compares with its references.

        Bad records, which the data set counts, are left out.

        Args:
            dataset: A `CaptionDataset`.
            limit: Only the first `limit` records.
            corpus_scores: Whether to add `caption_metrics.score_captions`.
            keep_images: How many of the first rows keep their image's bytes.
            progress: Optional function, called with the number of images done
                after each batch.
            hosts: Has `index`, `count` and `gather(value)`, where several
                processes caption a part each and all want the result.

        Returns:
            A `CaptionResult`, its metrics being: `num_images`; `exact_match`,
            the share of captions equal to one of their references;
            `nll_per_token`, in nats, of the references, left to right, over
            all their tokens; `distinct_captions`; `mean_words`, of a caption;
            and `cider` and the like if asked for.

        Raises:
            ValueError: There is no image to caption.
        """
        rows, nll, tokens = [], 0.0, 0.0
        most = dataset.max_captions
        part = (0, 1) if hosts is None else (hosts.index, hosts.count)
        for images, indices, examples in batches(
            dataset, self.batch_size, limit, *part
        ):
            references = [example.captions for example in examples]
            keys = [example.key for example in examples]
            decoded = self.decode(images, keys, references)
            for i, row, example in zip(indices, decoded, examples):
                row.image = example.image if len(rows) < keep_images else None
                rows.append((i, row))
            sums = self.reference_nll(images, references, most)
            nll, tokens = nll + sums[0], tokens + sums[1]
            if progress is not None:
                progress(len(rows))
        parts = [(rows, nll, tokens)]
        if hosts is not None:
            parts = hosts.gather(parts[0])
        rows = in_order(part[0] for part in parts)
        nll, tokens = (sum(part[i] for part in parts) for i in (1, 2))
        if not rows:
            raise ValueError(
                "Captioning needs at least one image that can be read. "
                f"Received: split {dataset.split!r} of {dataset.path}, "
                f"limit={limit}, skipped={dataset.skipped}"
            )
        metrics = summarize(rows) | {"nll_per_token": nll / tokens}
        if corpus_scores:
            metrics |= score_rows(rows).corpus
        return CaptionResult(rows, metrics)

    def _fill(self, images):
        """The same images, padded to [B, H, W, 3] with grey ones."""
        images = tf.convert_to_tensor(images, tf.float32)
        missing = self.batch_size - images.shape[0]
        if missing < 0:
            raise ValueError(
                "No more images than `batch_size` go through at once. "
                f"Received: {images.shape[0]} images, "
                f"batch_size={self.batch_size}"
            )
        return tf.pad(images, [[0, missing], [0, 0], [0, 0], [0, 0]])

    def _labels(self, references, most):
        """int32 [B, K, L] of ragged lists; what is missing is all padding."""
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


def evaluate_captions(
    captioner,
    dataset,
    tokenizer,
    batch_size=64,
    limit=None,
    *,
    max_length=None,
    **options,
):
    """`CaptionDecoder.evaluate` of a model that is evaluated once.

    Args:
        captioner: A built `Captioner`.
        dataset: A `CaptionDataset`.
        tokenizer: The `Tokenizer` that the captioner was trained with.
        batch_size: Images that go through at once.
        limit: Only the first `limit` records.
        max_length: Longest caption in tokens; the decoder's by default.
        **options: See `CaptionDecoder.evaluate`.

    Returns:
        A `CaptionResult`.
    """
    decoder = CaptionDecoder(captioner, tokenizer, batch_size, max_length)
    return decoder.evaluate(dataset, limit, **options)


def batches(dataset, batch_size, limit=None, host=0, num_hosts=1):
    """Pictures of a split in order, with all that is known of them.

    Bad records, which the data set counts, are left out.

    Args:
        dataset: A `CaptionDataset`.
        batch_size: B.
        limit: Only the first `limit` records.
        host: Which host's part is wanted.
        num_hosts: Number of parts.

    Yields:
        (images [at most B, H, W, 3], their indices, their `Example`s).
    """
    # Example i of `read_examples` is index i of `evaluate`.
    examples = dataset.read_examples(limit)
    examples = itertools.islice(examples, host, None, num_hosts)
    for batch in dataset.evaluate(batch_size, host, num_hosts):
        some = list(itertools.islice(examples, batch_size))
        good = np.flatnonzero(batch["_mask"].numpy()[: len(some)])
        if good.size:
            indices = batch["index"].numpy()[good].tolist()
            images = tf.gather(batch["image"], good)
            yield images, indices, [some[i] for i in good]
        if len(some) < batch_size:
            return


def in_order(parts):
    """One list of rows of the (index, row) that several hosts have."""
    pairs = sorted(itertools.chain(*parts), key=lambda pair: pair[0])
    return [row for _, row in pairs]


def summarize(rows):
    """Figures of captioned images that need no model.

    Args:
        rows: `CaptionRow`s, at least one.

    Returns:
        A dict: `num_images`, `exact_match`, `distinct_captions`, `mean_words`.
    """
    captions = [normalize(row.caption) for row in rows]
    return {
        "num_images": len(rows),
        "exact_match": sum(row.exact_match for row in rows) / len(rows),
        "distinct_captions": len(set(captions)),
        "mean_words": sum(len(c.split()) for c in captions) / len(rows),
    }


def score_rows(rows, meteor=False):
    """`caption_metrics.Scores` of rows, which are numbered from 0."""
    # Numbered, because nothing keeps two images from having one key.
    return caption_metrics.score_captions(
        {i: row.caption for i, row in enumerate(rows)},
        {i: row.references for i, row in enumerate(rows)},
        meteor,
    )
