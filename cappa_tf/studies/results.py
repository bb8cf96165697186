"""Results of a study's cells, joined into rows."""

import csv
import dataclasses
import io
import json
import os
from typing import NamedTuple

from cappa_tf.studies import cell as cells
from cappa_tf.utils import files

# Entries of results.json that are no figures of the model.
_NOT_METRICS = ("step", "interrupted")


@dataclasses.dataclass
class Row:
    """What is known of one cell.

    Attributes:
        cell: The `Cell`.
        folder: Its folder.
        state: "done", "failed", "interrupted" or "missing".
        message: Why it failed, or None.
        seconds: Dict of the time that training and evaluation took.
        metrics: Dict name -> number.
        items: Dict name -> list of the scores of the test items, whose mean is
            the metric.
        curves: Dict name -> list of (step, number), from TensorBoard.
        seconds_at: Dict step -> wall time of training until its last figure,
            in seconds.
    """

    cell: object
    folder: str
    state: str = "missing"
    message: str | None = None
    seconds: dict = dataclasses.field(default_factory=dict)
    metrics: dict = dataclasses.field(default_factory=dict)
    items: dict = dataclasses.field(default_factory=dict)
    curves: dict = dataclasses.field(default_factory=dict)
    seconds_at: dict = dataclasses.field(default_factory=dict)


def read_row(cell, folder, reached=None):
    """Reads what a cell has written so far.

    Args:
        cell: The `Cell`.
        folder: Its folder.
        reached: Dict from a metric measured during training to a level.

    Returns:
        Its `Row`.
    """
    row = Row(cell, folder)
    status = cells.status(folder)
    if status is not None:
        row.state, row.message = status["state"], status["message"]
        row.seconds = status["seconds"]
    path = os.path.join(folder, "run", "results.json")
    if files.exists(path):
        row.metrics |= _numbers(_read(path))
    evaluation = os.path.join(folder, "evaluation")
    there = files.listdir(evaluation) if files.exists(evaluation) else []
    for name in sorted(there):
        stem, extension = os.path.splitext(name)
        if extension != ".json":
            continue
        found = _read(os.path.join(evaluation, name))
        if stem.endswith(".items"):
            stem = stem.removesuffix(".items")
            row.items |= {f"{stem}/{key}": x for key, x in found.items()}
        else:
            figures = _numbers(found.get("metrics", {}))
            row.metrics |= {f"{stem}/{key}": x for key, x in figures.items()}
    for one in cell.transfer:
        path = os.path.join(folder, "transfer", one.name, "results.json")
        if files.exists(path):
            figures = _numbers(_read(path))
            row.metrics |= {f"{one.name}/{k}": x for k, x in figures.items()}
    row.curves, row.seconds_at = read_curves(
        os.path.join(folder, "run", "tensorboard")
    )
    for name, level in (reached or {}).items():
        points = row.curves.get(f"evaluation/{name}", [])
        steps = [step for step, value in points if value >= level]
        if steps:
            metric = f"images until {name} is {level:g}"
            row.metrics[metric] = float(steps[0] * cell.batch_size)
    return row


def _read(path):
    return json.loads(files.read_text(path))


def _numbers(figures):
    return {
        name: float(value)
        for name, value in figures.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and name not in _NOT_METRICS
    }


def read_curves(folder):
    """Scalars of a run's TensorBoard folder.

    The time is that of all processes and stages of the run from the moment at
    which each of them has built its model, with compilation and evaluation and
    without the pauses between them; to a second for each process.

    Args:
        folder: The folder; it need not exist.

    Returns:
        (curves, seconds): dict name -> [(step, number)], and dict step -> wall
        time until its last figure.
    """
    names = files.listdir(folder) if files.exists(folder) else []
    curves, seconds, before = {}, {}, 0.0
    # One file for each process and stage; their names begin with the time.
    for file in sorted(name for name in names if "tfevents" in name):
        last = 0.0
        for name, event, since in _scalars(os.path.join(folder, file)):
            # A run that was resumed may have written a step twice: the last
            # wins.
            curves.setdefault(name, {})[event.step] = event.value
            last = max(last, since)
            seconds[event.step] = before + last
        before += last
    return {name: sorted(x.items()) for name, x in curves.items()}, seconds


class _Point(NamedTuple):
    """A scalar of TensorBoard."""

    step: int
    value: float


def _scalars(path):
    """Yields (name, `_Point`, seconds since its beginning) of an event file."""
    from tensorboard.backend.event_processing import event_accumulator as events
    from tensorboard.util import tensor_util

    found = events.EventAccumulator(path, {"tensors": 0, "images": 1})
    found.Reload()
    points = []
    for name in found.Tags()["tensors"]:
        plugin = found.SummaryMetadata(name).plugin_data.plugin_name
        if plugin == "scalars":
            points += [(name, event) for event in found.Tensors(name)]
    points.sort(key=lambda point: point[1].wall_time)
    for name, event in points:
        value = float(tensor_util.make_ndarray(event.tensor_proto))
        since = event.wall_time - found.FirstEventTimestamp()
        yield name, _Point(event.step, value), since


def add_times(study, rows):
    """Adds to the metrics how soon rows are as good as the reference's.

    Args:
        study: The `Study`; nothing is added without `until`.
        rows: List of all `Row`s. A row that never is, or of whose seed the
            reference has no results, gets nothing.
    """
    if study.until is None:
        return
    name = study.until.rpartition("/")[2]
    sign = 1.0 if lower_is_better(name) else -1.0
    best = {}
    for row in rows:
        if row.cell.method is study.reference_method:
            values = [sign * x for _, x in row.curves.get(study.until, [])]
            if values:
                level = min(values)
                best[row.cell.contrast, row.cell.seed] = (
                    level,
                    _seconds_until(row, study.until, sign, level),
                )
    for row in rows:
        found = best.get((row.cell.contrast, row.cell.seed))
        if found is None:
            continue
        seconds = _seconds_until(row, study.until, sign, found[0])
        if seconds is not None:
            row.metrics[f"seconds until the reference's {name}"] = seconds
            if found[1]:
                share = seconds / found[1]
                row.metrics[f"share of the reference's time to {name}"] = share


def _seconds_until(row, name, sign, level):
    """Wall time until `sign * metric` is at most `level`, or None.

    It is interpolated between two measurements.
    """
    before = None
    for step, value in row.curves.get(name, []):
        value, seconds = sign * value, row.seconds_at[step]
        if value <= level:
            if before is None or before[0] == value:
                return seconds
            share = (before[0] - level) / (before[0] - value)
            return before[1] + share * (seconds - before[1])
        before = (value, seconds)
    return None


_LOWER = ("loss", "nll", "perplexity", "error", " until ", " time to ")


def lower_is_better(metric):
    """Whether a smaller value of a metric is better, by its name."""
    return any(word in metric for word in _LOWER)


def write_csv(rows, path):
    """Writes a line for each cell, with all metrics."""
    names = sorted({name for row in rows for name in row.metrics})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    fixed = "cell method seed size steps images flops state message".split()
    writer.writerow([*fixed, "train_seconds", *names])
    for row in rows:
        cell = row.cell
        writer.writerow(
            [
                cell.name,
                cell.method.name,
                cell.seed,
                cell.size,
                cell.steps,
                cell.images,
                cell.flops,
                row.state,
                row.message,
                row.seconds.get("train"),
                *(row.metrics.get(name) for name in names),
            ]
        )
    files.write_text(path, text.getvalue())
