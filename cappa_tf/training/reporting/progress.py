"""Progress of a run in the terminal, and its log file."""

import os
import sys
import time

import tqdm

from cappa_tf.utils import files

# Short names that keep a line within the terminal's width; tasks add their own.
_SHORT = {
    "gradient_norm": "grad",
    "weight_norm": "weights",
    "learning_rate": "lr",
    "images_per_second": "img/s",
    "tokens_per_second": "tok/s",
    "data_wait_share": "wait",
    "gflops_per_second": "GFLOP/s",
    "peak_share": "of peak",
}


class Progress:
    """A progress bar with the time left, and one line per log interval.

    Lines are printed above the bar and appended to `train.log` in the run's
    folder, there with date and time.

    Args:
        folder: The run's folder; None writes no file.
        total_steps: Length of the run.
        initial_step: Step at which the bar starts.
        shown: False prints nothing (on all hosts but the chief).
        short_names: Dict of metric names to those shown, `Task.short_names`.
    """

    def __init__(
        self, folder, total_steps, initial_step=0, shown=True, short_names=None
    ):
        path = folder and os.path.join(folder, "train.log")
        self._file = path and files.LineFile(path)
        self._shown = shown
        self._short_names = {**_SHORT, **(short_names or {})}
        self._bar = tqdm.tqdm(
            total=total_steps,
            initial=initial_step,
            unit="step",
            dynamic_ncols=True,
            disable=not shown,
            # At most one redraw per second keeps logs of batch jobs readable.
            mininterval=1.0,
        )

    def advance(self, steps):
        """Moves the bar by a number of steps."""
        self._bar.update(steps)

    def line(self, text):
        """Prints a line and appends it to the log file."""
        if self._file:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            self._file.append(f"{stamp} {text}")
        if self._shown:
            tqdm.tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def figures(self, step, figures):
        """Writes a line of metrics, such as `step 50  loss 3.21  ...`."""
        names = {name: self._short_names.get(name, name) for name in figures}
        parts = [
            f"{names[name]} {_short(value)}"
            for name, value in figures.items()
            if names[name] is not None
        ]
        self.line("  ".join([f"step {step}", *parts]))

    def close(self):
        """Closes the bar and the file."""
        self._bar.close()
        if self._file:
            self._file.close()


def _short(value):
    if float(value).is_integer():
        return f"{int(value)}"
    magnitude = abs(value)
    if magnitude >= 100:
        return f"{value:.0f}"
    return f"{value:.4g}" if magnitude >= 1e-3 else f"{value:.2e}"
