"""Compositional benchmarks: SugarCrepe, ARO and synthetic scenes.

A choice is won if the right caption scores higher than all wrong ones. Every
subset is reported for four scores of a captioner: left to right; parallel
prediction (of models trained with it); the text without any image (`blind`,
which shows what language alone achieves: nearly everything on ARO); and the
first minus the third. A contrastive model has one, the cosine of its
embeddings.

Reference: arXiv 2306.07915, section 4.4: the caption with the higher
log-likelihood, or cosine, wins. A tie counts as an error.

Letters: B images per batch, K texts of one image.
"""

import collections
import itertools
import os

import numpy as np

from cappa_tf.data.images import image_files
from cappa_tf.evaluation.compositional import choices as choice_files
from cappa_tf.evaluation.compositional import scene_choices, word_swaps
from cappa_tf.evaluation.evaluator import Evaluator, Report, table
from cappa_tf.evaluation.images import EvaluationImages
from cappa_tf.inference.predictor import BLIND, MINUS_BLIND, SCORE
from cappa_tf.utils.arguments import check_counts


class Compositional(Evaluator):
    """Base class of the benchmarks, which counts the choices won.

    A metric is a fraction in [0, 1], of one of these kinds: `score/subset`;
    `score/group`, the mean of its subsets (`swap_att` and `swap_obj` are in
    the group `swap`); `score/macro`, the mean of all subsets; or
    `score/micro`, over all choices; these two also without `score/`, for the
    model's default score. The best possible value, `ceiling/macro`
    and so on, is below 1 if the vocabulary turns a right and a wrong caption
    into the same tokens.
    """

    needs = (SCORE,)
    groups = True

    def batches(self, predictor):
        """Yields (images [at most B, H, W, 3], list of `Choice`s per image).

        Args:
            predictor: `Predictor`.
        """
        raise NotImplementedError

    def evaluate(self, predictor):
        """Scores every text of every choice; the class lists the metrics."""
        self.check(predictor)
        plain = predictor.score_kinds[0]
        won = collections.defaultdict(lambda: collections.defaultdict(list))
        tied = collections.defaultdict(lambda: collections.defaultdict(list))
        rows, num_images = [], 0
        for images, choices in self.batches(predictor):
            num_images += len(images)
            tokens = _tokens(predictor, choices)
            for scores, choice in _scored(predictor, images, choices):
                row = {"subset": choice.subset, "texts": list(choice.texts)}
                if choice.image:
                    row["image"] = choice.image
                right, *wrong = (tokens[text] for text in choice.texts)
                won["ceiling"][choice.subset].append(right not in wrong)
                for mode, values in scores.items():
                    best = values[1:].max()
                    won[mode][choice.subset].append(values[0] > best)
                    tied[mode][choice.subset].append(values[0] == best)
                    row[mode] = values.tolist()
                rows.append(row)
        if not rows:
            raise ValueError(
                f"No image of {self.name} can be read. Received: "
                f"{self.missing()}"
            )
        return self._report(plain, won, tied, rows, num_images)

    def missing(self):
        """Counts of the choices left out, by reason."""
        return {}

    def _report(self, plain, won, tied, rows, num_images):
        subsets = {s: len(h) for s, h in sorted(won[plain].items())}
        shares = {mode: self._shares(hits) for mode, hits in won.items()}
        ties = {
            mode: float(np.mean([*itertools.chain(*hits.values())]))
            for mode, hits in tied.items()
        }
        lines = [f"{len(rows)} choices of {num_images} images"]
        lines += [f"left out: {n} x {why}" for why, n in self.missing().items()]
        body = [
            (name, subsets.get(name), *(shares[mode][name] for mode in shares))
            for name in shares[plain]
        ]
        body.append(("ties", None, *(ties.get(mode) for mode in shares)))
        lines += table(("", "choices", *shares), body)
        metrics = {
            f"{mode}/{name}": value
            for mode, found in shares.items()
            for name, value in found.items()
        }
        # Without the kind of score, to compare models that differ in it.
        metrics |= {name: shares[plain][name] for name in ("macro", "micro")}
        details = {
            "num_images": num_images,
            "num_choices": len(rows),
            "choices": subsets,
            "ties": ties,
            "left_out": self.missing(),
        }
        # Choices in the order of their subsets, as all models see them.
        items = {
            f"{mode}/micro": [
                float(x) for subset in subsets for x in hits[subset]
            ]
            for mode, hits in won.items()
        }
        items["micro"] = items[f"{plain}/micro"]
        return Report(metrics, lines, details, rows, items=items)

    def _shares(self, hits):
        """Fractions of choices won: subsets, groups, macro, micro."""
        shares = {s: float(np.mean(h)) for s, h in sorted(hits.items())}
        grouped = collections.defaultdict(list)
        for subset, share in shares.items():
            grouped[subset.split("_")[0]].append(share)
        macro = float(np.mean([*shares.values()]))
        groups = {g: float(np.mean(found)) for g, found in grouped.items()}
        return {
            **shares,
            **(groups if self.groups else {}),
            "macro": macro,
            "micro": float(np.mean([*itertools.chain(*hits.values())])),
        }


