"""Runs the benchmarks behind this project's claims about cost.

    python tools/benchmark.py train
    python tools/benchmark.py train --json > train.json

Each benchmark is a module of tools/benchmarks with its own flags, shown by
`python tools/benchmark.py train --help`. It has two functions: define_flags(),
and run(), which returns a list of `benchmarks.Row`. Printed is a table of
figures, each with its unit and, after "x", what it is a multiple of; with
--json one object, {benchmark, machine, rows: [{name, value, unit, baseline,
ratio}]}. What is being measured is told on stderr.
"""

import dataclasses
import importlib
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import flags

from cappa_tf.utils import console
from tools import benchmarks

BENCHMARKS = {
    "caption": "time of different ways to caption",
    "data": "images per second and memory from shards to batches",
    "embed": "images per second of the encoder",
    "features": "images per second of LiT, with and without cached features",
    "memory": "peak memory and time of the loss, and of a training step",
    "plan": "expected time, memory and cost of a gin file on accelerators",
    "score": "time of the likelihoods of many labels",
    "start": "seconds from the command to the first step",
    "train": "images per second of a training step",
}


def load(arguments):
    """Loads the benchmark that a command line names.

    Args:
        arguments: Command line after the program's name.

    Returns:
        The module.

    Raises:
        ValueError: If the first argument is not the name of a benchmark.
    """
    name = arguments[0] if arguments else ""
    if name not in BENCHMARKS:
        known = "".join(f"\n    {k:10}{v}" for k, v in BENCHMARKS.items())
        raise ValueError(
            "The first argument must be the name of a benchmark. Received: "
            f"{arguments}. Benchmarks are:{known}"
        )
    return importlib.import_module(f"{benchmarks.__name__}.{name}")


def define_flags():
    """Defines the flags of the benchmark that the command line names."""
    with console.errors_as_lines("benchmark"):
        load(sys.argv[1:]).define_flags()
    flags.DEFINE_bool("json", False, "Prints one JSON object.")


def main(argv):
    """Runs the benchmark named by the first argument."""
    with console.errors_as_lines("benchmark"):
        machine = benchmarks.machine()
        rows = load(argv[1:]).run()
        if rows is not None:  # None: it was a part of another one.
            print(report(argv[1], machine, rows, flags.FLAGS.json))


def report(name, machine, rows, as_json):
    """What is printed of a benchmark.

    Args:
        name: Of the benchmark.
        machine: `benchmarks.machine()`.
        rows: List of `benchmarks.Row`.
        as_json: Whether to print a JSON object.
    """
    if as_json:
        found = {
            "benchmark": name,
            "machine": machine,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        return json.dumps(found, allow_nan=False)
    about = ", ".join(f"{k} {v}" for k, v in machine.items())
    return f"{name}: {about}\n{benchmarks.table(rows)}"


if __name__ == "__main__":
    console.run(main, define_flags)
