"""The root function of a run: arguments to a trained, evaluated captioner.

What `train` does, in this order, each in a module of its own:

    arguments checked           settings.py
    devices, hosts              strategies.py, hosts.py
    model and optimizer built   construct.py
    folder made and claimed     run_folder.py, run_lock.py
    data prepared               the function `prepare`, if given
    data and model compared     construct.py
    run resumed                 checkpoints.py
    steps, figures, evaluation  trainer.py, step.py, metrics.py, validation.py
    results, sheet, model file  results.py

It knows nothing of gin: `cappa_tf.config` calls it with what the files bind.
"""

import contextlib

import tensorflow as tf

from cappa_tf.evaluation.caption_metrics import check_installed
from cappa_tf.evaluation.evaluator import check_evaluators
from cappa_tf.saving.run_lock import RunLock, WorkdirInUseError
from cappa_tf.training import memory_estimate
from cappa_tf.training.construct import (
    build_model,
    constructed,
    parameter_counts,
)
from cappa_tf.training.distribution.hosts import Hosts
from cappa_tf.training.distribution.strategies import (
    check_batch_size,
    make_strategy,
)
from cappa_tf.training.settings import RunSettings
from cappa_tf.training.trainer import Run, plain_data_errors
from cappa_tf.utils import arguments

PRECISIONS = ("float32", "mixed_bfloat16", "bfloat16")


def train(
    model,
    optimizer,
    train_data,
    workdir: str,
    total_steps: int,
    batch_size: int,
    *,
    eval_data=None,
    test_data=None,
    accumulation_steps=1,
    eval_batch_size: int | None = None,
    steps_per_loop=50,
    log_steps=50,
    eval_steps: int | None = None,
    checkpoint_steps=1000,
    keep_checkpoints=3,
    seed=0,
    deterministic=False,
    precision: str | None = None,
    jit_compile: bool | str = "auto",
    strategy="auto",
    devices: list | None = None,
    sample_images=8,
    final_evaluation=True,
    final_weights="last",
    caption_metrics=False,
    evaluators: list | tuple = (),
    evaluator_steps: int | None = None,
    sheet_images=24,
    prepare=None,
    dry_run=False,
    on_start=None,
    on_first_step=None,
):
    """Trains a captioner; run again with the same workdir, it goes on.

    Args:
        model: A `Captioner`, or better its constructor (in a gin file
            @Captioner without parentheses): then `seed`, `precision` and the
            devices are decided before any weight exists.
        optimizer: A Keras optimizer or its constructor; several devices need
            the constructor.
        train_data: `CaptionDataset` to train on, or its constructor.
        workdir: Folder of checkpoints, logs and results; made if missing.
        total_steps: Optimizer steps of the whole run.
        batch_size: Examples a step, over all devices and microbatches.
        eval_data: `CaptionDataset` for validation; None for none.
        test_data: `CaptionDataset` for the final evaluation; `eval_data` by
            default.
        accumulation_steps: Microbatches whose gradients make one step.
        eval_batch_size: Examples at once in evaluation, over all devices; by
            default those of a training microbatch.
        steps_per_loop: Most steps run on the device in one call.
        log_steps: Steps between log lines.
        eval_steps: Steps between validations; None only at the end.
        checkpoint_steps: Steps between checkpoints.
        keep_checkpoints: How many of them to keep.
        seed: Of initial weights and of the data order. (The captioner's own
            `seed` decides its draws.)
        deterministic: Use deterministic kernels only: the same run gives the
            same weights, bit by bit, on the same kind of device.
        precision: Dtype policy: "float32", "mixed_bfloat16", "bfloat16";
            None keeps the policy that is set.
        jit_compile: True, False, or "auto": XLA where there is an accelerator
            that it compiles for.
        strategy: "auto", "one", "mirrored", "multi_worker" or "tpu", see
            `make_strategy`.
        devices: Device names for one or mirrored; None for all.
        sample_images: Evaluation pictures captioned at every validation; 0
            for none.
        final_evaluation: Whether to caption the test split at the end.
        final_weights: "last", or "best" by validation.
        caption_metrics: Whether the final evaluation computes BLEU and CIDEr.
        evaluators: `Evaluator`s to run between steps and at the end; their
            figures go to TensorBoard, to the log and into results.json.
        evaluator_steps: Steps between their runs; None only at the end.
        sheet_images: Pictures on the final sheet.
        prepare: Function without arguments, called before data is opened, on
            the first host only.
        dry_run: Build everything, print shapes, parameters and an estimate of
            memory, read no data, and stop.
        on_start: Called with `workdir` before the first step of this process,
            on the first host only.
        on_first_step: Called with `workdir` and the step after it, likewise.

    Returns:
        Dict of the final figures: `step`, `interrupted` (the signal's name or
        None), and, at the end of a run, what results.json holds.

    Raises:
        ValueError: For what cannot be run, naming argument or file; also
            where another run has the folder.
        FloatingPointError: If loss or weights stop being finite.
        WorkerLostError: If another process of the run has ended.
    """
    settings = RunSettings(
        workdir=workdir,
        total_steps=total_steps,
        batch_size=batch_size,
        accumulation_steps=accumulation_steps,
        eval_batch_size=eval_batch_size,
        steps_per_loop=steps_per_loop,
        log_steps=log_steps,
        eval_steps=eval_steps,
        checkpoint_steps=checkpoint_steps,
        keep_checkpoints=keep_checkpoints,
        seed=seed,
        deterministic=deterministic,
        jit_compile=jit_compile,
        sample_images=sample_images,
        final_evaluation=final_evaluation,
        final_weights=final_weights,
        caption_metrics=caption_metrics,
        evaluator_steps=evaluator_steps,
        sheet_images=sheet_images,
    )
    arguments.check_bool(dry_run=dry_run)
    if settings.caption_metrics:  # Not only at the end of the run.
        check_installed()
    check_evaluators(evaluators)
    arguments.check_choice((None, *PRECISIONS), precision=precision)
    arguments.check_callable(
        prepare=prepare, on_start=on_start, on_first_step=on_first_step
    )
    strategy = _open_devices(settings, strategy, devices)
    hosts = Hosts(strategy)
    with hosts.explain_loss():
        # First what can fail at once: no data is touched for a wrong model.
        model, optimizer = build_model(
            model, optimizer, strategy, seed, precision
        )
        if dry_run:
            return _report(model, optimizer, strategy, settings, train_data)
        with _claimed(workdir, hosts) as check_claim:
            if prepare is not None and hosts.is_chief:
                prepare()
            hosts.wait()
            data = _open_data(model, train_data, eval_data, test_data)
            with plain_data_errors(*data):
                run = Run(
                    settings,
                    strategy,
                    hosts,
                    model,
                    optimizer,
                    *data,
                    evaluators,
                    check_claim,
                )
                # Not before the folder turned out to hold this very run.
                if on_start is not None and hosts.is_chief:
                    on_start(workdir)
                return run(on_first_step)


