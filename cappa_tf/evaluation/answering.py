"""Answers of a model to the questions of a split, with and without images.

An answer is generated, or it is the likeliest one of a list. Two baselines tell
how much of it is due to the image: the answer to the same question without any
image (the blind decoder), and with the image of another record.

Abbreviations for dimensions:
    B: images per batch.       H, W: height and width of the image in pixels.
    N: questions, at most B.   C: answers to choose from.
"""

import dataclasses
import math
import os

import numpy as np

from cappa_tf.data import schema
from cappa_tf.data.prompts import QUESTION, check_template
from cappa_tf.data.sources import prepared
from cappa_tf.evaluation.images import EvaluationImages
from cappa_tf.inference.captions import CaptionRow
from cappa_tf.inference.predictor import AUTOREGRESSIVE, BLIND, GENERATE
from cappa_tf.utils import files
from cappa_tf.utils.arguments import check_choice

# The image that a question is answered with: its own, or one of the baselines.
OWN = "image"
OTHER = "other_image"
BASELINES = (BLIND, OTHER)


@dataclasses.dataclass
class Answered:
    """One question with the answers of people and of the model.

    Attributes:
        key: Name of the image.
        prompt: What the model read before its answer, "" for nothing.
        answers: Answers of people, one or more.
        type: Type of the question, "" if unknown.
        said: Dict from `OWN` and each baseline to the model's answer.
        image: Contents of the image file, or None.
    """

    key: str
    prompt: str
    answers: list
    type: str
    said: dict
    image: bytes | None = dataclasses.field(default=None, repr=False)

    def sheet_row(self):
        """The `CaptionRow` of an image sheet."""
        return CaptionRow(
            key=self.key,
            caption=self.said[OWN],
            log_likelihood=math.nan,
            pieces=[],
            probabilities=[],
            references=self.answers,
            image=self.image,
            prompt=self.prompt,
        )


class Answering:
    """Answers all questions of a split.

    Args:
        path: Path of the data, as in `EvaluationImages`.
        split: Name of the split.
        limit: Maximum number of images to use, or None for all.
        prompt: Template of the prompts, as in `CaptionDataset`; None for the
            one with which the model was trained.
        asks: Whether that one has a place for a question.
        choices: Answers to choose from, a list, or the path of a text file
            with one on each line; None to generate answers.
        baselines: Which of `BASELINES` to answer with, too.

    Attributes:
        needs: Capabilities that the model must have.
        skipped: Counter of the images left out in the last pass, by reason.
    """

    def __init__(self, path, split, limit, *, prompt, asks, choices, baselines):
        check_template(prompt)
        for baseline in baselines:
            check_choice(BASELINES, baselines=baseline)
        self._source = prepared.as_source(path)
        self._split, self._limit = split, limit
        self._prompt, self._asks = prompt, asks
        self._choices, self._baselines = choices, tuple(baselines)
        # Checks its arguments.
        self.skipped = EvaluationImages(self._source, split, limit).skipped
        self.needs = (GENERATE,) if choices is None else (AUTOREGRESSIVE,)

    def open(self):
        """Checks that the data and the list of answers can be found."""
        EvaluationImages(self._source, self._split).open()
        self.choices()

    def check(self, predictor):
        """Checks that the model was trained with a prompt that fits.

        Raises:
            ValueError: If it was not, or with several that do.
        """
        if self._asks and not predictor.prompts:
            raise ValueError(
                "Questions are for a model that was trained with prompts. "
                f"Received: {predictor.name}, which was not"
            )
        self.template(predictor)

    def choices(self):
        """The answers to choose from, or None.

        Raises:
            ValueError: If there are fewer than two, or the file is missing.
        """
        given = self._choices
        if isinstance(given, str | os.PathLike):
            try:
                given = files.read_text(given).splitlines()
            except (OSError, ValueError) as error:
                raise ValueError(
                    "The answers to choose from must be a list or a text file. "
                    f"Received: answers={self._choices!r} ({error})"
                ) from None
        if given is None:
            return None
        found = [answer.strip() for answer in given if answer.strip()]
        found = list(dict.fromkeys(found))
        if len(found) < 2:
            raise ValueError(
                "There must be at least two different answers to choose from. "
                f"Received: answers={self._choices!r}"
            )
        return found

    def template(self, predictor):
        """The template of the prompts for a model.

        Raises:
            ValueError: If the model was trained with several that fit.
        """
        if self._prompt is not None:
            return self._prompt
        own = [
            template
            for template in predictor.prompts
            if template and (QUESTION in template) == self._asks
        ]
        if len(own) > 1:
            raise ValueError(
                "`prompt` must be one of those with which the model was "
                f"trained: {own}. Received: prompt=None"
            )
        return own[0] if own else None

    def answer(self, predictor, keep_images=False):
        """Answers all questions.

        Args:
            predictor: `Predictor` of the model.
            keep_images: Whether to keep the contents of the image files.

        Returns:
            A list of `Answered`, of which there is at least one.

        Raises:
            ValueError: If there is no question.
        """
        choices, found = self.choices(), []
        data = EvaluationImages(
            self._source, self._split, self._limit, self.template(predictor)
        )
        baselines = [b for b in self._baselines if b != BLIND]
        is_blind = BLIND in self._baselines and predictor.can(BLIND)
        blind, last = {}, None
        for images, examples in data.captioned(predictor):
            others = [images[-1:] if last is None else last, images[:-1]]
            sets = {OWN: images, OTHER: np.concatenate(others)}
            last = images[-1:]
            asked = [
                (i, question)
                for i, example in enumerate(examples)
                for question in _questions(example)
            ]
            for start in range(0, len(asked), predictor.batch_size):
                some = asked[start : start + predictor.batch_size]
                places = [i for i, _ in some]
                prompts = [question.text for _, question in some]
                said = {
                    kind: respond(
                        predictor, sets[kind][places], prompts, choices
                    )
                    for kind in (OWN, *baselines)
                }
                if is_blind:
                    # It depends on nothing but the prompt.
                    new = [*dict.fromkeys(p for p in prompts if p not in blind)]
                    if new:
                        answers = respond(predictor, None, new, choices)
                        blind.update(zip(new, answers))
                    said[BLIND] = [blind[prompt] for prompt in prompts]
                for n, (i, question) in enumerate(some):
                    found.append(
                        Answered(
                            examples[i].key,
                            question.text,
                            question.answers,
                            question.type,
                            {kind: each[n] for kind, each in said.items()},
                            examples[i].image if keep_images else None,
                        )
                    )
        self.skipped = data.skipped
        if not found:
            raise ValueError(
                "There is nothing to answer. Received: split "
                f"{self._split!r} of {data.path}, skipped={data.skipped}"
            )
        return found


def respond(predictor, images, prompts, choices=None):
    """Answers questions.

    Args:
        predictor: `Predictor` of the model.
        images: float [N, H, W, 3] in [-1, 1], or None for none.
        prompts: N strings, "" for nothing.
        choices: C answers to choose from, or None to generate one.

    Returns:
        A list of N strings.
    """
    if choices is None:
        return predictor.captions(images, prompts)
    texts = [choices] * len(prompts)
    kind = AUTOREGRESSIVE
    if images is None:
        images, kind = [None] * len(prompts), BLIND
    scores = predictor.score_captions(images, texts, kind, prompts)
    return [choices[int(row.argmax())] for row in scores]


def _questions(example):
    """The `schema.Question`s of an example; all its captions without any."""
    if example.prompts:
        return schema.questions(example)
    return [schema.Question("", example.captions)]
