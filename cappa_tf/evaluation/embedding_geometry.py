"""Geometry of the embeddings of a contrastive model on the unit sphere.

    modality gap   length of the difference of the mean image embedding and the
                   mean text embedding (Liang et al., arXiv 2203.02053)
    alignment      mean squared distance between an image and a text of it; 0
                   if they coincide
    uniformity     log of the mean of exp(-2 distance^2) over pairs of two
                   images, or of two texts; lower is more even, 0 is a single
                   point (both: Wang and Isola, arXiv 2005.10242)

All of them are exact over the whole split, not means of batches.

Abbreviations for dimensions:
    I: images.  T: texts, each of one image.  N: embeddings of one kind.
    C: width of the embeddings.
"""

import itertools
import os

import numpy as np

from cappa_tf.evaluation.evaluator import (
    Evaluator,
    Report,
    skipped_lines,
    table,
)
from cappa_tf.evaluation.images import EvaluationImages
from cappa_tf.inference.predictor import COSINE
from cappa_tf.utils.arguments import check_counts

# Rows whose distances to all others are held at once.
_ROWS = 256


def uniformity(embeddings, rows=_ROWS):
    """Log of the mean of exp(-2 distance^2) over distinct pairs.

    Args:
        embeddings: float [N, C], normalized.
        rows: Rows of the [N, N] distances that are held at once.

    Returns:
        A float; NaN for fewer than two embeddings, which have no pair.
    """
    x = np.asarray(embeddings, np.float64)
    count = len(x)
    if count < 2:
        return float("nan")
    squares = (x**2).sum(1)
    total = 0.0
    for start in range(0, count, rows):
        some = slice(start, start + rows)
        distances = squares[some, None] + squares - 2 * (x[some] @ x.T)
        kernel = np.exp(-2 * np.maximum(distances, 0.0))
        # An embedding and itself are not a pair.
        np.fill_diagonal(kernel[:, start:], 0.0)
        total += kernel.sum()
    return float(np.log(total / (count * (count - 1))))


def geometry(images, texts, owners):
    """Metrics of the embeddings of images and of their texts.

    Args:
        images: float [I, C], normalized.
        texts: float [T, C], normalized.
        owners: int [T], the image that each text belongs to.

    Returns:
        Dict of `modality_gap`, `alignment`, `uniformity/images`,
        `uniformity/texts`, `cosine/pairs` (mean cosine of a text and its
        image) and `cosine/non_pairs` (mean cosine of a text and any other
        image; NaN if there is only one image).
    """
    x, y = np.asarray(images, np.float64), np.asarray(texts, np.float64)
    owners = np.asarray(owners)
    own = x[owners]  # [T, C]
    pairs = (own * y).sum()
    # The sum of all cosines is the product of the sums.
    others = x.sum(0) @ y.sum(0) - pairs
    num_others = (len(x) - 1) * len(y)
    return {
        "modality_gap": float(np.linalg.norm(x.mean(0) - y.mean(0))),
        "alignment": float(((own - y) ** 2).sum(1).mean()),
        "uniformity/images": uniformity(x),
        "uniformity/texts": uniformity(y),
        "cosine/pairs": float(pairs / len(y)),
        "cosine/non_pairs": (
            float(others / num_others) if num_others else float("nan")
        ),
    }


class EmbeddingGeometry(Evaluator):
    """Modality gap, alignment and uniformity on one split.

    Args:
        path: Path of the data, as in `EvaluationImages`.
        split: Name of the split.
        limit: Maximum number of images to use, or None for all.
        captions_per_image: At most as many captions of each; None for all.
            Captions of one image are close to each other, so several of them
            give a higher uniformity of texts than one does.
        name: Name of the evaluator in the results.
    """

    needs = (COSINE,)

    def __init__(
        self,
        path: str | os.PathLike,
        split="test",
        *,
        limit: int | None = None,
        captions_per_image: int | None = None,
        name="geometry",
    ):
        super().__init__(name)
        check_counts(optional=True, captions_per_image=captions_per_image)
        self._data = EvaluationImages(path, split, limit)
        self._most = captions_per_image

    def open(self):
        """Checks that the data can be found."""
        self._data.open()

    def evaluate(self, predictor):
        """Embeds each image and text once and reports their `geometry`."""
        self.check(predictor)
        images, owned = [], []
        for pixels, examples in self._data.captioned(predictor):
            images.append(predictor.embed_images(pixels))
            owned += [example.captions[: self._most] for example in examples]
        texts = list(itertools.chain(*owned))
        owners = np.repeat(np.arange(len(owned)), [*map(len, owned)])
        metrics = geometry(
            np.concatenate(images), predictor.embed_texts(texts), owners
        )
        skipped = dict(self._data.skipped)
        lines = [
            f"{len(owned)} images, {len(texts)} captions",
            *table(("embeddings", ""), metrics.items()),
            *skipped_lines(skipped),
        ]
        details = {
            "num_images": len(owned),
            "num_captions": len(texts),
            "skipped": skipped,
        }
        return Report(metrics, lines, details)
