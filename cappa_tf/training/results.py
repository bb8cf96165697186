"""Results of a run: final metrics, captions, their sheet, the model file."""

import os

import tqdm

from cappa_tf.evaluation.captioning import evaluate_captions
from cappa_tf.evaluation.evaluator import json_value
from cappa_tf.evaluation.sheet import write_sheet
from cappa_tf.inference.captions import CaptionDecoder
from cappa_tf.saving.run_folder import save_model
from cappa_tf.training.distribution.strategies import on_replicas
from cappa_tf.training.validation import Validation
from cappa_tf.utils import files


def finish(
    model,
    data,
    workdir,
    step,
    evaluation,
    batch_size,
    strategy,
    hosts,
    evaluate=dict,
    with_images=None,
):
    """Evaluates the trained model and writes the results to the run's folder.

    Args:
        model: The `Task`, with the weights to keep.
        data: Data set of the final evaluation, or None to only export.
        workdir: The run's folder.
        step: Number of finished steps.
        evaluation: `EvaluationSettings`.
        batch_size: Batch size, over all devices of all hosts.
        strategy: The run's strategy.
        hosts: The run's `Hosts`. Each evaluates its part; the chief writes.
        evaluate: Function that returns further metrics, a dict by name.
        with_images: The same data set with images, if `data` has features in
            their place.

    Returns:
        The contents of `results.json`, a dict of `step` and the metrics.
    """
    if hosts.is_chief:
        save_model(workdir, model)
    figures = {"step": step}
    if data is not None and model.can_generate:
        figures |= _caption(
            model,
            with_images or data,
            workdir,
            evaluation,
            batch_size,
            strategy,
            hosts,
        )
    if data is not None and model.selection_metric not in figures:
        figures |= Validation(strategy, hosts, model, data, batch_size)()
    figures |= evaluate()
    if hosts.is_chief:
        path = os.path.join(workdir, "results.json")
        files.write_json(path, json_value(figures))
    return figures


def _caption(model, data, workdir, evaluation, batch_size, strategy, hosts):
    """Captions all images of a split and writes a sheet of the first ones."""
    sampler = evaluation.sampler
    decoder = CaptionDecoder(
        model,
        data.tokenizer,
        batch_size // hosts.count,
        compiled=lambda f: on_replicas(strategy, f, hosts.count),
        **({} if sampler is None else {"sampler": sampler}),
    )
    with tqdm.tqdm(
        total=-(-data.num_examples // hosts.count),
        unit="image",
        leave=False,
        disable=not hosts.is_chief,
    ) as bar:
        result = evaluate_captions(
            decoder,
            data,
            corpus_scores=evaluation.caption_metrics,
            keep_images=evaluation.sheet_images,
            progress=lambda done: bar.update(done - bar.n),
            hosts=hosts,
        )
    if evaluation.sheet_images and hosts.is_chief:
        write_sheet(
            os.path.join(workdir, "sheet.png"),
            result.rows[: evaluation.sheet_images],
            title=f"{workdir}, {data.path} {data.split}",
            # A caption of a photo hardly ever equals a reference exactly.
            marks=result.metrics["exact_match"] > 0.05,
        )
    return result.metrics
