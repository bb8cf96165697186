"""What all evaluators share: a model goes in, named figures come out.

An evaluator is made of data and settings alone, so that one object measures
a model again and again while it is trained, and many models after that.
"""

import collections
import dataclasses
import math


@dataclasses.dataclass
class Report:
    """What an evaluator found.

    Attributes:
        metrics: Name -> number: what is compared, logged and plotted.
        lines: The lines of a table for people.
        details: What else goes into the JSON file: counts, settings, figures
            that are no single number.
        rows: Results one by one (of an image, a pair), JSON objects for a
            file of their own; may be empty.
        sheets: Name -> (title, `captions.CaptionRow`s with images): image
            sheets to be drawn; may be empty.
    """

    metrics: dict
    lines: list
    details: dict = dataclasses.field(default_factory=dict)
    rows: list = dataclasses.field(default_factory=list)
    sheets: dict = dataclasses.field(default_factory=dict)


class Evaluator:
    """Base class: `evaluate` is what an evaluator has to define.

    Args:
        name: First part of the names of its figures where several evaluators
            write into one place.
    """

    # What the model must be able to do: names of `Predictor.capabilities`, or
    # "score", a score of any kind.
    needs = ()
    # Whether several hosts of a run share the work, by `predictor.hosts`; the
    # first does it for all otherwise.
    on_all_hosts = False

    def __init__(self, name: str):
        if not isinstance(name, str) or not name:
            raise ValueError(f"`name` must be a word. Received: name={name!r}")
        self.name = name

    def open(self):
        """Looks whether the data is there; a long run fails before it starts.

        Raises:
            ValueError: It is not, or is not what it should be.
        """

    def check(self, predictor):
        """Refuses a model that cannot do what this needs.

        Raises:
            ValueError: Naming the evaluator and the model.
        """
        who = f"{type(self).__name__} ({self.name})"
        predictor.require(who, *self.needs)

    def evaluate(self, predictor):
        """Measures a model, which is checked before any data is read.

        Args:
            predictor: The model and what belongs to it, a `Predictor`.

        Returns:
            A `Report`.
        """
        raise NotImplementedError

    def run(self, predictor):
        """Yields (name, number) of each metric."""
        yield from self.evaluate(predictor).metrics.items()


def check_evaluators(evaluators):
    """Refuses what is not a list of evaluators with names of their own."""
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
    """Lines of aligned columns, the first to the left, the others right.

    Args:
        header: Names of the columns.
        rows: Tuples of texts, integers, and floats (shown to 4 decimals);
            None is an empty cell.

    Returns:
        A list of strings.
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
    """The same value without what JSON has no word for.

    Args:
        value: Dicts, lists, tuples, texts, numbers, None.

    Returns:
        The value with None for each number that is not finite, as where a
        correlation is not defined.
    """
    if isinstance(value, dict):
        return {name: json_value(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def skipped_lines(skipped):
    """A line for each reason, of counts by reason."""
    return [f"skipped: {n} x {reason}" for reason, n in skipped.items()]


def named(kind, figures, plain):
    """Figures of one kind of score, by the name of their metric.

    Those of the plain kind, a model's first, have their own name; others the
    kind's in front: "parallel/top_1".
    """
    prefix = "" if kind == plain else f"{kind}/"
    return {prefix + name: value for name, value in figures.items()}


def _cell(value):
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
