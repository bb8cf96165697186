"""Zero-shot classification: predicts the class whose name fits an image best.

The score of a captioner is the log-likelihood of the class's prompt, summed
over the tokens and not divided by their number. It is averaged over several
templates, and the best of several aliases counts. Reference: arXiv 2306.07915,
section 4.2; big_vision evaluators/proj/cappa/scoring_classifier.py.

The score of a contrastive model is the cosine of the image's embedding and the
normalized mean of the embeddings of all prompts of the class. Reference:
big_vision evaluators/proj/image_text/discriminative_classifier.py.

The default treatment of names differs. The contrastive results of the reference
are for canonical text and the first alias of a name. A likelihood is that of
text as people write it, so a captioner scores the name as it is.

Abbreviations for dimensions:
    N: images.  C: classes.  B: images per batch.  M: templates.
    D: width of the embeddings.  P: prompts of all classes.
    K: maximum number of labels of an image.
"""

import os

import numpy as np

from cappa_tf.evaluation import prompts
from cappa_tf.evaluation.class_figures import (
    confusion_lines,
    figures,
    first,
    ranks,
)
from cappa_tf.evaluation.evaluator import (
    Evaluator,
    Report,
    named,
    skipped_lines,
    table,
)
from cappa_tf.evaluation.features import RESIZES, preprocessing
from cappa_tf.evaluation.images import EvaluationImages, read_labels
from cappa_tf.inference.predictor import (
    BLIND,
    COSINE,
    MINUS_BLIND,
    PARALLEL,
    SCORE,
)
from cappa_tf.utils.arguments import (
    check_bool,
    check_choice,
    check_counts,
    check_number,
)

# Added to the norm of a class embedding, as in the reference.
_EPSILON = 1e-8


def class_embeddings(embeddings, classes):
    """Returns one normalized embedding of each class.

    Args:
        embeddings: float [P, D], normalized, of prompts.
        classes: int [P], the class of each prompt, 0 ... C - 1; each class
            has at least one.

    Returns:
        float [C, D].
    """
    embeddings, classes = np.asarray(embeddings), np.asarray(classes)
    means = np.stack(
        [
            embeddings[classes == number].mean(0)
            for number in range(classes.max() + 1)
        ]
    )
    norms = np.linalg.norm(means, axis=1, keepdims=True)
    return means / (norms + _EPSILON)


