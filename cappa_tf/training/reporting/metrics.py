"""Metrics of the log lines, computed from the sums of training loops."""

import dataclasses
import math
import time

import tensorflow as tf


@dataclasses.dataclass
class Sums:
    """Sums of a task's metrics over examples and steps.

    Attributes:
        figures: Dict name -> (total, weight), whose ratio is the metric.
        counts: Dict name -> total.
    """

    figures: dict = dataclasses.field(default_factory=dict)
    counts: dict = dataclasses.field(default_factory=dict)

    @staticmethod
    def packed(losses):
        """Sums over one batch, as a list for a compiled loop.

        Args:
            losses: `task.ExampleLosses`.

        Returns:
            (names, scalars): the names that `unpacked` needs, and a list of
            scalar tensors.
        """
        loss = (losses.loss, tf.ones_like(losses.loss))
        figures = {"loss": loss, **losses.metrics}
        pairs = [value for pair in figures.values() for value in pair]
        values = [*pairs, *losses.counts.values()]
        names = (list(figures), list(losses.counts))
        return names, [tf.reduce_sum(value) for value in values]

    @classmethod
    def unpacked(cls, names, values):
        """Rebuilds the sums from packed values added up over many batches.

        Args:
            names: The names that `packed` returned.
            values: Floats; the last two are total and weight of the gradient
                norm.
        """
        figures, counts = names
        pairs = zip(values[0::2], values[1::2])
        found = cls(dict(zip(figures, pairs)))
        found.counts = dict(zip(counts, values[2 * len(figures) :]))
        found.figures["gradient_norm"] = tuple(values[-2:])
        return found

    def add(self, other):
        """Adds the sums of further steps."""
        for name, (total, weight) in other.figures.items():
            own = self.figures.get(name, (0.0, 0.0))
            self.figures[name] = (own[0] + total, own[1] + weight)
        for name, total in other.counts.items():
            self.counts[name] = self.counts.get(name, 0.0) + total

    def all_finite(self):
        """Whether no sum is NaN or infinite."""
        pairs = (value for pair in self.figures.values() for value in pair)
        return all(map(math.isfinite, (*pairs, *self.counts.values())))


class Interval:
    """Metrics and rates since the last log line.

    Rates count only the time inside training loops, so evaluation, checkpoints
    and the compilation of the first step do not make a run look slower.
    """

    def __init__(self, batch_size):
        self._batch_size = batch_size
        self._start()

    def _start(self):
        self._sums, self._timed = Sums(), Sums()
        self._timed_steps = 0
        self._seconds = self._waited = 0.0

    def add(self, sums, steps, seconds, waited, timed=True):
        """Adds one loop.

        Args:
            sums: `Sums` of all examples of the loop.
            steps: Number of steps of the loop.
            seconds: Wall time of the loop.
            waited: Seconds of it spent waiting for data, or None.
            timed: False if the time includes compilation.
        """
        self._sums.add(sums)
        if timed:
            self._timed.add(sums)
            self._timed_steps += steps
            self._seconds += seconds
            self._waited = None if waited is None else self._waited + waited

    def result(self):
        """Returns the metrics of the interval and starts a new one.

        Returns:
            Dict of each metric the task reports with a nonzero weight, "loss"
            first; "gradient_norm" (mean over steps); and, once a loop was
            timed, "images_per_second", a rate of each count (such as
            "tokens_per_second") and "data_wait_share".
        """
        figures = {
            name: total / weight
            for name, (total, weight) in self._sums.figures.items()
            if weight
        }
        if self._seconds > 0:
            images = self._timed_steps * self._batch_size
            figures["images_per_second"] = images / self._seconds
            for name, total in self._timed.counts.items():
                figures[f"{name}_per_second"] = total / self._seconds
            if self._waited is not None:
                figures["data_wait_share"] = self._waited / self._seconds
        self._start()
        return figures


class Stopwatch:
    """Wall time of a block: `with Stopwatch() as watch`, `watch.seconds`."""

    def __enter__(self):
        self._began = time.perf_counter()
        return self

    def __exit__(self, *exception):
        self.seconds = time.perf_counter() - self._began
