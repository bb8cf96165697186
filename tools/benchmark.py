"""Runs the benchmarks behind this project's claims about cost.

    python tools/benchmark.py memory

Each benchmark is a module of tools/benchmarks with its own flags, shown by
`python tools/benchmark.py memory --help`. It has two functions: define_flags()
and run().
"""

import importlib
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from cappa_tf.utils import console
from tools import benchmarks

BENCHMARKS = {
    "data": "images per second and memory from shards to batches",
    "features": "images per second of LiT, with and without cached features",
    "generate": "time of different ways to caption",
    "memory": "peak memory and time of the loss, and of a training step",
    "score": "time of the likelihoods of many labels",
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


def main(argv):
    """Runs the benchmark named by the first argument."""
    with console.errors_as_lines("benchmark"):
        load(argv[1:]).run()


if __name__ == "__main__":
    console.run(main, define_flags)