class _Likelihoods:
    """Scores of classes by the log-likelihood of their prompts.

    Args:
        predictor: `Predictor`.
        texts: C lists of texts, with the M texts of an alias together.
        num_templates: M.
        kind: Kind of the score.
        question: What the texts answer, for a captioner that was trained with
            prompts, or None.
    """

    def __init__(self, predictor, texts, num_templates, kind, question):
        self._predictor, self._kind = predictor, kind
        self._question = question
        self._flat = [text for some in texts for text in some]
        # Where the aliases of each class begin.
        aliases = np.array([len(some) // num_templates for some in texts])
        self._starts = np.cumsum(aliases) - aliases
        self._num_templates = num_templates

    def __call__(self, images):
        """Scores float64 [B, C] of images."""
        return self._by_class(
            self._predictor.score(
                images, self._flat, self._kind, self._question
            )
        )

    def blind(self):
        """Scores float64 [C] without any image."""
        asked = self._question and [self._question] * len(self._flat)
        return self._by_class(self._predictor.blind(self._flat, asked)[None])[0]

    def _by_class(self, scores):  # [B, P] -> [B, C]
        aliases = scores.reshape(len(scores), -1, self._num_templates).mean(2)
        return np.maximum.reduceat(aliases, self._starts, axis=1)


class _Cosines:
    """Scores of classes by the cosine of the image and the class.

    Args:
        predictor: `Predictor`.
        texts: C lists of texts.
    """

    def __init__(self, predictor, texts):
        self._predictor = predictor
        classes = np.repeat(np.arange(len(texts)), [*map(len, texts)])
        embedded = predictor.embed_texts(
            [text for some in texts for text in some]
        )
        self._classes = class_embeddings(embedded, classes)  # [C, D]

    def __call__(self, images):
        """Scores float64 [B, C] of images."""
        images = self._predictor.embed_images(images)
        return np.asarray(images @ self._classes.T, np.float64)


def class_scorer(
    predictor,
    names,
    templates=prompts.DEFAULT_TEMPLATES,
    kind=None,
    *,
    canonical=None,
    aliases=None,
    question=None,
):
    """A function that scores classes by their names.

    Args:
        predictor: `Predictor` of a model that scores texts.
        names: C names, with commas between aliases.
        templates: As of `ZeroShot`, like `canonical` and `aliases`.
        kind: Kind of the score; None for the first of the model's.
        canonical: Whether to lower-case and remove punctuation.
        aliases: Which aliases count.
        question: What the names answer, for a captioner that was trained with
            prompts.

    Returns:
        A function from images float32 [at most B, H, W, 3] in [-1, 1] to
        scores float64 [images, C].

    Raises:
        ValueError: If the model does not score texts.
    """
    predictor.require("Zero-shot classification", SCORE)
    templates = prompts.find_templates(templates)
    kind = predictor.score_kinds[0] if kind is None else kind
    by_cosine = kind == COSINE
    if canonical is None:
        canonical = by_cosine
    if aliases is None:
        aliases = "first" if by_cosine else "whole"
    texts = prompts.class_prompts(names, templates, canonical, aliases)
    if by_cosine:
        return _Cosines(predictor, texts)
    return _Likelihoods(predictor, texts, len(templates), kind, question)


class ZeroShot(Evaluator):
    """Zero-shot classification of a folder or data set of labeled images.

    Args:
        path: Path of the data, as in `EvaluationImages`.
        split: Name of the split.
        labels: JSON file of several labels per image, see `images.read_labels`,
            in place of the data's own; a prediction is right if it is any of
            them (as in ReaL, arXiv 2006.07159), and images without any are
            left out. None for the labels of the data.
        class_names: C names by class number, with commas between aliases;
            None for those of the data.
        templates: M texts with {} in place of the name, or "clip_paper" (81
            texts) or "clip_best" (8 texts).
        canonical: Whether to lower-case names and templates and remove their
            punctuation; None for yes by cosine, no by likelihood.
        aliases: "first", "all" or "whole", as in `prompts.class_prompts`; None
            for "first" by cosine, "whole" by likelihood.
        resize: "squash" for the whole image, or "resize_small" for its middle.
        margin: Ratio of the size the image is resized to and the size of the
            crop; 1.0 crops nothing. Some configurations of the reference use
            1.14 (1 / 0.875) for contrastive models, others 1.0.
        parallel: Whether to score in parallel mode, too.
        limit: Maximum number of images to use, or None for all.
        prompt: What the names answer, such as "classify:" with the template
            "{}", for a captioner that was trained with prompts.
        name: Name of the evaluator in the results.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split="test",
        *,
        labels: str | os.PathLike | None = None,
        class_names: list | tuple | None = None,
        templates: str | list | tuple = prompts.DEFAULT_TEMPLATES,
        canonical: bool | None = None,
        aliases: str | None = None,
        resize="squash",
        margin=1.0,
        parallel=False,
        limit: int | None = None,
        prompt: str | None = None,
        name="zero_shot",
    ):
        super().__init__(name)
        check_choice(RESIZES, resize=resize)
        check_counts(optional=True, limit=limit)
        check_number("margin", margin, 1.0)
        if canonical is not None:
            check_bool(canonical=canonical)
        if aliases is not None:
            check_choice(prompts.ALIASES, aliases=aliases)
        self._data = EvaluationImages(path, split)
        self._labels = labels
        self._class_names = class_names
        self._templates = prompts.find_templates(templates)
        self._canonical, self._aliases = canonical, aliases
        self._resize, self._margin = resize, margin
        self.needs = (SCORE, PARALLEL)[: 1 + parallel]
        self._limit, self._question = limit, prompt

    def open(self):
        """Checks that the data can be found."""
        self._data.open()
        names = self._names()
        if self._labels is not None:
            read_labels(self._labels, len(names))

    def _names(self):
        names = self._class_names or self._data.class_names
        if not names:
            raise ValueError(
                f"{self._data.path} does not name its classes: pass "
                "`class_names`"
            )
        return list(names)

    def _scorer(self, predictor, names, kind):
        return class_scorer(
            predictor,
            names,
            self._templates,
            kind,
            canonical=self._canonical,
            aliases=self._aliases,
            question=self._question,
        )

    def evaluate(self, predictor):
        """Classifies every image.

        Metrics of the default score are called `top_1` and so on. The parallel
        mode of a captioner adds `parallel/top_1` and so on, its scores minus
        those of the text without an image add `minus_blind/...`, and the
        cosine of a model that has both kinds of scores adds `cosine/...`.
        """
        self.check(predictor)
        data, names = self._data, self._names()
        # By default the whole image is used, as in training.
        prepare = preprocessing(
            predictor.image_size, self._resize, self._margin
        )
        kinds = [predictor.score_kinds[0], *self.needs[1:]]
        if COSINE not in kinds and predictor.can(COSINE):
            kinds.append(COSINE)
        scorers = {kind: self._scorer(predictor, names, kind) for kind in kinds}
        scores, labels = {kind: [] for kind in kinds}, []
        if self._labels is None:
            batches = data.labelled(prepare, predictor.batch_size)
        else:
            batches = data.multi_labelled(
                prepare,
                predictor.batch_size,
                read_labels(self._labels, len(names)),
            )
        for images, numbers, _ in first(batches, self._limit):
            if numbers.max() >= len(names):
                raise ValueError(
                    "Every label must have a class name. Received: label "
                    f"{numbers.max()} with the {len(names)} names {names}"
                )
            labels.append(numbers)
            for kind, parts in scores.items():
                parts.append(scorers[kind](images))  # [B, C]
        if not labels:
            raise ValueError(
                f"There is no labeled image in split {data.split!r} of "
                f"{data.path}. Received: skipped={dict(data.skipped)}"
            )
        labels = np.concatenate(labels)
        scores = {kind: np.concatenate(scores[kind]) for kind in kinds}
        if predictor.can(BLIND):
            plain = kinds[0]
            scores[MINUS_BLIND] = scores[plain] - scorers[plain].blind()
        return self._report(scores, labels, names, data.skipped)

    def _report(self, scores, labels, names, skipped):
        metrics, rows, confusions, items = {}, [], {}, {}
        plain = next(iter(scores))
        for kind, values in scores.items():
            found, confusion = figures(values, labels)
            right = ranks(values, labels) == 0
            items |= named(kind, {"top_1": right.astype(float).tolist()}, plain)
            confusions[kind] = confusion.tolist()
            metrics |= named(kind, found, plain)
            rows.append((kind, *found.values()))
        lines = [
            f"{len(labels)} images, {len(names)} classes",
            *table(("score", *found), rows),
            *confusion_lines(names, confusions[plain]),
            *skipped_lines(skipped),
        ]
        details = {
            "num_images": len(labels),
            "class_names": names,
            "templates": list(self._templates),
            "confusion": confusions[plain],
            "skipped": dict(skipped),
        }
        return Report(metrics, lines, details, items=items)
