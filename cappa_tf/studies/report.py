"""The report of a study: one HTML page that needs nothing else, and its data.

Below the study's folder:

    report.html     the page, with its images inside
    report.json     the table, differences, predictions and versions
    table.md        the table in Markdown
    cells.csv       a line for each cell with all its metrics
    figures/        every figure as a PNG file
"""

import base64
import html
import importlib.metadata
import io
import os
import platform
import shlex

from PIL import Image

from cappa_tf.evaluation.evaluator import json_value
from cappa_tf.studies import figures as drawing
from cappa_tf.studies import results, scaling, table
from cappa_tf.training.flops import readable
from cappa_tf.utils import files

_PACKAGES = ("cappa-tf", "tensorflow", "keras", "numpy")
# Width of an embedded sheet of captions, in pixels.
_SHEET_WIDTH = 900

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #8889; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem;
  max-width: 80rem; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.5rem; font-size: 1.25rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { white-space: normal; vertical-align: bottom; min-width: 6rem; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: Canvas; }
td small { display: block; color: GrayText; }
.best { font-weight: 700; } .best small { font-weight: 400; }
.failed td { color: #c33; }
.grid { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; } figcaption { font-size: .9rem; margin-bottom: .3rem; }
figure svg { width: 100%; height: auto; background: #fff; }
figure img { width: 100%; height: auto; }
pre { overflow-x: auto; padding: .7rem; border: 1px solid var(--line);
  font-size: .85rem; }
summary { cursor: pointer; }
"""


def write_report(study, rows, workdir):
    """Writes the report of what is there; cells may still be missing.

    Args:
        study: The `Study`.
        rows: List of `results.Row`, one for each cell.
        workdir: Folder of the study.

    Returns:
        The table in Markdown.
    """
    found = table.groups(study, rows)
    metrics = table.shown_metrics(study, found)
    scalings = scaling.scalings(study, found, metrics)
    figures = drawing.draw_all(study, found, metrics, scalings)
    predictions = [one.predict() for one in scalings]
    folder = os.path.join(workdir, "figures")
    files.makedirs(folder)
    for name, image in figures.png.items():
        files.write_bytes(os.path.join(folder, f"{name}.png"), image)
    results.write_csv(rows, os.path.join(workdir, "cells.csv"))
    content = {
        "study": study.name,
        "reference": study.reference_method.name,
        "matched_by": study.matched_by,
        "table": table.summary(study, found),
        "predictions": predictions,
        "versions": _versions(),
    }
    files.write_json(os.path.join(workdir, "report.json"), json_value(content))
    parts = [
        _head(study, rows),
        _table(study, found, metrics),
        _matched(study, found),
        _figures(figures),
        _predictions(predictions),
        _sheets(found, "Captions", "sheet.png"),
        _sheets(found, "Attention for each word", "attention.png"),
        _commands(study, rows),
    ]
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(study.name)}</title><style>{_STYLE}</style>"
        f"<body>{''.join(parts)}</body></html>\n"
    )
    files.write_text(os.path.join(workdir, "report.html"), page)
    in_markdown = table.markdown(found, metrics)
    files.write_text(os.path.join(workdir, "table.md"), in_markdown)
    return in_markdown


def _versions():
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        **found,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
    }


def _head(study, rows):
    counts = {}
    for row in rows:
        counts[row.state] = counts.get(row.state, 0) + 1
    states = ", ".join(f"{n} {state}" for state, n in counts.items())
    seeds, methods = len(study.seed_list), len(study.methods)
    return (
        f"<h1>{html.escape(study.name)}</h1><p>{methods} "
        f"method{'s' * (methods > 1)}, {seeds} seed{'s' * (seeds > 1)}; runs: "
        f"{states}.</p>"
    )


def _table(study, found, metrics):
    best = {}
    for metric in metrics:
        values = [g.entries[metric].mean for g in found if metric in g.entries]
        if len(values) > 1:
            lower = results.lower_is_better(metric)
            best[metric] = min(values) if lower else max(values)
    names = [html.escape(metric).replace("/", "/<wbr>") for metric in metrics]
    head = "".join(f"<th>{name}</th>" for name in names)
    lines = []
    for group in found:
        cells = []
        for metric in metrics:
            entry = group.entries.get(metric)
            if entry is None:
                cells.append("<td>")
                continue
            mark = " class=best" if entry.mean == best.get(metric) else ""
            cells.append(f"<td{mark}>{_entry(entry, len(group.done))}")
        failed = [row for row in group.rows if row.state == "failed"]
        note = "".join(
            f"<small>{html.escape(row.cell.name)}: "
            f"{html.escape(row.message or '')}</small>"
            for row in failed
        )
        mark = " class=failed" if failed and not group.done else ""
        lines.append(
            f"<tr{mark}><td>{html.escape(group.name)}"
            f"<small>{len(group.done)} of {len(group.rows)} seeds</small>{note}"
            + "".join(cells)
        )
    reference = html.escape(study.reference_method.name)
    return (
        f"<h2>Results</h2><div class=wide><table><tr><th>method{head}"
        f"{''.join(lines)}</table></div><p>Mean &plusmn; standard deviation "
        "over seeds; the best mean is bold. Below it, where an evaluator keeps "
        f"the score of each test item, the difference from {reference} with "
        "its 95% interval and p-value by the paired bootstrap over test items "
        "(scores averaged over seeds): whether it would hold on other items, "
        "not whether it would with other seeds.</p>"
    )


def _entry(entry, seeds):
    text = table.mean_and_deviation(entry, seeds)
    one = entry.difference
    if one is not None:
        text += (
            f"<small>{one.mean:+.3g} ({one.low:+.3g} to {one.high:+.3g})<br>"
            f"p {'&le;' if one.p_value <= 2e-4 else '='} {one.p_value:.2g}"
            "</small>"
        )
    return text


def _matched(study, found):
    lines = []
    for group in found:
        cell = group.rows[0].cell
        seconds = [
            r.seconds["train"] for r in group.done if "train" in r.seconds
        ]
        time = f"{sum(seconds) / len(seconds) / 60:.1f} min" if seconds else ""
        flops = "" if group.flops is None else readable(group.flops)
        lines.append(
            f"<tr><td>{html.escape(group.name)}<td>{cell.steps:,}"
            f"<td>{cell.batch_size:,}<td>{group.images:,}<td>{flops}<td>{time}"
        )
    notes = "".join(f"<li>{html.escape(note)}" for note in study.notes)
    by = {
        "images": "the number of images seen, repetitions counted",
        "flops": "the FLOPs of training, decoder and text tower included",
        "time": "the time of training, as it was measured before",
    }[study.matched_by]
    return (
        f"<h2>What was matched</h2><p>Methods are matched by {by}. FLOPs are "
        "those of matrix products, forward and backward.</p><div class=wide>"
        "<table><tr><th>method<th>steps<th>batch<th>images<th>FLOPs<th>time "
        f"of a run{''.join(lines)}</table></div><ul>{notes}</ul>"
    )


def _figures(figures):
    if not figures.svg:
        return ""
    items = "".join(
        f"<figure><figcaption>{html.escape(figures.titles[name])}"
        f"</figcaption>{svg}</figure>"
        for name, svg in figures.svg.items()
    )
    return (
        "<h2>Curves</h2><p>Lines are means over seeds, bands their range, bars "
        f"their standard deviation.</p><div class=grid>{items}</div>"
    )


def _predictions(predictions):
    if not predictions:
        return ""
    lines = "".join(
        f"<tr><td>{html.escape(p['method'])}<td>{html.escape(p['metric'])}"
        f"<td>{_exponents(p)}<td>{_place(p)}"
        f"<td>{p['predicted']:.4g} ({p['interval'][0]:.4g} to "
        f"{p['interval'][1]:.4g})"
        for p in predictions
    )
    return (
        "<h2>What the power laws predict</h2><div class=wide><table><tr>"
        "<th>method<th>metric<th>exponent (95%) of<th>at<th>predicted (95%)"
        f"{lines}</table></div><p>The error (1 minus a metric of which more is "
        "better) is a constant times a power of each factor. Intervals are "
        "those of the law, fitted again to resampled residuals, and hold only "
        "as far as the law does.</p>"
    )


def _exponents(prediction):
    ranges = prediction["exponent_ranges"]
    return "<br>".join(
        f"{name}: {value:.3f} ({ranges[name][0]:.3f} to {ranges[name][1]:.3f})"
        for name, value in prediction["exponents"].items()
    )


def _place(prediction):
    at = prediction["at"]
    images = f", {at[scaling.IMAGES]:,.0f} images" if len(at) > 1 else ""
    each = (
        f"{readable(at[scaling.SIZE])} an image{images}<br>" if images else ""
    )
    return f"{each}{readable(prediction['flops'])}"


def _sheets(found, title, name):
    """An image in the folder of the first run of each method, side by side."""
    items = []
    for group in found:
        for row in group.done[:1]:
            path = os.path.join(row.folder, "run", name)
            if files.exists(path):
                items.append(
                    f"<figure><figcaption>{html.escape(row.cell.name)}"
                    f'</figcaption><img alt="{title} of '
                    f'{html.escape(group.name)}" src="{_embedded(path)}">'
                    "</figure>"
                )
    if not items:
        return ""
    return f"<h2>{title}</h2><div class=grid>{''.join(items)}</div>"


def _embedded(path):
    """A sheet as a data URL, small enough for a page."""
    with Image.open(io.BytesIO(files.read_bytes(path))) as image:
        image = image.convert("RGB")
        image.thumbnail((_SHEET_WIDTH, 100 * _SHEET_WIDTH))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(
        buffer.getvalue()
    ).decode("ascii")


def _commands(study, rows):
    lines = []
    for row in rows:
        described = row.cell.description()
        transfer = described.pop("transfer")
        for name, arguments in (*described.items(), *transfer.items()):
            tool = "train" if name in transfer else name
            if arguments:
                shown = shlex.join(arguments)
                lines.append(f"# {row.cell.name}\ncappa-{tool} {shown}")
    versions = ", ".join(f"{k} {v}" for k, v in _versions().items())
    return (
        f"<h2>Commands and versions</h2><p>{html.escape(versions)}</p>"
        "<details><summary>The command of each run and evaluation</summary>"
        f"<pre>{html.escape(chr(10).join(lines))}</pre></details>"
    )
