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

    @classmethod
    def of(cls, losses):
        """Sums over one batch, as scalar tensors.

        Args:
            losses: `task.ExampleLosses`.
        """
        loss = (losses.loss, tf.ones_like(losses.loss))
        figures = {"loss": loss, **losses.metrics}
        return cls(
            {
                name: (tf.reduce_sum(total), tf.reduce_sum(weight))
                for name, (total, weight) in figures.items()
            },
            {name: tf.reduce_sum(x) for name, x in losses.counts.items()},
        )

    def of_both(self, other):
        """Sums of the same examples, to whose loss `other` adds a part."""
        (own, weight), (more, _) = self.figures["loss"], other.figures["loss"]
        figures = {
            **self.figures,
            **other.figures,
            "loss": (own + more, weight),
        }
        return Sums(figures, {**self.counts, **other.counts})

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


class SumsLayout:
    """Sums as one vector, for a compiled loop.

    Which sums there are is known only once a step has been traced, and the
    loop around it needs a static shape before that.
    """

    SIZE = 64

    def __init__(self):
        self._names = None

    @classmethod
    def zeros(cls):
        """The vector of no examples, float32 [SIZE]."""
        return tf.zeros([cls.SIZE])

    def packed(self, sums):
        """`Sums` of tensors as float32 [SIZE], and remembers their names."""
        self._names = (list(sums.figures), list(sums.counts))
        pairs = [value for pair in sums.figures.values() for value in pair]
        values = [*pairs, *sums.counts.values()]
        if len(values) > self.SIZE:
            raise ValueError(
                f"A task may report {self.SIZE} sums. Received: {self._names}"
            )
        return tf.pad(tf.stack(values), [[0, self.SIZE - len(values)]])

    def unpacked(self, vector):
        """`Sums` of a vector that is a sum of such vectors.

        Args:
            vector: A tensor, or a list of floats.
        """
        figures, counts = self._names
        values = tf.unstack(vector) if tf.is_tensor(vector) else vector
        pairs = zip(values[0::2], values[1::2])
        return Sums(
            dict(zip(figures, pairs)),
            dict(zip(counts, values[2 * len(figures) :])),
        )


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
