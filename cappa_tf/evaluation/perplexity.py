"""Perplexity of people's captions, with the image and without.

`nll` is a negative log-likelihood in nats, and `perplexity` the exponential of
its mean per token.
"""

import math
import os

from cappa_tf.evaluation import captioning
from cappa_tf.evaluation.evaluator import (
    Evaluator,
    Report,
    named,
    skipped_lines,
    table,
)
from cappa_tf.evaluation.images import EvaluationImages
from cappa_tf.inference.predictor import AUTOREGRESSIVE, BLIND


class Perplexity(Evaluator):
    """Perplexity of all captions of one split, left to right.

    Args:
        path: Path of the data, as in `EvaluationImages`.
        split: Name of the split.
        limit: Maximum number of images to use, or None for all.
        blind: Whether to also score the captions without images, if the model
            supports it. This shows how much of the likelihood is due to
            language alone.
        prompt: Template of what the captions answer, such as "caption:", for a
            model that was trained with prompts; as in `CaptionDataset`.
        name: Name of the evaluator in the results.
    """

    needs = (AUTOREGRESSIVE,)

    def __init__(
        self,
        path: str | os.PathLike,
        split="test",
        *,
        limit: int | None = None,
        blind=False,
        prompt: str | None = None,
        name="perplexity",
    ):
        super().__init__(name)
        self._data = EvaluationImages(path, split, limit, prompt)
        self._blind = blind

    def open(self):
        """Checks that the data can be found."""
        self._data.open()

    def evaluate(self, predictor):
        """Scores all captions, including eos.

        Returns:
            A `Report` with the metrics `nll_per_token`, `perplexity` (its
            exponential) and `nll_per_caption`, and with `blind` the same with
            the prefix `blind/`. Rows have each image's captions and nll.
        """
        self.check(predictor)
        modes = [AUTOREGRESSIVE]
        if self._blind and predictor.can(BLIND):
            modes.append(BLIND)
        totals = dict.fromkeys(modes, 0.0)
        tokens, rows = 0, []
        for images, examples in self._data.captioned(predictor):
            texts = [example.captions for example in examples]
            prompts = captioning.prompts_of(examples)
            row_nll = {}
            for mode in modes:
                row_nll[mode] = predictor.score_captions(
                    images, texts, mode, prompts
                )
                totals[mode] -= sum(float(s.sum()) for s in row_nll[mode])
            for i, example in enumerate(examples):
                counts = predictor.count_tokens(example.captions)
                tokens += int(counts.sum())
                nll = {m: (-row_nll[m][i]).tolist() for m in modes}
                rows.append(
                    {
                        "key": example.key,
                        "captions": example.captions,
                        "tokens": counts.tolist(),
                        "nll": nll,
                    }
                )
        captions = sum(len(row["captions"]) for row in rows)
        return self._report(totals, tokens, captions, rows)

    def _report(self, totals, tokens, captions, rows):
        metrics, lines = {}, []
        for mode, nll in totals.items():
            found = {
                "nll_per_token": nll / tokens,
                "perplexity": math.exp(nll / tokens),
                "nll_per_caption": nll / captions,
            }
            metrics |= named(mode, found, AUTOREGRESSIVE)
            image = "with image" if mode == AUTOREGRESSIVE else "without"
            lines.append((image, *found.values()))
        skipped = dict(self._data.skipped)
        details = {
            "num_images": len(rows),
            "num_captions": captions,
            "num_tokens": tokens,
            "skipped": skipped,
        }
        table_lines = [
            f"{len(rows)} images, {captions} captions, {tokens} tokens",
            *table(("", *found), lines),
            *skipped_lines(skipped),
        ]
        return Report(metrics, table_lines, details, rows)
