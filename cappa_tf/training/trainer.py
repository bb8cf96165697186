"""The training loop of one run, and the work between its steps."""

import collections
import contextlib
import dataclasses
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import keras
import tensorflow as tf

from cappa_tf.models.task import Task
from cappa_tf.saving.checkpoints import Checkpoints
from cappa_tf.saving.run_folder import describe_run
from cappa_tf.training import results
from cappa_tf.training.cached_features import replace_images
from cappa_tf.training.construct import parameter_counts
from cappa_tf.training.distribution.hosts import Hosts
from cappa_tf.training.distribution.interruption import Interruption
from cappa_tf.training.distribution.strategies import (
    may_vary,
    training_iterator,
    use_xla,
)
from cappa_tf.training.evaluators import Evaluators
from cappa_tf.training.optimizers.averaging import averaged_weights
from cappa_tf.training.reporting.image_use import ImageUse
from cappa_tf.training.reporting.metrics import Interval, Stopwatch
from cappa_tf.training.reporting.profile import Profile
from cappa_tf.training.reporting.progress import Progress
from cappa_tf.training.reporting.samples import Samples
from cappa_tf.training.reporting.summaries import Summaries
from cappa_tf.training.reporting.utilization import Utilization
from cappa_tf.training.settings import (
    ComputeSettings,
    EvaluationSettings,
    FeatureSettings,
    RunSettings,
)
from cappa_tf.training.step import TrainLoop
from cappa_tf.training.validation import Validation
from cappa_tf.utils import files


@contextlib.contextmanager
def plain_data_errors(*datasets):
    """Raises a data set's own error if reading from it made a step fail.

    TensorFlow wraps an error raised inside an input pipeline in one of its
    own, with the text buried in a trace; the data set keeps the original.
    """
    try:
        yield
    except tf.errors.OpError as error:
        for data in datasets:
            failure = getattr(data, "failure", None)
            if failure is not None:
                raise failure from error
        raise


class Data(NamedTuple):
    """The opened data sets of a run; all but the first may be None."""

    train: object
    eval: object
    test: object

    @property
    def for_inference(self):
        """The one whose preprocessing the trained model needs: evaluation's.

        That of training may differ, as in random crops of the whole image.
        """
        return self.train if self.eval is None else self.eval


