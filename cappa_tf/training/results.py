"""The end of a run: captions, figures, a picture sheet, the model as a file."""

import os

import tqdm

from cappa_tf.evaluation.captioning import evaluate_captions
from cappa_tf.evaluation.evaluator import json_value
from cappa_tf.evaluation.sheet import write_sheet
from cappa_tf.inference.captions import CaptionDecoder
from cappa_tf.saving.run_folder import save_model
from cappa_tf.training.distribution.strategies import on_replicas
from cappa_tf.utils import files


def finish(model, data, settings, step, strategy, hosts, evaluate=dict):
    """Evaluates the trained captioner and writes what it is judged by.

    Args:
        model: The captioner, with the weights to keep.
        data: Data set whose pictures are captioned, or None to only export.
        settings: `RunSettings`.
        step: Number of finished steps.
        strategy: The run's strategy.
        hosts: The run's `Hosts`: each captions its part, the chief writes.
        evaluate: Gives further figures, a dict by name.

    Returns:
        What `results.json` holds: `step` and the figures.
    """
    if hosts.is_chief:
        save_model(settings.workdir, model)
    figures = {"step": step}
    if data is not None:
        figures.update(_evaluate(model, data, settings, strategy, hosts))
    figures.update(evaluate())
    if hosts.is_chief:
        path = os.path.join(settings.workdir, "results.json")
        files.write_json(path, json_value(figures))
    return figures


def _evaluate(model, data, settings, strategy, hosts):
    """Captions all pictures of a split; draws the first ones on a sheet."""
    decoder = CaptionDecoder(
        model,
        data.tokenizer,
        settings.evaluation_batch // hosts.count,
        compiled=lambda f: on_replicas(strategy, f, hosts.count),
    )
    with tqdm.tqdm(
        total=-(-data.num_examples // hosts.count),
        unit="picture",
        leave=False,
        disable=not hosts.is_chief,
    ) as bar:
        result = evaluate_captions(
            decoder,
            data,
            corpus_scores=settings.caption_metrics,
            keep_images=settings.sheet_images,
            progress=lambda done: bar.update(done - bar.n),
            hosts=hosts,
        )
    if settings.sheet_images and hosts.is_chief:
        write_sheet(
            os.path.join(settings.workdir, "sheet.png"),
            result.rows[: settings.sheet_images],
            title=f"{settings.workdir}, {data.path} {data.split}",
            # Hardly any caption of a photo is word for word a reference.
            marks=result.metrics["exact_match"] > 0.05,
        )
    return result.metrics
