"""The entry point of training: from settings to a trained, evaluated model.

`train` takes these steps in order, each from a module of its own:

    arguments checked           settings.py
    devices, hosts              strategies.py, hosts.py
    model and optimizer built   construct.py
    initial weights read        initialize.py, unless the run resumes
    folder made and claimed     run_lock.py
    data prepared               the function `prepare`, if given
    data checked against model  `Task.check_data`
    run resumed                 trainer.py, checkpoints.py
    features of images cached   cached_features.py, if wanted
    steps, metrics, evaluation  trainer.py, step.py, metrics.py, validation.py
    results, sheet, model file  results.py

It knows nothing of gin: `cappa_tf.config` calls it with what the files bind.
"""

import contextlib

import tensorflow as tf

from cappa_tf.evaluation.caption_metrics import check_installed
from cappa_tf.evaluation.evaluator import check_evaluators
from cappa_tf.saving.run_lock import RunLock, WorkdirInUseError
from cappa_tf.training import cached_features, memory_estimate
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
from cappa_tf.training.initialize import check_vocabulary, first_weights
from cappa_tf.training.settings import (
    ComputeSettings,
    EvaluationSettings,
    FeatureSettings,
    RunSettings,
    WeightSettings,
)
from cappa_tf.training.trainer import Data, Trainer, plain_data_errors
from cappa_tf.utils import arguments

# The defaults; frozen, so that runs may share them.
_EVALUATION, _COMPUTE = EvaluationSettings(), ComputeSettings()
_WEIGHT, _FEATURES = WeightSettings(), FeatureSettings()


def train(
    model,
    optimizer,
    train_data,
    workdir: str,
    settings: RunSettings,
    *,
    evaluation: EvaluationSettings = _EVALUATION,
    compute: ComputeSettings = _COMPUTE,
    weights: WeightSettings = _WEIGHT,
    features: FeatureSettings = _FEATURES,
    eval_data=None,
    test_data=None,
    evaluators: list | tuple = (),
    prepare=None,
    dry_run=False,
    profile: tuple | list | None = None,
    on_start=None,
    on_first_step=None,
):
    """Trains a model; called again with the same `workdir`, it resumes.

    Args:
        model: A `Task` such as `Captioner`, or better its constructor (in a
            gin file @Captioner without parentheses): then the seed, the
            precision and the devices are decided before any weight exists.
        optimizer: A Keras optimizer or its constructor; several devices need
            the constructor.
        train_data: Data set to train on, such as `CaptionDataset`, or its
            constructor.
        workdir: Folder of checkpoints, logs and results; made if missing.
        settings: Number of steps, batch size, and how often to log and save.
        evaluation: Which evaluations to run, and how often.
        compute: Devices, precision, compilation and determinism.
        weights: Where the initial weights come from, and which are frozen.
        features: Whether the features of a frozen vision encoder are cached.
        eval_data: Data set for validation, or None.
        test_data: Data set for the final evaluation; `eval_data` by default.
        evaluators: `Evaluator`s to run between steps and at the end; their
            metrics go to TensorBoard, to the log and to results.json.
        prepare: Function without arguments, called before data is opened, on
            the first host only.
        dry_run: Builds everything, prints shapes, parameter counts and a
            memory estimate, and stops without reading any data.
        profile: (first, last) of the steps, counted from 1, of which the first
            host writes a profile for TensorBoard.
        on_start: Called with `workdir` before the first step of this process,
            on the first host only.
        on_first_step: Called with `workdir` and the number of finished steps
            after the first step of this process, on the first host only.

    Returns:
        Dict of the final metrics: `step`, `interrupted` (the signal's name or
        None), and, once the run is complete, the contents of results.json.

    Raises:
        ValueError: If an argument or a file cannot be used (the message names
            it), or another run holds the folder.
        FloatingPointError: If loss or weights stop being finite.
        WorkerLostError: If another process of the run has ended.
    """
    _check_arguments(workdir, evaluators, dry_run)
    _check_profile(profile, settings.total_steps)
    arguments.check_callable(
        prepare=prepare, on_start=on_start, on_first_step=on_first_step
    )
    strategy = _open_devices(settings, evaluation, compute)
    hosts = Hosts(strategy)
    with hosts.explain_loss():
        # What can fail right away comes before any data is read.
        model, optimizer = build_model(
            model,
            optimizer,
            strategy,
            settings.seed,
            compute.precision,
            weights.frozen_parts,
            weights.trained_parts,
        )
        _check_captions(model, evaluation)
        _check_pairs(model, settings, evaluation, hosts)
        cached_features.check(features, model, train_data)
        origin = first_weights(model, weights, workdir)
        if dry_run:
            return _report(
                model, optimizer, strategy, settings, train_data, origin
            )
        with _claimed(workdir, hosts) as check_claim:
            if prepare is not None and hosts.is_chief:
                prepare()
            hosts.wait()
            data = _open_data(model, train_data, eval_data, test_data)
            if origin:
                check_vocabulary(model, weights, data.train)
            trainer = Trainer(
                model=model,
                optimizer=optimizer,
                data=data,
                workdir=workdir,
                settings=settings,
                evaluation=evaluation,
                compute=compute,
                features=features,
                evaluators=evaluators,
                strategy=strategy,
                hosts=hosts,
                check_claim=check_claim,
                origin=origin,
                profile=profile and tuple(profile),
            )
            with plain_data_errors(*data), trainer:
                # Only now is it certain that the folder belongs to this run.
                if on_start is not None and hosts.is_chief:
                    on_start(workdir)
                signal = trainer.run(on_first_step)
                return trainer.finish(signal)


