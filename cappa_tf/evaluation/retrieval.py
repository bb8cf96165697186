"""Image-text retrieval by likelihood, in both directions.

The score of a pair is the caption's log-likelihood given the image. Some
captions are more likely than others whatever the image shows, and so rank
first for all images. Therefore images also rank captions by the score minus
the caption's log-likelihood without an image (`minus_blind`). For a given
caption this does not change the order of the images.

Letters: I images, T captions, each of one image.
"""

import itertools
import os

import numpy as np

from cappa_tf.evaluation.evaluator import (
    Evaluator,
    Report,
    named,
    skipped_lines,
    table,
)
from cappa_tf.evaluation.images import EvaluationImages
from cappa_tf.inference.predictor import BLIND, MINUS_BLIND, PARALLEL, SCORE

RECALLS = (1, 5, 10)


def recalls(scores, owners, at=RECALLS):
    """Recall@k in both directions.

    Args:
        scores: float [I, T].
        owners: int [T], the image that each caption was written for; each
            image has at least one.
        at: The values of k.

    Returns:
        Dict of `image_to_text/recall@k`, the fraction of images that have one
        of their own captions among the k best, and `text_to_image/recall@k`,
        the fraction of captions whose image is among the k best. A wrong one
        with the same score counts as better, so a model that gives all pairs
        the same score has a recall of 0.
    """
    scores, owners = np.asarray(scores), np.asarray(owners)
    images = np.arange(scores.shape[0])
    own = owners == images[:, None]  # [I, T]
    if owners.shape != scores.shape[1:] or not own.any(1).all():
        raise ValueError(
            "Every caption must have one image, and every image a caption. "
            f"Received: scores of shape {scores.shape}, {len(owners)} owners "
            f"from {set(owners.tolist())}"
        )
    best = np.where(own, scores, -np.inf).max(1)  # [I]
    texts_before = (~own & (scores >= best[:, None])).sum(1)  # [I]
    right = scores[owners, np.arange(len(owners))]  # [T]
    images_before = (~own & (scores >= right)).sum(0)  # [T]
    return {
        f"{direction}/recall@{k}": float(np.mean(before < k))
        for direction, before in (
            ("image_to_text", texts_before),
            ("text_to_image", images_before),
        )
        for k in at
    }


class Retrieval(Evaluator):
    """Retrieval in one split of captioned images.

    Every caption is scored for every image, so the cost of I * T scores grows
    with the square of `limit`.

    Args:
        path: Path of the data, as in `EvaluationImages`.
        split: Name of the split.
        limit: Maximum number of images to use, or None for all.
        captions_per_image: Maximum number of captions of each image; None for
            all.
        parallel: Whether to also score by parallel prediction.
        name: Name of the evaluator in the results.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split="test",
        *,
        limit: int | None = 100,
        captions_per_image: int | None = None,
        parallel=False,
        name="retrieval",
    ):
        super().__init__(name)
        self._data = EvaluationImages(path, split, limit)
        self._most = captions_per_image
        self.needs = (SCORE, PARALLEL)[: 1 + parallel]

    def open(self):
        """Checks that the data can be found."""
        self._data.open()

    def evaluate(self, predictor):
        """Scores all pairs of images and captions.

        Returns:
            A `Report` with the metrics of `recalls`; those of other scores
            have the prefix `minus_blind/` or `parallel/`.
        """
        self.check(predictor)
        batches = list(self._data.captioned(predictor))
        owned = [
            example.captions[: self._most]
            for _, examples in batches
            for example in examples
        ]
        texts = list(itertools.chain(*owned))
        owners = np.repeat(np.arange(len(owned)), [*map(len, owned)])
        plain = predictor.score_kinds[0]
        scores = {
            kind: np.concatenate(
                [predictor.score(images, texts, kind) for images, _ in batches]
            )
            for kind in (plain, *self.needs[1:])
        }
        if predictor.can(BLIND):
            scores[MINUS_BLIND] = scores[plain] - predictor.blind(texts)
        metrics, rows = {}, []
        for kind, values in scores.items():
            found = recalls(values, owners)
            metrics |= named(kind, found, plain)
            both = np.split(np.array([*found.values()]), 2)
            rows.append((f"{kind}, image to text", *map(float, both[0])))
            if kind != MINUS_BLIND:  # has the same order of images
                rows.append((f"{kind}, text to image", *map(float, both[1])))
        skipped = dict(self._data.skipped)
        lines = [
            f"{len(owned)} images, {len(texts)} captions",
            *table(("", *(f"recall@{k}" for k in RECALLS)), rows),
            *skipped_lines(skipped),
        ]
        details = {
            "num_images": len(owned),
            "num_captions": len(texts),
            "skipped": skipped,
        }
        return Report(metrics, lines, details)