@dataclasses.dataclass(kw_only=True)
class Trainer:
    """Trains a built task on opened data, resuming from its folder.

    Use it as `with Trainer(...) as trainer: trainer.finish(trainer.run())`. All
    I/O happens inside the block, none in the constructor.

    Args:
        model: Built `Task`.
        optimizer: Built optimizer; its `iterations` is the step.
        data: `Data`.
        workdir: The run's folder.
        settings: `RunSettings`.
        evaluation: `EvaluationSettings`.
        compute: `ComputeSettings`.
        features: `FeatureSettings`.
        strategy: The strategy the model was built under.
        hosts: The `Hosts` of that strategy. Only the chief writes.
        evaluators: List of evaluators, as passed to `train.train`.
        check_claim: Called between loops; raises an error once another run
            has taken over the folder.
        origin: Log line about the source of the initial weights, or None.
        examples: Training examples seen by the run that this one continues.
        log_folder: Folder of log and TensorBoard; `workdir` by default.
        profile: (first, last) of the steps to profile, or None.
    """

    model: Task
    optimizer: keras.optimizers.Optimizer
    data: Data
    workdir: str
    settings: RunSettings
    evaluation: EvaluationSettings
    compute: ComputeSettings
    strategy: tf.distribute.Strategy
    hosts: Hosts
    features: FeatureSettings = FeatureSettings()
    evaluators: list | tuple = ()
    check_claim: Callable = lambda: None
    origin: str | None = None
    examples: int = 0
    log_folder: str | None = None
    profile: tuple | None = None

    @property
    def step(self):
        """Number of finished optimizer steps."""
        return int(self.optimizer.iterations.numpy())

    def __enter__(self):
        """Resumes if there is a checkpoint; opens what the loop needs."""
        self._resume()
        self._with_images = self.data
        # Only now does a frozen encoder have its weights.
        data, self._cache_lines = replace_images(
            self.features,
            self.data._asdict(),
            self.model,
            self.workdir,
            self.hosts,
        )
        self.data = Data(**data)
        self._prepared = None
        if not self._resumed and not self.examples:
            self._prepared = self.model.prepare(self.data.train)
        if self.hosts.is_chief:
            describe_run(self.workdir, self.model, self.data.for_inference)
        batch_size = self.evaluation.batch_size(self.settings)
        self._evaluators = Evaluators(
            self.evaluators,
            self.model,
            self.data.for_inference,
            batch_size,
            self.hosts,
        )
        self._evaluators.open()
        self._validation = self._samples = self._image_use = None
        if self.data.eval is not None:
            self._validation = Validation(
                self.strategy,
                self.hosts,
                self.model,
                self.data.eval,
                batch_size,
            )
            if self.model.can_generate and self.evaluation.sample_images:
                self._samples = Samples(
                    self.workdir,
                    self.model,
                    self._with_images.eval,
                    self.evaluation.sample_images,
                    self.hosts,
                )
                self._samples.open()
            if self.model.predicts_texts and self.evaluation.image_use_images:
                self._image_use = ImageUse(
                    self.model,
                    self.data.eval,
                    self.evaluation.image_use_images,
                    self.hosts,
                    self.evaluation.image_use_bound,
                )
                self._image_use.open()
        chief = self.hosts.is_chief
        folder = None
        if chief:
            folder = self.log_folder or self.workdir
            files.makedirs(folder)
        self._progress = Progress(
            folder,
            self.settings.total_steps,
            self.step,
            shown=chief,
            short_names=self.model.short_names,
        )
        self._summaries = Summaries(folder)
        self._profile = Profile(
            self.log_folder or self.workdir, self.profile if chief else None
        )
        self._utilization = Utilization(
            self.model,
            getattr(self.data.train, "captions_per_image", 1),
            self.strategy.num_replicas_in_sync,
            self.model.dtype_policy.name,
            self.compute.peak_flops if chief else None,
        )
        return self

    def __exit__(self, *exception):
        self._profile.close()
        self._progress.close()
        self._summaries.close()

    def _resume(self):
        self._checkpoints = Checkpoints(
            self.workdir,
            self.model,
            self.optimizer,
            self.settings.keep_checkpoints,
            writes=self.hosts.is_chief,
        )
        self._resumed = self._checkpoints.restore()
        self.hosts.check_same("the same checkpoint", self._checkpoints.latest)
        state = self._checkpoints.state.values
        # Counted in examples, as the batch size may change between two starts.
        self._examples = state.get("examples", self.examples)
        # "best_nll" in checkpoints of version 0.1.0.
        self._best = state.get("best", state.get("best_nll"))

    def _announce(self):
        counts = parameter_counts(self.model)
        parts = ", ".join(
            f"{name.replace('_', ' ')} {count:,} "
            f"{self.model.how_trained(name)}".rstrip()
            for name, count in counts.items()
            if name != "total"
        )
        self._progress.line(
            f"{counts['total']:,} parameters ({parts}) on "
            f"{self.strategy.num_replicas_in_sync} device(s) of "
            f"{self.hosts.count} host(s)"
        )
        if self._resumed:
            self._progress.line(
                f"resuming from {self._checkpoints.latest}, example "
                f"{self._examples}"
            )
        else:
            for line in filter(None, (self.origin, self._prepared)):
                self._progress.line(line)
        for line in self._cache_lines:
            self._progress.line(line)

    # The loop.

    def run(self, on_first_step=None):
        """Trains until the last step or until interrupted.

        Args:
            on_first_step: Called with folder and step after the first step.

        Returns:
            Name of the signal that this host received, or None.
        """
        self._announce()
        if self.step >= self.settings.total_steps:
            return None
        with Interruption() as interruption:
            iterator = self._open_iterator()
            loop = self._make_loop(interruption.stop)
            interval = Interval(self.settings.batch_size)
            first, stopped = True, self._stops_alone(interruption)
            while self.step < self.settings.total_steps and not stopped:
                # The first call traces and compiles, so it is one untimed step.
                steps = 1 if first else self._steps_to_next_event()
                self._profile.before(self.step)
                with Stopwatch() as watch:
                    sums, done, waited, weight_norm, stopped = loop(
                        iterator, steps
                    )
                self._count(sums, done, weight_norm)
                interval.add(sums, done, watch.seconds, waited, not first)
                line = self._profile.after(self.step)
                if line is not None:
                    self._progress.line(line)
                if first and on_first_step is not None and self.hosts.is_chief:
                    on_first_step(self.workdir, self.step)
                first = False
                self._between_loops(interval)
                stopped = stopped or self._stops_alone(interruption)
            self._save()
        return interruption.signal

    def _make_loop(self, stop):
        settings, compute = self.settings, self.compute
        return TrainLoop(
            self.strategy,
            self.model,
            self.optimizer,
            settings.batch_size,
            settings.accumulation_steps,
            use_xla(compute.jit_compile),
            stop,
            measure_wait=not compute.deterministic,
            num_hosts=self.hosts.count,
        )

    def _stops_alone(self, interruption):
        """Whether a single host was interrupted.

        Several hosts must agree to stop, which they do in every step.
        """
        return self.hosts.count == 1 and interruption.signal is not None

    def _open_iterator(self):
        seed, start = self.settings.seed, self._examples
        options = {}
        if getattr(self.data.train, "mixes", False):
            options["step_size"] = self.settings.batch_size
        if getattr(self.data.train, "length_buckets", None) == "auto":
            options["fixed_length"] = not (
                self.model.texts_may_be_cut and may_vary(self.strategy)
            )
        return training_iterator(
            self.strategy,
            lambda size, host, num_hosts: self.data.train.train(
                size,
                start_index=start,
                seed=seed,
                host=host,
                num_hosts=num_hosts,
                **options,
            ),
            self.settings.batch_size,
        )

    def _steps_to_next_event(self):
        """Steps until the next log line, checkpoint or evaluation is due."""
        s, step = self.settings, self.step
        periods = [
            s.log_steps,
            s.checkpoint_steps,
            self.evaluation.eval_steps,
            self.evaluation.evaluator_steps,
        ]
        ahead = [period - step % period for period in periods if period]
        ahead += self._profile.ahead(step)
        return min(s.steps_per_loop, s.total_steps - step, *ahead)

    def _count(self, sums, done, weight_norm):
        """Counts finished steps, whose loss and weights must be finite."""
        if not (sums.all_finite() and math.isfinite(weight_norm)):
            raise FloatingPointError(
                f"Loss, gradients or weights are not finite between steps "
                f"{self.step - done} and {self.step}. The last good checkpoint "
                f"is {self._checkpoints.latest}; lower the learning rate or "
                "clip more, and start again from it."
            )
        self._weight_norm = weight_norm
        self._examples += done * self.settings.batch_size
        self._progress.advance(done)

    def _between_loops(self, interval):
        self.check_claim()
        settings, evaluation = self.settings, self.evaluation
        step = self.step
        last = step == settings.total_steps
        if step % settings.log_steps == 0 or last:
            self._log(interval.result())
        if evaluation.eval_steps and step % evaluation.eval_steps == 0 or last:
            self._validate()
        # At the end `finish` runs them with the final weights.
        every = evaluation.evaluator_steps
        if every and step % every == 0 and not last:
            with averaged_weights(self.model, self.optimizer):
                self._evaluate()
        if step % settings.checkpoint_steps == 0:
            self._save()

    def _save(self):
        self._checkpoints.save(
            self.step, examples=self._examples, best=self._best
        )

    # Metrics.

    def _log(self, figures):
        figures["weight_norm"] = self._weight_norm
        figures["learning_rate"] = float(self.optimizer.learning_rate)
        figures |= self._utilization.figures(figures)
        skipped = collections.Counter()
        for part in self.hosts.gather(dict(self.data.train.skipped)):
            skipped.update(part)
        self._summaries.scalars(self.step, figures, "train/")
        self._summaries.scalars(self.step, skipped, "data/skipped/")
        if any(skipped.values()):
            figures["skipped"] = sum(skipped.values())
        self._progress.figures(self.step, figures)

    def _validate(self):
        if self._validation is None:
            return
        with averaged_weights(self.model, self.optimizer):
            figures = self._validation()
            captions = []
            if self._samples is not None:
                captions = self._samples.write(self.step, self._summaries)
            use = {}
            if self._image_use is not None:
                use = self._image_use(captions)
            value = figures[self.model.selection_metric]
            if self.model.better(value, self._best):
                self._best = value
                self._checkpoints.save_best(self.step, best=value)
        self._summaries.scalars(self.step, figures, "validation/")
        named = {f"validation/{name}": v for name, v in figures.items()}
        self._progress.figures(self.step, named)
        if use:
            self._report_image_use(use)

    def _report_image_use(self, figures):
        """Logs what the images are worth; warns if that is too little."""
        self._summaries.scalars(self.step, figures, "image_use/")
        named = {f"image_use/{name}": v for name, v in figures.items()}
        self._progress.figures(self.step, named)
        warning = self._image_use.warning(
            figures, self.step / self.settings.total_steps
        )
        if warning is not None:
            self._progress.line(warning)

    def _evaluate(self):
        """Runs the evaluators; returns their metrics by name."""
        figures = self._evaluators()
        if figures:
            self._summaries.scalars(self.step, figures)
            self._progress.figures(self.step, figures)
        return figures

    # The end.

    def finish(self, signal):
        """Ends the run: evaluation and export, unless it was interrupted.

        Args:
            signal: What `run` has returned on this host.

        Returns:
            Dict of the final metrics, as `train.train` returns it.
        """
        figures = {"step": self.step, "interrupted": self.hosts.first(signal)}
        if figures["interrupted"]:
            self._progress.line(
                f"{figures['interrupted']} at step {self.step}: saved; the "
                "same command resumes from here"
            )
        else:
            figures |= self._evaluate_and_export()
        # No host may exit while the chief could still be writing.
        self.hosts.wait()
        return figures

    def _evaluate_and_export(self):
        """Runs the final evaluation and export with the chosen weights."""
        evaluation = self.evaluation
        with averaged_weights(self.model, self.optimizer):
            if evaluation.final_weights == "best":
                self.hosts.wait()  # until the chief has written them
                self._checkpoints.restore_best()
            figures = results.finish(
                self.model,
                self.data.test if evaluation.final_evaluation else None,
                self.workdir,
                self.step,
                evaluation,
                evaluation.batch_size(self.settings),
                self.strategy,
                self.hosts,
                self._evaluate,
                self._with_images.test,
            )
        for name, value in figures.items():
            self._progress.line(f"{name} {value}")
        path = os.path.join(self.workdir, "results.json")
        self._progress.line(f"results in {path}")
        return figures