def _scored(predictor, images, choices):
    """Yields (dict mode -> float64 [texts of the choice], choice)."""
    # A text shared by several choices of an image is scored once.
    texts = [
        list(dict.fromkeys(itertools.chain(*(c.texts for c in some))))
        for some in choices
    ]
    found = {
        kind: predictor.score_captions(images, texts, kind)
        for kind in predictor.score_kinds
    }
    for i, some in enumerate(choices):
        position = {text: k for k, text in enumerate(texts[i])}
        for choice in some:
            chosen = [position[text] for text in choice.texts]
            scores = {mode: rows[i][chosen] for mode, rows in found.items()}
            if BLIND in scores:
                plain = scores[predictor.score_kinds[0]]
                scores[MINUS_BLIND] = plain - scores[BLIND]
            yield scores, choice


def _tokens(predictor, choices):
    """Dict from each text of the choices of a batch to its tokens, as bytes."""
    texts = itertools.chain(*(c.texts for some in choices for c in some))
    texts = list(dict.fromkeys(texts))
    ids = predictor.tokens(texts)
    return {text: tokens.tobytes() for text, tokens in zip(texts, ids)}


class FileChoices(Compositional):
    """Choices read from files, for the images that are present.

    Args:
        pictures: Folder of the images.
        limit: Maximum number of images to use, or None for all.
        name: Name of the evaluator in the results.
    """

    def __init__(self, pictures: str | os.PathLike, limit, name):
        super().__init__(name)
        check_counts(optional=True, limit=limit)
        self._pictures = os.fspath(pictures)
        self._limit = limit
        self._missing = collections.Counter()

    def read(self):
        """Returns the `Choice`s in the files."""
        raise NotImplementedError

    def open(self):
        """Checks that the files and at least one image can be found."""
        choices = self.read()
        if not any(os.path.exists(self._path(choice)) for choice in choices):
            raise ValueError(
                f"None of the {len({c.image for c in choices})} images, such "
                f"as {choices[0].image}, is in {self._pictures}"
            )

    def missing(self):
        """Counts of the choices left out, by reason."""
        return dict(self._missing)

    def batches(self, predictor):
        """Yields (images, list of `Choice`s per image), as `Compositional`."""
        self._missing.clear()
        pairs = self._read_images(predictor.preprocessing)
        while some := list(itertools.islice(pairs, predictor.batch_size)):
            images, choices = zip(*some)
            yield np.stack(images), list(choices)

    def _read_images(self, preprocessing):
        """Yields (image, its choices), those with most choices first."""
        by_part = collections.defaultdict(list)
        for choice in self.read():
            by_part[choice.image, choice.box].append(choice)
        # Images with equally many texts share a batch, to reduce padding.
        parts = list(by_part.values())[: self._limit]
        for choices in sorted(parts, key=len, reverse=True):
            try:
                path, box = self._path(choices[0]), choices[0].box
                yield preprocessing.read(path, box), choices
            except image_files.UnusableError as error:
                self._missing[error.reason] += len(choices)

    def _path(self, choice):
        return os.path.join(self._pictures, choice.image)


