"""Results of a study's cells, joined into rows."""

import csv
import dataclasses
import io
import json
import os

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
    """

    cell: object
    folder: str
    state: str = "missing"
    message: str | None = None
    seconds: dict = dataclasses.field(default_factory=dict)
    metrics: dict = dataclasses.field(default_factory=dict)
    items: dict = dataclasses.field(default_factory=dict)
    curves: dict = dataclasses.field(default_factory=dict)


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
    row.curves = read_curves(os.path.join(folder, "run", "tensorboard"))
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
    """Scalars of a run's TensorBoard folder: dict name -> [(step, number)]."""
    if not files.exists(folder):
        return {}
    from tensorboard.backend.event_processing import event_accumulator as events
    from tensorboard.util import tensor_util

    found = events.EventAccumulator(folder, {"tensors": 0, "images": 1})
    found.Reload()
    curves = {}
    for name in found.Tags()["tensors"]:
        plugin = found.SummaryMetadata(name).plugin_data.plugin_name
        if plugin != "scalars":
            continue
        # A run that was resumed may have written a step twice: the last wins.
        points = {
            event.step: float(tensor_util.make_ndarray(event.tensor_proto))
            for event in found.Tensors(name)
        }
        curves[name] = sorted(points.items())
    return curves


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
