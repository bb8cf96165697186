"""Measures what this project claims about cost; prints ratios.

    python tools/benchmark.py memory

Each benchmark is a module of tools/benchmarks with its own flags, shown by
`python tools/benchmark.py memory --help`. It has two functions: define_flags()
and run().
"""

import importlib
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app

from tools import benchmarks

BENCHMARKS = {
    "data": "images a second and memory from shards to batches",
    "generate": "time of the ways to caption",
    "memory": "peak memory and time of the loss, and of a training step",
    "score": "time of the likelihoods of many labels",
}


def load(arguments):
    """The benchmark that a command line names.

    Args:
        arguments: What follows the program's name.

    Returns:
        The module.

    Raises:
        ValueError: The first argument is not the name of a benchmark.
    """
    name = arguments[0] if arguments else ""
    if name not in BENCHMARKS:
        known = "".join(f"\n    {k:10}{v}" for k, v in BENCHMARKS.items())
        raise ValueError(
            f"Name a benchmark first. Received: {arguments}. There are:{known}"
        )
    return importlib.import_module(f"{benchmarks.__name__}.{name}")


def main():
    """Runs the benchmark named by the first argument."""
    try:
        module = load(sys.argv[1:])
    except ValueError as error:
        sys.exit(str(error))
    module.define_flags()
    app.run(lambda _: module.run())


if __name__ == "__main__":
    main()
