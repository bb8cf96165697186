"""Image-text retrieval: finds the caption of an image and vice versa.

The score of a pair is the caption's log-likelihood given the image, or the
cosine of their embeddings. Some captions are likely whatever the image shows,
and would rank first for all images; so captions are also ranked by the
log-likelihood minus that of the caption without an image (`minus_blind`). This
does not change the order of images for a given caption.

Abbreviations for dimensions:
    I: images.  T: captions, each of one image.  C: width of the embeddings.
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
from cappa_tf.inference.predictor import (
    BLIND,
    COSINE,
    MINUS_BLIND,
    PARALLEL,
    SCORE,
)
from cappa_tf.utils.arguments import check_counts

RECALLS = (1, 5, 10)
# Default limit of images if likelihoods are scored.
_LIKELIHOOD_LIMIT = 100


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
        the fraction of captions whose image is among the k best. A wrong
        candidate with the same score counts as better, so a model that gives
        all pairs the same score has a recall of 0.
    """
    return {
        name: float(np.mean(found))
        for name, found in hits(scores, owners, at).items()
    }


def hits(scores, owners, at=RECALLS):
    """For each query whether it is found: bool [I] or [T], as in `recalls`."""
    scores, owners = np.asarray(scores), np.asarray(owners)
    count = len(scores)
    owned = scores.shape[1:] == owners.shape and len(owners) > 0
    if not owned or np.unique(owners).tolist() != list(range(count)):
        raise ValueError(
            "Every caption must have one image, and every image a caption. "
            f"Received: scores of shape {scores.shape}, {len(owners)} owners "
            f"from {set(owners.tolist())}"
        )
    right = scores[owners, np.arange(len(owners))]  # [T]
    best = np.full(count, -np.inf)
    np.maximum.at(best, owners, right)  # [I]
    # An image's own captions are not before its best one.
    own = np.bincount(owners, right >= best[owners], count)
    texts_before = (scores >= best[:, None]).sum(1) - own  # [I]
    images_before = (scores >= right).sum(0) - 1  # [T]
    return {
        f"{direction}/recall@{k}": before < k
        for direction, before in (
            ("image_to_text", texts_before),
            ("text_to_image", images_before),
        )
        for k in at
    }


class Retrieval(Evaluator):
    """Retrieval in one split of captioned images.

    By likelihood every caption is scored for every image: I * T scores, whose
    cost grows with the square of `limit`. By cosine each image and each caption
    is embedded once.

    Args:
        path: Path of the data, as in `EvaluationImages`.
        split: Name of the split.
        limit: Maximum number of images to use; by default 100 if likelihoods
            are scored, and all otherwise.
        captions_per_image: At most as many captions of each; None for all.
        parallel: Whether to score in parallel mode, too.
        name: Name of the evaluator in the results.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split="test",
        *,
        limit: int | None = None,
        captions_per_image: int | None = None,
        parallel=False,
        name="retrieval",
    ):
        super().__init__(name)
        check_counts(optional=True, limit=limit)
        self._data = EvaluationImages(path, split)
        self._limit = limit
        self._most = captions_per_image
        self.needs = (SCORE, PARALLEL)[: 1 + parallel]

    def open(self):
        """Checks that the data can be found."""
        self._data.open()

    def evaluate(self, predictor):
        """Scores all pairs of images and captions.

        The names of metrics of other scores than the default begin with
        `minus_blind/`, `parallel/` or, for a captioner that also has a cosine,
        `cosine/`.
        """
        self.check(predictor)
        plain = predictor.score_kinds[0]
        kinds = [plain, *self.needs[1:]]
        likelihoods = [kind for kind in kinds if kind != COSINE]
        if COSINE not in kinds and predictor.can(COSINE):
            kinds.append(COSINE)
        limit = self._limit
        if limit is None and likelihoods:
            limit = _LIKELIHOOD_LIMIT
        batches, embedded, owned = [], [], []
        for images, examples in self._data.captioned(predictor, limit):
            owned += [example.captions[: self._most] for example in examples]
            if likelihoods:
                batches.append(images)
            if COSINE in kinds:  # Images need not be kept.
                embedded.append(predictor.embed_images(images))
        texts = list(itertools.chain(*owned))
        owners = np.repeat(np.arange(len(owned)), [*map(len, owned)])
        scores = {
            kind: np.concatenate(
                [predictor.score(images, texts, kind) for images in batches]
            )
            for kind in likelihoods
        }
        if COSINE in kinds:
            scores[COSINE] = predictor.cosines(np.concatenate(embedded), texts)
        if predictor.can(BLIND):
            scores[MINUS_BLIND] = scores[plain] - predictor.blind(texts)
        metrics, rows, items = {}, [], {}
        for kind, values in scores.items():
            queries = hits(values, owners)
            found = {name: float(np.mean(x)) for name, x in queries.items()}
            metrics |= named(kind, found, plain)
            queries = {
                name: x.astype(float).tolist() for name, x in queries.items()
            }
            items |= named(kind, queries, plain)
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
        return Report(metrics, lines, details, items=items)
