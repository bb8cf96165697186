"""Reading of text in images: error rates of characters and words."""

import os
import unicodedata

from cappa_tf.evaluation.answering import BASELINES, OWN, Answering
from cappa_tf.evaluation.evaluator import (
    Evaluator,
    Report,
    named,
    skipped_lines,
    table,
)
from cappa_tf.evaluation.text_distance import (
    edit_distance,
    recognition_scores,
)
from cappa_tf.utils.arguments import check_integer

# Texts to print.
_MOST_LINES = 10


class OCR(Evaluator):
    """Text read from images, compared to the true text.

    `word_accuracy`, `character_error_rate`, `normalized_edit_distance` and
    `exact_match` are those of `text_distance.recognition_scores`. Texts are
    compared after NFKC and with single spaces, as vocabularies keep them, and
    in lower case if the model's vocabulary is. If an image has several texts,
    the nearest one counts. Metrics of a baseline begin with its name:
    "blind/character_error_rate".

    Args:
        path: Path of the data, as in `EvaluationImages`; its captions are the
            true texts.
        split: Name of the split.
        prompt: The prompt, such as "read:"; None for the model's own.
        limit: Maximum number of images to use, or None for all.
        baselines: "blind", texts without any image, and "other_image", texts
            of the image of the record before; both, one or neither.
        sheet_images: Number of images on the sheet of the worst.
        name: Name of the evaluator in the results.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split="test",
        *,
        prompt: str | None = None,
        limit: int | None = None,
        baselines: list | tuple = BASELINES,
        sheet_images=12,
        name="ocr",
    ):
        super().__init__(name)
        check_integer("sheet_images", sheet_images, 0)
        self._sheet_images = sheet_images
        self._answering = Answering(
            path,
            split,
            limit,
            prompt=prompt,
            asks=False,
            choices=None,
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
        """Reads all images.

        Returns:
            A `Report` with the metrics above and `num_texts`; a row for each
            text, and the sheet "worst".
        """
        self.check(predictor)
        answered = self._answering.answer(
            predictor, keep_images=self._sheet_images > 0
        )
        is_lower = predictor.tokenizer.lowercase
        pairs = {
            kind: [_pair(one, kind, is_lower) for one in answered]
            for kind in answered[0].said
        }
        scores = {
            kind: recognition_scores(some) for kind, some in pairs.items()
        }
        metrics = {}
        for kind, found in scores.items():
            metrics |= named(kind, found, OWN)
        metrics["num_texts"] = len(answered)
        skipped = dict(self._answering.skipped)
        details = {
            "prompt": self._answering.template(predictor),
            "lower_case": is_lower,
            "skipped": skipped,
        }
        rows = [
            {
                "key": one.key,
                "prompt": one.prompt,
                "text": true,
                "read": said,
                "edits": edit_distance(said, true),
                **{kind: pairs[kind][i][0] for kind in pairs if kind != OWN},
            }
            for i, (one, (said, true)) in enumerate(zip(answered, pairs[OWN]))
        ]
        shown = [
            (row["text"], *(row.get(kind, row["read"]) for kind in pairs))
            for row in rows[:_MOST_LINES]
        ]
        lines = [
            f"{len(answered)} texts",
            *table(
                ("", *scores[OWN]),
                [(kind, *found.values()) for kind, found in scores.items()],
            ),
            "",
            *table(("text", *pairs), shown),
            *skipped_lines(skipped),
        ]
        order = sorted(range(len(rows)), key=lambda i: -rows[i]["edits"])
        worst = [answered[i].sheet_row() for i in order[: self._sheet_images]]
        sheets = {"worst": ("Texts with most errors", worst)} if worst else {}
        return Report(metrics, lines, details, rows, sheets)


def _pair(one, kind, is_lower):
    """(the text read, the nearest true text) of an `Answered`."""
    said, *texts = (
        _plain(text, is_lower) for text in (one.said[kind], *one.answers)
    )
    return said, min(texts, key=lambda text: edit_distance(said, text))


def _plain(text, is_lower):
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    return text.lower() if is_lower else text
