"""What a person sees in the terminal, and what is kept of it in a file."""

import os
import sys
import time

import tqdm

from cappa_tf.utils import files

# Names in the lines, which should fit a terminal; tasks have more of them.
_SHORT = {
    "gradient_norm": "grad",
    "weight_norm": "weights",
    "learning_rate": "lr",
    "images_per_second": "img/s",
    "tokens_per_second": "tok/s",
    "data_wait_share": "wait",
}


class Progress:
    """A progress bar with the time left, and one line per log interval.

    Lines go above the bar and into `train.log` of the run's folder, each
    with date and time in the file.

    Args:
        folder: The run's folder; None writes no file.
        total_steps: Length of the run.
        initial_step: The step it starts at.
        shown: False keeps the terminal quiet (all but the chief).
        short_names: See `Task.short_names`.
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
            # Redrawn at most once a second: logs of batch jobs stay readable.
            mininterval=1.0,
        )

    def advance(self, steps):
        """Moves the bar."""
        self._bar.update(steps)

    def line(self, text):
        """Prints a line and keeps it."""
        if self._file:
            stamp = time.strftime("%Y-%m-%d %H:%M:%S")
            self._file.append(f"{stamp} {text}")
        if self._shown:
            tqdm.tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def figures(self, step, figures):
        """One line of figures, such as `step 50  loss 3.21  ...`."""
        names = {name: self._short_names.get(name, name) for name in figures}
        parts = [
            f"{names[name]} {_short(value)}"
            for name, value in figures.items()
            if names[name] is not None
        ]
        self.line("  ".join([f"step {step}", *parts]))

    def close(self):
        """Ends the bar and the file."""
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
