"""Correlation of the model's score with human judgments of captions.

Flickr8k (Hodosh et al. 2013) has judgments of captions, most of them written
for other images:
    ExpertAnnotations.txt          image, caption, three ratings from 1 (not
                                   related to the image) to 4 (correct)
    CrowdFlowerAnnotations.txt     image, caption, fraction of yes, number of
                                   yes, number of no (may be compressed: .gz)
A caption is named "other.jpg#2" for the third one of other.jpg.

As in CLIPScore (arXiv 2104.08718, section 4) captions that were written for
the image itself are left out (158 of 5,822 of the experts'), and each expert's
rating is a separate pair (score, rating), three pairs per caption. The
literature reports Kendall's tau-c for the experts and tau-b for CrowdFlower;
this module computes both for either.
"""

import collections
import dataclasses
import gzip
import itertools
import os
import pathlib

import numpy as np
from absl import logging

from cappa_tf.data.images import image_files
from cappa_tf.data.sources import image_rows
from cappa_tf.evaluation.evaluator import (
    Evaluator,
    Report,
    named,
    skipped_lines,
    table,
)
from cappa_tf.inference.predictor import (
    AUTOREGRESSIVE,
    BLIND,
    MINUS_BLIND,
    SCORE,
)
from cappa_tf.utils.arguments import check_choice, check_counts, check_extra

FILES = {
    "expert": "ExpertAnnotations.txt",
    "crowdflower": "CrowdFlowerAnnotations.txt",
}


@dataclasses.dataclass(frozen=True)
class Judgment:
    """Human ratings of one caption for one image.

    Attributes:
        image: File name of the image.
        caption: Name of the caption, such as "other.jpg#2".
        ratings: One or more numbers, higher is better.
    """

    image: str
    caption: str
    ratings: tuple

    @property
    def is_own(self):
        """Whether the caption was written for this image."""
        return self.caption.rpartition("#")[0] == self.image


def read(folder, which="expert"):
    """Reads a file of judgments.

    Args:
        folder: Folder of the file.
        which: "expert" or "crowdflower".

    Returns:
        A list of `Judgment`s.

    Raises:
        ValueError: If there is no such file, or a line is malformed.
    """
    check_choice(FILES, which=which)
    path = pathlib.Path(folder) / FILES[which]
    compressed = path.with_name(path.name + ".gz")
    if not path.exists() and not compressed.exists():
        raise ValueError(f"There must be a file {path} or {compressed}")
    opener = open if path.exists() else gzip.open
    judgments = []
    with opener(path if path.exists() else compressed, "rt") as lines:
        for number, line in enumerate(lines, 1):
            try:
                image, caption, *numbers = line.split()
                found = tuple(map(float, numbers))
                # The first of CrowdFlower's numbers is the fraction of yes.
                ratings = found if which == "expert" else (found[0],)
                int(caption.rpartition("#")[2])
            except (ValueError, IndexError):
                ratings = ()
            if not ratings:
                raise ValueError(
                    f"{path}, line {number}, is not a judgment: {line!r}"
                )
            judgments.append(Judgment(image, caption, ratings))
    return judgments


def correlations(values, ratings):
    """Kendall's tau of one number per caption with all of its ratings.

    Args:
        values: float [captions].
        ratings: A list of the ratings of each caption.

    Returns:
        Dict of `tau_b` and `tau_c`.
    """
    from scipy import stats

    repeated = np.repeat(values, [*map(len, ratings)])
    flat = np.concatenate([np.asarray(some, float) for some in ratings])
    return {
        f"tau_{variant}": float(
            stats.kendalltau(repeated, flat, variant=variant).statistic
        )
        for variant in "bc"
    }