class SugarCrepe(FileChoices):
    """SugarCrepe: objects, attributes, relations replaced, swapped, added.

    Args:
        path: Folder of its seven files.
        pictures: Folder of all or some of COCO's val2017 images.
        limit: Maximum number of images to use, or None for all.
        name: Name of the evaluator in the results.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        pictures: str | os.PathLike,
        *,
        limit: int | None = None,
        name="sugar_crepe",
    ):
        super().__init__(pictures, limit, name)
        self._folder = os.fspath(path)

    def read(self):
        """Returns the `Choice`s of all subsets in the folder."""
        return choice_files.read_sugar_crepe(self._folder)


class Aro(FileChoices):
    """One file of ARO, or of the same format.

    `micro` is the fraction of all choices. `macro` is the mean over all
    relations or pairs of attributes; the authors leave out rare and symmetric
    ones, such as "next to".

    Args:
        path: Path of the JSON file.
        pictures: Folder that its image paths are relative to.
        limit: Maximum number of images to use, or None for all.
        name: Name of the evaluator in the results.
    """

    groups = False

    def __init__(
        self,
        path: str | os.PathLike,
        pictures: str | os.PathLike,
        *,
        limit: int | None = None,
        name="aro",
    ):
        super().__init__(pictures, limit, name)
        self._file = os.fspath(path)

    def read(self):
        """Returns the `Choice`s of the file."""
        return choice_files.read_aro(self._file)


class OfCaptions(Compositional):
    """Base class of the benchmarks that change the captions of a data set.

    Args:
        path: Path of the data, as in `EvaluationImages`.
        split: Name of the split.
        limit: Maximum number of images to use, or None for all.
        name: Name of the evaluator in the results.
    """

    def __init__(self, path, split, limit, name):
        super().__init__(name)
        self._data = EvaluationImages(path, split, limit)
        self._others = 0

    def choices(self, example):
        """Returns the `Choice`s made from the captions of an `Example`."""
        raise NotImplementedError

    def open(self):
        """Checks that the data can be found."""
        self._data.open()

    def missing(self):
        """Counts of the images left out, by reason."""
        others = {"no caption that can be changed": self._others}
        return +(collections.Counter(others) + self._data.skipped)

    def batches(self, predictor):
        """Yields (images, list of `Choice`s per image), as `Compositional`."""
        self._others = 0
        for images, examples in self._data.captioned(predictor):
            choices = [self.choices(example) for example in examples]
            good = [i for i, some in enumerate(choices) if some]
            self._others += len(choices) - len(good)
            if good:
                yield images[good], [choices[i] for i in good]


class Scenes(OfCaptions):
    """Swapped and replaced words in captions of synthetic scenes.

    Args:
        path: Folder of the synthetic data set.
        split: Name of the split.
        limit: Maximum number of images to use, or None for all.
        seed: Seed of the replacements, as in `scene_choices.choices`.
        name: Name of the evaluator in the results.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split="heldout",
        *,
        limit: int | None = None,
        seed=0,
        name="scenes",
    ):
        super().__init__(path, split, limit, name)
        self._seed = seed

    def choices(self, example):
        """Returns the `Choice`s of a scene; none for another caption."""
        return scene_choices.choices(
            example.captions[0], example.key, self._seed
        )


class SwappedWords(OfCaptions):
    """Two colors or two nouns swapped in people's captions (`word_swaps`).

    Args:
        path: Path of the data, as in `EvaluationImages`.
        split: Name of the split.
        limit: Maximum number of images to use, or None for all.
        name: Name of the evaluator in the results.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split="test",
        *,
        limit: int | None = None,
        name="swapped_words",
    ):
        super().__init__(path, split, limit, name)

    def choices(self, example):
        """Returns the `Choice`s of an image; none without a word to swap."""
        return word_swaps.choices(example.captions)
