"""A profile of some steps for TensorBoard."""

import os

import tensorflow as tf


class Profile:
    """Records steps `first` to `last` with TensorFlow's profiler.

    A run that resumes after the first of them records the rest.

    Args:
        folder: The run's folder; the profile goes to `tensorboard` below it.
        steps: (first, last), counted from 1, or None to record nothing.
    """

    def __init__(self, folder, steps):
        self._folder = os.path.join(folder, "tensorboard")
        self._first, self._last = steps or (1, 0)
        self._running = False

    def ahead(self, step):
        """Numbers of steps after which a loop must end, if it starts now.

        Args:
            step: Number of finished steps.
        """
        ends = (self._first - 1, self._last)
        return [end - step for end in ends if end > step]

    def before(self, step):
        """Starts to record if the next step is one of them."""
        if not self._running and self._first <= step + 1 <= self._last:
            tf.profiler.experimental.start(self._folder)
            self._running = True

    def after(self, step):
        """Writes the profile if the last of the steps is finished.

        Returns:
            A log line, or None.
        """
        if self._running and step >= self._last:
            self.close()
            return f"profile of steps up to {step} in {self._folder}"
        return None

    def close(self):
        """Writes what has been recorded so far."""
        if self._running:
            self._running = False
            tf.profiler.experimental.stop()
