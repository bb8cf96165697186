"""The end of a run: captions, figures, a picture sheet, the model as a file."""

import os

import tqdm

from cappa_tf.evaluation.captioning import CaptionDecoder
from cappa_tf.evaluation.sheet import write_sheet
from cappa_tf.training.workdir import save_captioner, write_json


def finish(model, data, settings, step):
    """Evaluates the trained captioner and writes what it is judged by.

    Args:
        model: The captioner, with the weights to keep.
        data: Data set whose pictures are captioned, or None to only export.
        settings: `RunSettings`.
        step: Number of finished steps.

    Returns:
        What `results.json` holds: `step` and the figures.
    """
    save_captioner(settings.workdir, model)
    figures = {"step": step}
    if data is not None:
        figures.update(_evaluate(model, data, settings))
    write_json(os.path.join(settings.workdir, "results.json"), figures)
    return figures


def _evaluate(model, data, settings):
    """Captions all pictures of a split; draws the first ones on a sheet."""
    decoder = CaptionDecoder(model, data.tokenizer, settings.evaluation_batch)
    with tqdm.tqdm(total=data.num_examples, unit="picture", leave=False) as bar:
        result = decoder.evaluate(
            data,
            corpus_scores=settings.caption_metrics,
            keep_images=settings.sheet_images,
            progress=lambda done: bar.update(done - bar.n),
        )
    if settings.sheet_images:
        write_sheet(
            os.path.join(settings.workdir, "sheet.png"),
            result.rows[: settings.sheet_images],
            title=f"{settings.workdir}, {data.path} {data.split}",
            # Hardly any caption of a photo is word for word a reference.
            marks=result.metrics["exact_match"] > 0.05,
        )
    return result.metrics