@contextlib.contextmanager
def _claimed(workdir, hosts):
    """The folder as that of this run alone; the first host claims it for all.

    Yields:
        A function that raises an error once another run has taken it over.
    """
    with contextlib.ExitStack() as stack:
        check, problem = None, None
        if hosts.is_chief:
            try:
                check = stack.enter_context(RunLock(workdir)).check
            except ValueError as error:
                problem = error
        # No host waits for one that has given up.
        message = hosts.first(problem and str(problem))
        if problem is not None:
            raise problem
        if message is not None:
            raise WorkdirInUseError(message)
        yield check or (lambda: None)


def _open_devices(settings, strategy, devices):
    """The strategy, and whether the batches can be shared out under it."""
    if settings.deterministic:
        tf.config.experimental.enable_op_determinism()
    strategy = make_strategy(strategy, devices)
    replicas = strategy.num_replicas_in_sync
    check_batch_size(
        "batch_size", settings.batch_size, replicas, settings.accumulation_steps
    )
    check_batch_size("eval_batch_size", settings.evaluation_batch, replicas)
    return strategy


def _open_data(model, train_data, eval_data, test_data):
    """The three data sets, checked against the model."""
    opened = {"train_data": train_data, "eval_data": eval_data}
    opened["test_data"] = eval_data if test_data is None else test_data
    for name, data in opened.items():
        if data is not None:
            data = constructed(data, name, "tokenizer", "image_size")
            model.check_data(data, name)
            opened[name] = data
    return list(opened.values())


def _report(model, optimizer, strategy, settings, train_data):
    """Prints and returns what `--dry_run` shows."""
    counts = parameter_counts(model)
    for part, count in counts.items():
        print(f"{part:15} {count:>13,} parameters")
    captions = getattr(train_data, "captions_per_image", 1)
    if captions == "all":  # Only the data knows how many: not read here.
        print("The estimate counts one caption an image.")
        captions = 1
    estimate = memory_estimate.estimate(
        model,
        optimizer,
        strategy,
        settings.batch_size,
        settings.accumulation_steps,
        captions,
    )
    print(memory_estimate.table(estimate))
    return {"parameters": counts, "memory": estimate}