class Judgments(Evaluator):
    """Correlation of the model's score with people's judgments.

    Args:
        path: Folder of Flickr8k with its captions file, its images and, in the
            subfolder `judgments`, the files described above.
        which: "expert" or "crowdflower".
        limit: Maximum number of images to use, or None for all.
        name: Name of the evaluator in the results.
    """

    needs = (SCORE,)

    def __init__(
        self,
        path: str | os.PathLike,
        which="expert",
        *,
        limit: int | None = None,
        name="judgments",
    ):
        super().__init__(name)
        check_choice(FILES, which=which)
        check_counts(optional=True, limit=limit)
        self._path = os.fspath(path)
        self._which, self._limit = which, limit

    def open(self):
        """Checks that the data can be found."""
        check_extra("Kendall's tau", "eval", "scipy")
        self._read(log=True)

    def _read(self, log=False):
        """(judgments by image, caption name -> text, image -> path)."""
        skipped = image_rows.Skipped()
        listed = image_rows.read_rows(self._path, skipped=skipped)
        if log and skipped.counts:
            logging.warning("%s: skipped %s", self._path, skipped)
        rows = {os.path.basename(row.path): row for row in listed}
        captions = {
            f"{name}#{i}": text
            for name, row in rows.items()
            for i, text in enumerate(row.captions)
        }
        by_image = collections.defaultdict(list)
        folder = os.path.join(self._path, "judgments")
        for judgment in read(folder, self._which):
            if judgment.is_own:
                continue
            if judgment.image not in rows or judgment.caption not in captions:
                raise ValueError(
                    "A judgment's image and caption must be in the captions "
                    f"file of {self._path}. Received: {judgment}"
                )
            by_image[judgment.image].append(judgment)
        some = dict(itertools.islice(by_image.items(), self._limit))
        return some, captions, {name: row.path for name, row in rows.items()}

    def evaluate(self, predictor):
        """Scores every judged caption for its image.

        Returns:
            A `Report` with `tau_b` and `tau_c` of the log-likelihood, or of
            the cosine (which orders captions as CLIPScore does, unless it is
            negative). With a prefix that of a captioner has those of the
            log-likelihood per token (`per_token/`), by parallel prediction
            (`parallel/`), without the image (`blind/`), and with the image
            minus without it (`minus_blind/`).
        """
        self.check(predictor)
        by_image, captions, paths = self._read()
        skipped = collections.Counter()
        columns = collections.defaultdict(list)
        judged = []
        pairs = _images(by_image, paths, predictor.preprocessing, skipped)
        while some := list(itertools.islice(pairs, predictor.batch_size)):
            images, judgments = zip(*some)
            judged += itertools.chain(*judgments)
            texts = [[captions[j.caption] for j in each] for each in judgments]
            for kind in predictor.score_kinds:
                found = predictor.score_captions(np.stack(images), texts, kind)
                columns[kind] += np.concatenate(found).tolist()
        if not judged:
            raise ValueError(
                f"No judged image can be read. Received: {dict(skipped)}"
            )
        columns = {kind: np.array(values) for kind, values in columns.items()}
        plain = predictor.score_kinds[0]
        if plain == AUTOREGRESSIVE:  # a sum over tokens
            texts = [captions[j.caption] for j in judged]
            counts = predictor.count_tokens(texts)
            columns["per_token"] = columns[plain] / counts
        if BLIND in columns:
            columns[MINUS_BLIND] = columns[plain] - columns[BLIND]
        return self._report(columns, judged, len(by_image), skipped)

    def _report(self, columns, judged, num_images, skipped):
        ratings = [judgment.ratings for judgment in judged]
        metrics, body = {}, []
        head = "log-likelihood" if "per_token" in columns else "score"
        plain = next(iter(columns))
        for kind, values in columns.items():
            found = correlations(values, ratings)
            metrics |= named(kind, found, plain)
            body.append((kind, *found.values()))
        count = sum(map(len, ratings))
        lines = [
            f"{self._which}: {count} ratings of {len(judged)} captions of "
            f"{num_images} images",
            *table((head, *found), body),
            *skipped_lines(skipped),
        ]
        details = {
            "which": self._which,
            "num_images": num_images,
            "num_captions": len(judged),
            "num_ratings": count,
            "skipped": dict(skipped),
        }
        rows = [
            {
                "image": judgment.image,
                "caption": judgment.caption,
                "ratings": judgment.ratings,
                **{kind: values[i] for kind, values in columns.items()},
            }
            for i, judgment in enumerate(judged)
        ]
        return Report(metrics, lines, details, rows)


def _images(by_image, paths, preprocessing, skipped):
    """Yields (image [H, W, 3], its judgments)."""
    for name, judgments in by_image.items():
        try:
            yield preprocessing.read(paths[name]), judgments
        except image_files.UnusableError as error:
            skipped[error.reason] += 1
