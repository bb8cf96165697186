"""Base class of the evaluators, which measure a model, and their reports.

An evaluator holds only data and settings, so one object can measure a model
repeatedly during training, and other models after that.
"""

import collections
import dataclasses
import math


@dataclasses.dataclass
class Report:
    """Results of an evaluator.

    Attributes:
        metrics: Dict name -> number, to be compared, logged and plotted.
        lines: Lines of a table for people to read.
        details: Dict of further entries of the JSON file: counts, settings,
            results that are not a single number.
        rows: Individual results (of an image, of a pair), JSON objects for a
            file of their own; may be empty.
        sheets: Dict name -> (title, `captions.CaptionRow`s with images) of the
            image sheets to write; may be empty.
        items: Dict from the name of a metric to the scores of the test items,
            whose mean it is, in the order of the data; for paired comparisons
            of models.
    """

    metrics: dict
    lines: list
    details: dict = dataclasses.field(default_factory=dict)
    rows: list = dataclasses.field(default_factory=list)
    sheets: dict = dataclasses.field(default_factory=dict)
    items: dict = dataclasses.field(default_factory=dict)


class Evaluator:
    """Base class of the evaluators; a subclass defines `evaluate`.

    Args:
        name: Prefix of the names of its metrics when several evaluators report
            to the same place.

    Attributes:
        needs: Capabilities that the model must have, of
            `Predictor.capabilities`, or "score", a score of any kind.
        on_all_hosts: Whether the hosts of a run share the work through
            `predictor.hosts`; otherwise the first host does all of it.
    """

    needs = ()
    on_all_hosts = False

    def __init__(self, name: str):
        if not isinstance(name, str) or not name:
            raise ValueError(f"`name` must be a word. Received: name={name!r}")
        self.name = name

    def open(self):
        """Checks that the data can be found, before a long run starts.

        Raises:
            ValueError: If it cannot, or is not of the right form.
        """

    def check(self, predictor):
        """Checks that a model has the capabilities in `needs`.

        Raises:
            ValueError: If one is missing; names the evaluator and the model.
        """
        who = f"{type(self).__name__} ({self.name})"
        predictor.require(who, *self.needs)

    def evaluate(self, predictor):
        """Measures a model, after checking it before any data is read.

        Args:
            predictor: `Predictor` of the model.

        Returns:
            A `Report`.
        """
        raise NotImplementedError

    def run(self, predictor):
        """Yields (name, number) of each metric."""
        yield from self.evaluate(predictor).metrics.items()


def check_evaluators(evaluators):
    """Checks that all are evaluators and that their names are unique.

    Raises:
        ValueError: If they are not.
    """
    for one in evaluators:
        if not (callable(getattr(one, "run", None)) and hasattr(one, "name")):
            raise ValueError(
                "`evaluators` must have a `name`, `open()` and "
                "`run(predictor)`, as evaluation.evaluator.Evaluator has. "
                f"Received: {one!r}"
            )
    names = collections.Counter(one.name for one in evaluators)
    if any(count > 1 for count in names.values()):
        raise ValueError(
            "Each evaluator must have its own `name`. Received: "
            f"{[*names.elements()]}"
        )


def table(header, rows):
    """Formats a table, the first column aligned left, the others right.

    Args:
        header: Names of the columns.
        rows: Tuples of strings, integers and floats (printed with 4 decimals);
            None is an empty cell.

    Returns:
        List of lines.
    """
    cells = [[_cell(value) for value in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return [
        "  ".join(
            text.rjust(width) if i else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in cells
    ]


def json_value(value):
    """Makes a value representable in JSON.

    Args:
        value: Nested dicts, lists and tuples of strings, numbers and None.

    Returns:
        The value with None in place of each number that is not finite, such as
        an undefined correlation.
    """
    if isinstance(value, dict):
        return {name: json_value(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def skipped_lines(skipped):
    """Formats counts by reason, one line per reason."""
    return [f"skipped: {n} x {reason}" for reason, n in skipped.items()]


def named(kind, figures, plain):
    """Prefixes the metrics of one kind of score: "parallel/top_1".

    Those of the plain kind, a model's first, get no prefix.
    """
    prefix = "" if kind == plain else f"{kind}/"
    return {prefix + name: value for name, value in figures.items()}


def _cell(value):
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
