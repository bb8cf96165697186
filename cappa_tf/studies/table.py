"""The table of a study: methods x metrics, with spread and significance."""

import dataclasses
import itertools

import numpy as np

from cappa_tf.studies import statistics
from cappa_tf.studies.cell import DONE


@dataclasses.dataclass
class Entry:
    """A metric of a method.

    Attributes:
        mean: Mean over seeds.
        deviation: Standard deviation over seeds, None for one seed.
        seeds: Number of seeds.
        difference: `statistics.Difference` from the reference method, or None
            where the evaluator keeps no scores of items.
    """

    mean: float
    deviation: float | None
    seeds: int
    difference: object = None


@dataclasses.dataclass
class Group:
    """The cells of a method of one size and length; one line of the table.

    Attributes:
        name: Name of the line.
        method: `Method`.
        size: Name of the size, or None.
        rows: All its `Row`s.
        entries: Dict metric -> `Entry`, of the rows that are done.
    """

    name: str
    method: object
    size: str | None
    rows: list
    entries: dict = dataclasses.field(default_factory=dict)

    @property
    def done(self):
        """The rows with results."""
        return [row for row in self.rows if row.state == DONE]

    @property
    def images(self):
        """Images seen in training."""
        return self.rows[0].cell.images

    @property
    def flops(self):
        """FLOPs of training, or None."""
        return self.rows[0].cell.flops


def groups(study, rows):
    """Joins the seeds of each method, size and length.

    Args:
        study: The `Study`.
        rows: List of `Row`.

    Returns:
        List of `Group`, in the order of the study.
    """
    found = {}
    for row in rows:
        cell = row.cell
        group = Group(cell.group, cell.method, cell.size, [])
        found.setdefault(cell.group, group).rows.append(row)
    for group in found.values():
        names = {name for row in group.done for name in row.metrics}
        for name in sorted(names):
            values = [r.metrics[name] for r in group.done if name in r.metrics]
            mean, deviation = statistics.spread(values)
            group.entries[name] = Entry(mean, deviation, len(values))
    _compare(study.reference_method, found.values())
    return list(found.values())


def _compare(reference, found):
    """Fills in the differences from the reference of equal size and length."""
    references = {
        group.rows[0].cell.contrast: group
        for group in found
        if group.method is reference
    }
    for group in found:
        other = references.get(group.rows[0].cell.contrast)
        if other is None or other is group:
            continue
        for metric, entry in group.entries.items():
            ours, theirs = (_items(g, metric) for g in (group, other))
            if ours is None or theirs is None:
                continue
            if ours.shape[1] == theirs.shape[1]:
                entry.difference = statistics.paired_bootstrap(ours, theirs)


def _items(group, metric):
    """Scores [seeds, items], or None if an evaluator does not keep them."""
    found = [row.items.get(metric) for row in group.done]
    found = [scores for scores in found if scores]
    if not found or len(set(map(len, found))) > 1:
        return None
    return np.asarray(found, np.float64)


def shown_metrics(study, found):
    """Names of the metrics in the table, those of the study that exist."""
    names = {name for group in found for name in group.entries}
    return [name for name in study.metrics if name in names] or sorted(names)


def summary(study, found):
    """The table as JSON-able dicts, a line for each group."""
    return [
        {
            "name": group.name,
            "method": group.method.name,
            "size": group.size,
            "images": group.images,
            "flops": group.flops,
            "seeds": len(group.done),
            "failed": [
                {"cell": row.cell.name, "message": row.message}
                for row in group.rows
                if row.state == "failed"
            ],
            "metrics": {
                name: {
                    "mean": entry.mean,
                    "deviation": entry.deviation,
                    "seeds": entry.seeds,
                    "difference": entry.difference
                    and dataclasses.asdict(entry.difference),
                }
                for name, entry in group.entries.items()
            },
        }
        for group in found
    ]


def mean_and_deviation(entry, seeds):
    """An `Entry` as text, such as "0.751 ± 0.012" or "25,600 (1 of 2 seeds)".

    Args:
        entry: The `Entry`.
        seeds: Number of runs; those without the metric, as they did not reach a
            level, are not in the mean.
    """
    text = _number(entry.mean, 3)
    if entry.deviation is not None:
        text += f" ± {_number(entry.deviation, 2)}"
    if entry.seeds < seeds:
        text += f" ({entry.seeds} of {seeds} seeds)"
    return text


def _number(value, digits):
    value = round(value, 12)  # The spread of equal values is rounding.
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"


def markdown(found, metrics):
    """The table in Markdown: mean and standard deviation over seeds.

    With the p-value of the difference from the reference method in brackets,
    where there is one.
    """
    lines = [
        ["method", "seeds", *metrics],
        ["---"] * (len(metrics) + 2),
        *(
            [
                group.name.replace("*", r"\*"),
                f"{len(group.done)} of {len(group.rows)}",
                *(_cell(group, metric) for metric in metrics),
            ]
            for group in found
        ),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(group, metric):
    entry = group.entries.get(metric)
    if entry is None:
        return ""
    text = mean_and_deviation(entry, len(group.done))
    if entry.difference is not None:
        text += f" (p {entry.difference.p_value:.2g})"
    return text


def series(found):
    """Dict from the name of an ablation to its groups, ordered by value."""
    named = [g for g in found if g.method.series is not None]
    named.sort(key=lambda g: (g.method.series, g.method.value))
    return {
        name: list(members)
        for name, members in itertools.groupby(
            named, key=lambda g: g.method.series
        )
    }
