"""Figures of a study, drawn by matplotlib."""

import contextlib
import dataclasses
import io
import itertools
import re

import numpy as np

from cappa_tf.studies import statistics
from cappa_tf.studies.results import lower_is_better
from cappa_tf.studies.table import series
from cappa_tf.utils import arguments

# Distinguishable for color-blind people, too (Okabe & Ito).
_COLORS = (
    "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #7a5195 #666666".split()
)
_MARKERS = "osD^vPX*"
# For the methods beyond the colors.
_LINES = ("solid", "dashed", "dotted")
_SHOTS = re.compile(r"(?:.*/)?(\d+)_shot$")


class Figures:
    """Draws figures and keeps them as SVG, for the page, and as PNG.

    Attributes:
        svg: Dict name -> text of the SVG image.
        png: Dict name -> bytes of the PNG image.
        titles: Dict name -> title.
    """

    def __init__(self):
        arguments.check_extra("A study's report", "study", "matplotlib")
        self.svg, self.png, self.titles = {}, {}, {}

    @contextlib.contextmanager
    def draw(self, name, title, x, y, **axes):
        """Yields the axes of a new figure."""
        # Not pyplot, which keeps figures and asks for a display.
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        # Text as text, and the same file for the same figures.
        options = {"svg.fonttype": "none", "svg.hashsalt": name}
        with rc_context({**options, "font.size": 10}):
            figure = Figure((6.4, 4.0), layout="constrained")
            axis = figure.add_subplot()
            axis.set(xlabel=x, ylabel=y, **axes)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            yield axis
            if axis.get_legend_handles_labels()[1]:
                axis.legend(frameon=False, fontsize=9)
            text, image = io.StringIO(), io.BytesIO()
            figure.savefig(text, format="svg", metadata={"Date": None})
            figure.savefig(image, format="png", dpi=150)
        svg = text.getvalue()
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        self.svg[name] = svg[svg.index("<svg") :]
        self.png[name], self.titles[name] = image.getvalue(), title

    def style(self, index):
        """Color, marker and line of the method of a number."""
        return {
            "color": _COLORS[index % len(_COLORS)],
            "linestyle": _LINES[index // len(_COLORS) % len(_LINES)],
            "marker": _MARKERS[index % len(_MARKERS)],
            "markersize": 4,
        }


def draw_all(study, found, metrics, scalings):
    """Draws every figure that the results allow.

    Args:
        study: The `Study`.
        found: List of `Group`.
        metrics: Names of the metrics of the table.
        scalings: List of `Scaling`.

    Returns:
        `Figures`.
    """
    figures = Figures()
    trained = [g for g in found if g.done and not g.method.untrained]
    _curves(figures, trained, metrics, study.until)
    _few_shot(figures, [g for g in found if g.done])
    _ablations(figures, found, metrics)
    _scaling(figures, scalings)
    return figures


def _curves(figures, trained, metrics, timed):
    """Metrics measured during training over images, FLOPs and, one, time."""
    names = {n for g in trained for row in g.done for n in row.curves}
    wanted = ["train/loss"] + [
        n for m in metrics for n in sorted(names) if n.endswith(f"/{m}")
    ]
    if timed is not None and timed not in wanted:
        wanted.append(timed)
    for name in dict.fromkeys(wanted):
        for unit in ("images", "FLOPs", *["seconds"] * (name == timed)):
            lines = []
            for index, group in enumerate(trained):
                cell = group.rows[0].cell
                factor = cell.batch_size
                if unit == "FLOPs":
                    if not cell.flops:
                        continue
                    factor = cell.flops / cell.steps
                mean = _mean_curve([row.curves.get(name) for row in group.done])
                if mean is not None:
                    x = mean[0] * factor
                    if unit == "seconds":
                        rows = [r for r in group.done if r.curves.get(name)]
                        x = _mean_seconds(rows, mean[0])
                    lines.append((index, group, x, *mean[1:]))
            if not lines or (name == "train/loss" and unit == "FLOPs"):
                continue
            slug = re.sub(r"\W+", "_", f"{name}_{unit}").strip("_").lower()
            units = {"images": "images seen", "seconds": "the wall time"}
            unit = units.get(unit, f"{unit} of training")
            title = f"{name} against {unit}"
            with figures.draw(slug, title, unit, name) as axis:
                for index, group, x, y, low, high in lines:
                    style = figures.style(index)
                    many = len(x) > 30
                    style["marker"] = None if many else style["marker"]
                    axis.plot(x, y, label=group.name, **style)
                    axis.fill_between(
                        x, low, high, color=style["color"], alpha=0.15, lw=0
                    )


def _mean_seconds(rows, steps):
    """Wall time at each of the steps, mean over rows."""
    times = [[row.seconds_at[s] for s in steps] for row in rows]
    return np.mean(times, axis=0)


def _mean_curve(curves):
    """(steps, mean, least, most over seeds) where all seeds have a point."""
    curves = [dict(curve) for curve in curves if curve]
    if not curves:
        return None
    steps = sorted(set.intersection(*map(set, curves)))
    if not steps:
        return None
    values = np.array([[curve[s] for s in steps] for curve in curves])
    return np.array(steps), values.mean(0), values.min(0), values.max(0)


def _few_shot(figures, found):
    """Accuracy over the number of examples per class."""
    prefixes = {
        name.rpartition("/")[0]
        for group in found
        for name in group.entries
        if _SHOTS.match(name)
    }
    for prefix in sorted(prefixes):
        slug = re.sub(r"\W+", "_", f"few_shot_{prefix}")
        with figures.draw(
            slug,
            f"Few-shot accuracy ({prefix})",
            "examples per class",
            "accuracy",
            xscale="log",
        ) as axis:
            for index, group in enumerate(found):
                points = sorted(
                    (int(_SHOTS.match(name)[1]), entry)
                    for name, entry in group.entries.items()
                    if _SHOTS.match(name) and name.rpartition("/")[0] == prefix
                )
                if points:
                    _line(
                        axis,
                        [shots for shots, _ in points],
                        [entry for _, entry in points],
                        group.name,
                        figures.style(index),
                    )
            axis.xaxis.set_major_formatter("{x:g}")


def _line(axis, x, entries, label, style):
    axis.errorbar(
        x,
        [entry.mean for entry in entries],
        [entry.deviation or 0.0 for entry in entries],
        label=label,
        capsize=2,
        **style,
    )


def _ablations(figures, found, metrics):
    """Metrics over the value of a series, such as the parallel share."""
    for name, members in series(found).items():
        members = [group for group in members if group.entries]
        for metric in metrics:
            points = [g for g in members if metric in g.entries]
            if len(points) < 2:
                continue
            slug = re.sub(r"\W+", "_", f"{name}_{metric}").lower()
            with figures.draw(
                slug, f"{metric} against the {name}", name, metric
            ) as axis:
                _line(
                    axis,
                    [group.method.value for group in points],
                    [group.entries[metric] for group in points],
                    None,
                    figures.style(0),
                )


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How a metric of a method follows the FLOPs of training.

    Attributes:
        metric: Name of the metric.
        method: Name of the method.
        index: Its number in the study.
        flops: FLOPs of each of its groups.
        errors: The metric if lower is better, 1 minus it otherwise.
        law: `statistics.PowerLaw` of the two.
    """

    metric: str
    method: str
    index: int
    flops: list
    errors: list
    law: statistics.PowerLaw

    def predict(self, factor=4.0):
        """What the law says of `factor` times the most FLOPs, JSON-able."""
        flops = factor * max(self.flops)
        value, low, high = (float(v[0]) for v in self.law.at([flops]))
        if not lower_is_better(self.metric):
            value, low, high = 1 - value, 1 - high, 1 - low
        return {
            "method": self.method,
            "metric": self.metric,
            "exponent": self.law.exponent,
            "exponent_range": self.law.exponent_range,
            "flops": flops,
            "predicted": value,
            "interval": (low, high),
        }


def scalings(study, found, metrics):
    """`Scaling`s of every metric and method with enough different points."""
    scalings = []
    for metric, (index, method) in itertools.product(
        metrics, enumerate(study.methods)
    ):
        points = [
            (group.flops, group.entries[metric].mean)
            for group in found
            if group.method is method
            and group.flops
            and metric in group.entries
        ]
        flops = [x for x, _ in points]
        errors = [y if lower_is_better(metric) else 1.0 - y for _, y in points]
        try:
            law = statistics.PowerLaw.fit(flops, errors)
        except ValueError:
            continue  # Too few points, or errors of zero.
        scalings.append(Scaling(metric, method.name, index, flops, errors, law))
    return scalings


def _scaling(figures, scalings):
    """Errors over FLOPs with their power laws, a figure for each metric."""
    for metric, some in itertools.groupby(scalings, key=lambda s: s.metric):
        slug = re.sub(r"\W+", "_", f"scaling_{metric}").lower()
        label = metric if lower_is_better(metric) else f"1 - {metric}"
        with figures.draw(
            slug,
            f"Scaling of {label}",
            "FLOPs of training",
            label,
            xscale="log",
            yscale="log",
        ) as axis:
            for one in some:
                style, law = figures.style(one.index), one.law
                axis.plot(one.flops, one.errors, **style | {"linestyle": ""})
                places = np.geomspace(min(one.flops), 4 * max(one.flops), 50)
                value, low, high = law.at(places)
                axis.plot(
                    places,
                    value,
                    color=style["color"],
                    label=f"{one.method}: exponent {law.exponent:.3f} "
                    f"({law.exponent_range[0]:.3f} to "
                    f"{law.exponent_range[1]:.3f})",
                )
                axis.fill_between(
                    places, low, high, color=style["color"], alpha=0.15, lw=0
                )