def _check_arguments(workdir, evaluators, dry_run):
    """Checks the arguments that are not part of a settings object."""
    if not isinstance(workdir, str) or not workdir:
        raise ValueError(
            f"`workdir` must be a path. Received: workdir={workdir!r}"
        )
    arguments.check_bool(dry_run=dry_run)
    check_evaluators(evaluators)


def _check_profile(profile, total_steps):
    """Checks that the steps to profile are steps of the run."""
    if profile is None:
        return
    for step in profile:
        arguments.check_integer("profile", step, 1)
    if len(profile) != 2 or not profile[0] <= profile[1] <= total_steps:
        raise ValueError(
            "`profile` must be (first, last) with 1 <= first <= last <= "
            f"total_steps={total_steps}. Received: profile={tuple(profile)}"
        )


def _check_captions(model, evaluation):
    """Checks that caption metrics can be computed at the end of the run."""
    if evaluation.caption_metrics:
        if not model.can_generate:
            raise ValueError(
                "`caption_metrics` needs a model that captions. Received: "
                f"caption_metrics=True, model={type(model).__name__}"
            )
        check_installed()


def _check_pairs(model, settings, evaluation, hosts):
    """Refuses batches in which an example has nothing to be compared with."""
    if not model.needs_whole_batch:
        return
    sizes = {
        "batch_size": settings.batch_size,
        "eval_batch_size": evaluation.batch_size(settings) // hosts.count,
    }
    for name, size in sizes.items():
        if size < 2:
            raise ValueError(
                f"`{name}` must be at least 2 for a {type(model).__name__}, "
                "which compares each example with the others of the batch (in "
                "evaluation, of one host's part of it). Received: "
                f"{name}={size}"
            )


def _open_devices(settings, evaluation, compute):
    """Creates the strategy and checks that it can split the batches."""
    if compute.deterministic:
        tf.config.experimental.enable_op_determinism()
    strategy = make_strategy(compute.strategy, compute.devices)
    replicas = strategy.num_replicas_in_sync
    check_batch_size(
        "batch_size", settings.batch_size, replicas, settings.accumulation_steps
    )
    check_batch_size(
        "eval_batch_size", evaluation.batch_size(settings), replicas
    )
    return strategy


@contextlib.contextmanager
def _claimed(workdir, hosts):
    """Claims the folder for this run; the first host does so for all hosts.

    Yields:
        A function that raises an error once another run has taken over the
        folder.
    """
    with contextlib.ExitStack() as stack:
        check, problem = None, None
        if hosts.is_chief:
            try:
                check = stack.enter_context(RunLock(workdir)).check
            except ValueError as error:
                problem = error
        # The other hosts must not wait for a chief that has given up.
        message = hosts.first(problem and str(problem))
        if problem is not None:
            raise problem
        if message is not None:
            raise WorkdirInUseError(message)
        yield check or (lambda: None)


def _open_data(model, train_data, eval_data, test_data):
    """Opens the three data sets and checks them against the model."""
    opened = {"train_data": train_data, "eval_data": eval_data}
    opened["test_data"] = eval_data if test_data is None else test_data
    for name, data in opened.items():
        if data is not None:
            data = constructed(data, name, "train", "evaluate")
            model.check_data(data, name)
            if name == "train_data":
                model.adopt(data)
            opened[name] = data
    return Data(*opened.values())


def _report(model, optimizer, strategy, settings, train_data, origin):
    """Prints and returns the report of `--dry_run`."""
    if origin:
        print(origin)
    counts = parameter_counts(model)
    for part, count in counts.items():
        how = model.how_trained(part)
        print(f"{part:15} {count:>13,} parameters{how and ', ' + how}")
    captions = getattr(train_data, "captions_per_image", 1)
    if captions == "all":  # The number is unknown until the data is read.
        print("The estimate counts one caption per image.")
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
