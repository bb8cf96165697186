"""Figures of a study, drawn by matplotlib."""

import contextlib
import io
import itertools
import re

import numpy as np

from cappa_tf.studies import scaling
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


def _scaling(figures, scalings):
    """Errors with their power laws, a figure for each metric.

    Methods share it if the FLOPs are the only factor.
    """
    for metric, some in itertools.groupby(scalings, key=lambda s: s.metric):
        some = list(some)
        of_flops = [x for x in some if x.factors == (scaling.FLOPS,)]
        of_sizes = [x for x in some if x.factors != (scaling.FLOPS,)]
        if of_flops:
            with _scaling_axis(figures, metric, scaling.FLOPS) as axis:
                for one in of_flops:
                    _law_of_flops(figures, axis, one)
        for one in of_sizes:
            name = one.method if len(some) > 1 else ""
            with _scaling_axis(figures, metric, scaling.IMAGES, name) as axis:
                _law_of_sizes(figures, axis, one)


def _scaling_axis(figures, metric, x, method=""):
    label = metric if lower_is_better(metric) else f"1 - {metric}"
    slug = re.sub(r"\W+", "_", f"scaling_{metric}_{method}").strip("_")
    title = f"Scaling of {label}" + (method and f", {method}")
    return figures.draw(
        slug.lower(), title, x, label, xscale="log", yscale="log"
    )


def _law_of_flops(figures, axis, one):
    flops = [x for (x,) in one.places]
    style = figures.style(one.index)
    axis.plot(flops, one.errors, **style | {"linestyle": ""})
    x = np.geomspace(min(flops), *one.next_place, 50)
    (exponent,), ((low, high),) = one.law.exponents, one.law.exponent_ranges
    _law(axis, x, one.law, x[:, None], style["color"], "solid")
    axis.lines[-1].set_label(
        f"{one.method}: exponent {exponent:.3f} ({low:.3f} to {high:.3f})"
    )


def _law_of_sizes(figures, axis, one):
    """A line of each size over the images, and one of the next size."""
    images = [x for _, x in one.places]
    x = np.geomspace(min(images), max(images), 50)
    sizes = dict(zip([size for size, _ in one.places], one.sizes))
    for index, (size, name) in enumerate(sorted(sizes.items())):
        style = figures.style(index)
        points = [
            (place[1], error)
            for place, error in zip(one.places, one.errors)
            if place[0] == size
        ]
        axis.plot(*zip(*points), label=f"{name}", **style | {"linestyle": ""})
        place = np.stack([np.full_like(x, size), x], 1)
        _law(axis, x, one.law, place, style["color"], "solid", band=False)
    place = np.stack([np.full_like(x, one.next_place[0]), x], 1)
    _law(axis, x, one.law, place, "black", "dashed")
    axis.lines[-1].set_label("next size, predicted")


def _law(axis, x, law, places, color, linestyle, band=True):
    value, low, high = law.at(places)
    axis.plot(x, value, color=color, linestyle=linestyle)
    if band:
        axis.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
