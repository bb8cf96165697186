"""Caption evaluator: metrics of a split, of each image, worst and best.

B: batch of images.
"""

import os

from cappa_tf.evaluation import caption_metrics, captioning
from cappa_tf.evaluation.evaluator import (
    Evaluator,
    Report,
    skipped_lines,
    table,
)
from cappa_tf.evaluation.images import EvaluationImages
from cappa_tf.inference.predictor import GENERATE
from cappa_tf.models import sampling
from cappa_tf.utils.arguments import check_choice, check_integer


class Captions(Evaluator):
    """Captions compared to people's: CIDEr, BLEU, ROUGE-L, METEOR.

    Args:
        path: Path of the data, as in `EvaluationImages`.
        split: Name of the split.
        limit: Maximum number of images to use, or None for all.
        meteor: Whether to compute METEOR; None does so if Java is installed.
        sheet_images: Number of images on each of the two sheets, those with
            the lowest and those with the highest CIDEr.
        prompt: Template of what the captions answer, such as "caption:", for a
            model that was trained with prompts; as in `CaptionDataset`.
        sampler: How captions are searched, as for `Captioner.generate`, such
            as `cappa_tf.models.sampling.BeamSearch()`; None for greedy.
        name: Name of the evaluator in the results.
    """

    needs = (GENERATE,)

    def __init__(
        self,
        path: str | os.PathLike,
        split="test",
        *,
        limit: int | None = None,
        meteor: bool | None = None,
        sheet_images=12,
        prompt: str | None = None,
        sampler=None,
        name="caption",
    ):
        super().__init__(name)
        if sampler is not None:
            sampling.search_of(sampler)
        check_choice((None, True, False), meteor=meteor)
        check_integer("sheet_images", sheet_images, 0)
        self._data = EvaluationImages(path, split, limit, prompt)
        self._meteor, self._sheet_images = meteor, sheet_images
        self._sampler, self._decoders = sampler, {}

    def open(self):
        """Checks that the data can be found."""
        caption_metrics.check_installed(bool(self._meteor))
        self._data.open()

    def evaluate(self, predictor):
        """Captions every image.

        Returns:
            A `Report` of the metrics of `caption_metrics.Scores` and
            `captioning.summarize`, with a row per image that has its own
            `cider`, and the sheets "worst" and "best".
        """
        self.check(predictor)
        rows, decoder = [], self._decoder(predictor)
        for images, examples in self._data.captioned(predictor):
            for i, row in captioning.caption_batch(decoder, images, examples):
                row.image = examples[i].image if self._sheet_images else None
                rows.append(row)
        meteor = self._meteor
        if meteor is None:
            meteor = caption_metrics.has_java()
        scores = captioning.score_rows(rows, meteor)
        metrics = scores.corpus | captioning.summarize(rows)
        order = sorted(scores.cider, key=scores.cider.get)
        lines = table(("", "value"), [*metrics.items()])
        if not meteor:
            lines.append("no METEOR, which needs Java")
        skipped = dict(self._data.skipped)
        lines += skipped_lines(skipped)
        return Report(
            metrics,
            lines,
            {"skipped": skipped},
            [_as_json(row, scores.cider[i]) for i, row in enumerate(rows)],
            self._sheets(rows, order),
            {
                "cider": [float(scores.cider[i]) for i in range(len(rows))],
                "exact_match": [float(row.exact_match) for row in rows],
            },
        )

    def _decoder(self, predictor):
        if self._sampler is None:
            return predictor.decoder
        # Evaluated again during training, it is not traced again.
        if predictor not in self._decoders:
            made = predictor.make_decoder(sampler=self._sampler)
            self._decoders = {predictor: made}
        return self._decoders[predictor]

    def _sheets(self, rows, order):
        count = self._sheet_images
        if not count:
            return {}
        worst = [rows[i] for i in order[:count]]
        best = [rows[i] for i in order[::-1][:count]]
        return {
            "worst": ("Captions with the lowest CIDEr", worst),
            "best": ("Captions with the highest CIDEr", best),
        }


def _as_json(row, cider):
    return {
        "key": row.key,
        **({"prompt": row.prompt} if row.prompt else {}),
        "caption": row.caption,
        "cider": cider,
        "log_likelihood": row.log_likelihood,
        "tokens": len(row.pieces),
        "references": row.references,
    }
