"""Captioning of a data set, and metrics of the captions.

Abbreviations for dimensions:
    B: batch (of images).      H, W: height and width of the image in pixels.
"""

import dataclasses
import itertools

import numpy as np
import tensorflow as tf

from cappa_tf.evaluation import caption_metrics
from cappa_tf.inference.captions import normalize


@dataclasses.dataclass
class CaptionResult:
    """Captions of a data set (`rows`) and their `metrics`."""

    rows: list
    metrics: dict


def evaluate_captions(
    decoder,
    dataset,
    limit=None,
    *,
    corpus_scores=False,
    keep_images=0,
    progress=None,
    hosts=None,
):
    """Captions every image of a split and compares it with its references.

    If captions answer prompts, each image gets one for each of its prompts.
    Bad records are left out; the data set counts them.

    Args:
        decoder: A `CaptionDecoder`.
        dataset: A `CaptionDataset`.
        limit: Maximum number of records to read, or None for all.
        corpus_scores: Whether to add `caption_metrics.score_captions`.
        keep_images: Number of first rows that keep their image's bytes.
        progress: Optional function, called after each batch with the number of
            images done.
        hosts: Object with `index`, `count` and `gather(value)` if several
            processes caption a part each and all need the result.

    Returns:
        A `CaptionResult` with the metrics `num_images`; `exact_match`, the
        fraction of captions equal to one of their references;
        `nll_per_token`, in nats, of the references, left to right, over all
        their tokens, if the model is trained left to right;
        `distinct_captions`; `mean_words` per caption; and, with
        `corpus_scores`, `cider` and the like.

    Raises:
        ValueError: If there is no image to caption.
    """
    rows, nll, tokens, done = [], 0.0, 0.0, 0
    most = dataset.max_captions
    part = (0, 1) if hosts is None else (hosts.index, hosts.count)
    for images, indices, examples in batches(
        dataset, decoder.batch_size, limit, *part
    ):
        for i, row in caption_batch(decoder, images, examples):
            image = examples[i].image
            row.image = image if len(rows) < keep_images else None
            rows.append((indices[i], row))
        if decoder.left_to_right:
            references = [example.captions for example in examples]
            sums = decoder.reference_nll(
                images, references, most, prompts_of(examples)
            )
            nll, tokens = nll + sums[0], tokens + sums[1]
        done += len(examples)
        if progress is not None:
            progress(done)
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
    metrics = summarize(rows)
    if decoder.left_to_right:
        metrics["nll_per_token"] = nll / tokens
    if corpus_scores:
        metrics |= score_rows(rows).corpus
    return CaptionResult(rows, metrics)


def caption_batch(decoder, images, examples):
    """Captions a batch of images, once for each of their prompts.

    Args:
        decoder: A `CaptionDecoder`.
        images: float [at most B, H, W, 3] in [-1, 1].
        examples: Their `Example`s.

    Returns:
        List of (index of the image, `CaptionRow` with the references that
        answer the same prompt).
    """
    prompts = prompts_of(examples)
    keys = [example.key for example in examples]
    references = [example.captions for example in examples]
    if prompts is None:
        return [*enumerate(decoder.decode(images, keys, references))]
    asked = []
    for i, (some, captions) in enumerate(zip(prompts, references)):
        grouped = {}
        for prompt, caption in zip(some, captions):
            grouped.setdefault(prompt, []).append(caption)
        asked += [(i, *pair) for pair in grouped.items()]
    rows = []
    for start in range(0, len(asked), decoder.batch_size):
        numbers, some, references = zip(
            *asked[start : start + decoder.batch_size]
        )
        found = decoder.decode(
            tf.gather(images, numbers),
            [keys[i] for i in numbers],
            references,
            prompts=some,
        )
        rows += zip(numbers, found)
    return rows


def prompts_of(examples):
    """A list of prompts for each example, or None if none has any."""
    if not any(any(example.prompts or ()) for example in examples):
        return None
    return [e.prompts or [""] * len(e.captions) for e in examples]


def batches(dataset, batch_size, limit=None, host=0, num_hosts=1):
    """Images of a split in order, with their examples.

    Bad records are left out; the data set counts them.

    Args:
        dataset: A `CaptionDataset`.
        batch_size: B.
        limit: Maximum number of records to read, or None for all.
        host: Index of the host whose part to read.
        num_hosts: Number of hosts, and of parts.

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
    """Merges lists of (index, row) of several hosts into a list of rows."""
    pairs = sorted(itertools.chain(*parts), key=lambda pair: pair[0])
    return [row for _, row in pairs]


def summarize(rows):
    """Metrics of captioned images that need no model.

    Args:
        rows: `CaptionRow`s, at least one.

    Returns:
        Dict of `num_images`, `exact_match`, `distinct_captions` and
        `mean_words`.
    """
    captions = [normalize(row.caption) for row in rows]
    return {
        "num_images": len(rows),
        "exact_match": sum(row.exact_match for row in rows) / len(rows),
        "distinct_captions": len(set(captions)),
        "mean_words": sum(len(c.split()) for c in captions) / len(rows),
    }


def score_rows(rows, meteor=False):
    """`caption_metrics.Scores` of rows, with row numbers as keys."""
    # The rows' own keys need not be unique.
    return caption_metrics.score_captions(
        {i: row.caption for i, row in enumerate(rows)},
        {i: row.references for i, row in enumerate(rows)},
        meteor,
    )
