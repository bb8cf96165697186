"""Turns the sums of training loops into the figures people read."""

import math
import time

OBJECTIVES = ("autoregressive", "parallel")


class Interval:
    """What happened since the last log line.

    Rates count the time inside training loops only: evaluation, checkpoints
    and the compilation of the first step do not make a run look slower.
    """

    def __init__(self, batch_size):
        self._batch_size = batch_size
        self._start()

    def _start(self):
        self._sums = {}
        self._steps = self._timed_steps = 0
        self._seconds = self._waited = self._timed_tokens = 0.0

    def add(self, sums, steps, seconds, waited, timed=True):
        """Adds one loop.

        Args:
            sums: Sums by metric name, of all examples of the loop.
            steps: Steps of the loop.
            seconds: Wall time of the loop.
            waited: Seconds of it spent waiting for data, or None.
            timed: False where the time includes compilation.
        """
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._steps += steps
        if timed:
            self._timed_steps += steps
            self._seconds += seconds
            self._waited = None if waited is None else self._waited + waited
            self._timed_tokens += _tokens(sums)

    def result(self):
        """The figures of the interval, which then starts anew.

        Returns:
            Dict: "loss"; per objective "<objective>/loss" (mean over
            examples) and "<objective>/nll_per_token" (over real tokens), left
            out where an objective drew no example; "gradient_norm" (mean over
            steps); "images_per_second", "tokens_per_second" and
            "data_wait_share" once a loop was timed.
        """
        sums, steps = self._sums, max(self._steps, 1)
        loss = sum(sums.get(f"{name}/loss", 0.0) for name in OBJECTIVES)
        figures = {"loss": loss / (steps * self._batch_size)}
        for name in OBJECTIVES:
            if sums.get(f"{name}/examples"):
                figures[f"{name}/loss"] = (
                    sums[f"{name}/loss"] / sums[f"{name}/examples"]
                )
            if sums.get(f"{name}/tokens"):
                figures[f"{name}/nll_per_token"] = (
                    sums[f"{name}/nll"] / sums[f"{name}/tokens"]
                )
        figures["gradient_norm"] = sums.get("gradient_norm", 0.0) / steps
        if self._seconds > 0:
            images = self._timed_steps * self._batch_size
            figures["images_per_second"] = images / self._seconds
            figures["tokens_per_second"] = self._timed_tokens / self._seconds
            if self._waited is not None:
                figures["data_wait_share"] = self._waited / self._seconds
        self._start()
        return figures


class Stopwatch:
    """`with Stopwatch() as watch: ...; watch.seconds`."""

    def __enter__(self):
        self._began = time.perf_counter()
        return self

    def __exit__(self, *exception):
        self.seconds = time.perf_counter() - self._began


def all_finite(sums, *more):
    """Whether no sum is NaN or infinite."""
    return all(math.isfinite(value) for value in (*sums.values(), *more))


def _tokens(sums):
    return sum(sums.get(f"{name}/tokens", 0.0) for name in OBJECTIVES)
