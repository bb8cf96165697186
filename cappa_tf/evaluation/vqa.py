"""Visual question answering: exact match and VQA accuracy."""

import os

import numpy as np

from cappa_tf.evaluation.answering import BASELINES, OWN, Answering
from cappa_tf.evaluation.evaluator import (
    Evaluator,
    Report,
    named,
    skipped_lines,
    table,
)
from cappa_tf.evaluation.vqa_accuracy import (
    PEOPLE,
    answer_type,
    vqa_accuracy,
)
from cappa_tf.inference.captions import normalize
from cappa_tf.utils.arguments import check_integer

# Questions to print, and types to report as metrics of their own.
_MOST_LINES = 10
_MOST_TYPES = 12


class VQA(Evaluator):
    """Answers to questions about images, compared to people's.

    `exact_match` is the fraction of answers equal to one of people's, up to
    case and spaces; `vqa_accuracy` is that of VQAv2 (`vqa_accuracy.py`), over
    the questions that at least four people answered. Both are also given by
    type of question: that of the data, or else that of people's answers,
    "yes/no", "number" or "other". Metrics of a baseline begin with its name:
    "blind/exact_match".

    Args:
        path: Path of the data, as in `EvaluationImages`; its captions are
            answers, and its prompts questions.
        split: Name of the split.
        prompt: Template of the prompts, such as "answer: {question}"; None for
            the model's own.
        answers: Answers to choose from by their likelihood, a list, or the
            path of a text file with one on each line; None to generate them.
        limit: Maximum number of images to use, or None for all.
        baselines: "blind", answers without any image, and "other_image",
            answers with the image of the record before; both, one or neither.
        sheet_images: Number of images on the sheet of wrong answers.
        name: Name of the evaluator in the results.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split="test",
        *,
        prompt: str | None = None,
        answers: list | tuple | str | os.PathLike | None = None,
        limit: int | None = None,
        baselines: list | tuple = BASELINES,
        sheet_images=12,
        name="vqa",
    ):
        super().__init__(name)
        check_integer("sheet_images", sheet_images, 0)
        self._sheet_images = sheet_images
        self._answering = Answering(
            path,
            split,
            limit,
            prompt=prompt,
            asks=True,
            choices=answers,
            baselines=baselines,
        )
        self.needs = self._answering.needs

    def check(self, predictor):
        """Checks that a model can answer, and was trained with a prompt."""
        super().check(predictor)
        self._answering.check(predictor)

    def open(self):
        """Checks that the data can be found."""
        self._answering.open()

    def evaluate(self, predictor):
        """Answers all questions.

        Returns:
            A `Report` with the metrics above and `num_questions`; a row for
            each question, and the sheet "wrong".
        """
        self.check(predictor)
        answered = self._answering.answer(
            predictor, keep_images=self._sheet_images > 0
        )
        scored = [_Scored(one) for one in answered]
        by_type = {}
        for one in scored:
            by_type.setdefault(one.type, []).append(one)
        by_type = dict(sorted(by_type.items()))
        kinds = list(answered[0].said)
        metrics = {}
        for kind in kinds:
            metrics |= named(kind, _figures(scored, kind), OWN)
        if 1 < len(by_type) <= _MOST_TYPES:
            for name, some in by_type.items():
                found = _figures(some, OWN).items()
                metrics |= {f"{metric}/{name}": v for metric, v in found}
        metrics["num_questions"] = len(scored)
        skipped = dict(self._answering.skipped)
        details = {
            "prompt": self._answering.template(predictor),
            "answers": self._answering.choices(),
            "types": {
                name: {
                    "num_questions": len(some),
                    **{kind: _figures(some, kind) for kind in kinds},
                }
                for name, some in by_type.items()
            },
            "skipped": skipped,
        }
        lines = [
            *_summary(by_type, scored, kinds),
            "",
            *_examples(answered),
            *skipped_lines(skipped),
        ]
        wrong = [
            one.sheet_row()
            for one, score in zip(answered, scored)
            if not score.exact_match[OWN]
        ][: self._sheet_images]
        sheets = {"wrong": ("Wrong answers", wrong)} if wrong else {}
        rows = [one.row() for one in scored]
        items = {"exact_match": [float(one.exact_match[OWN]) for one in scored]}
        return Report(metrics, lines, details, rows, sheets, items)


class _Scored:
    """A question with the scores of each answer to it."""

    def __init__(self, one):
        self._one = one
        self.type = one.type or answer_type(one.answers)
        people = [normalize(answer) for answer in one.answers]
        # With a person left out, enough must remain to agree.
        self.has_accuracy = len(people) > PEOPLE
        self.exact_match, self.vqa_accuracy = {}, {}
        for kind, said in one.said.items():
            self.exact_match[kind] = float(normalize(said) in people)
            if self.has_accuracy:
                accuracy = vqa_accuracy(said, one.answers)
                self.vqa_accuracy[kind] = accuracy

    def row(self):
        """The line of the table of results."""
        one = self._one
        found = {
            "key": one.key,
            "prompt": one.prompt,
            "type": self.type,
            "answers": one.answers,
            "answer": one.said[OWN],
            "exact_match": self.exact_match[OWN],
        }
        if self.has_accuracy:
            found["vqa_accuracy"] = self.vqa_accuracy[OWN]
        others = {k: said for k, said in one.said.items() if k != OWN}
        return {**found, **others}


def _figures(scored, kind):
    """The metrics of some questions, answered with images of one kind."""
    found = {
        "exact_match": float(np.mean([s.exact_match[kind] for s in scored]))
    }
    judged = [s.vqa_accuracy[kind] for s in scored if s.has_accuracy]
    if judged:
        found["vqa_accuracy"] = float(np.mean(judged))
    return found


def _summary(by_type, scored, kinds):
    """A table of the metrics by type and by kind of image."""
    lines = []
    for metric in _figures(scored, OWN):
        head = (f"{metric} by type", "questions", *kinds)
        rows = [
            (
                name,
                len(some),
                *(_figures(some, kind).get(metric) for kind in kinds),
            )
            for name, some in (*by_type.items(), ("all", scored))
        ]
        lines += [*([""] if lines else []), *table(head, rows)]
    return lines


def _examples(answered):
    """The first questions with their answers."""
    rows = [
        (
            one.prompt,
            ", ".join(dict.fromkeys(one.answers)),
            *one.said.values(),
        )
        for one in answered[:_MOST_LINES]
    ]
    return table(("prompt", "people", *answered[0].said), rows)
