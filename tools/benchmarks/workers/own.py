"""A worker that runs one way of a benchmark of this project.

Its options are those of the benchmark's `make`, and `benchmark`, its name.
"""

import importlib
import pathlib
import sys

# Started by its path, as workers of other environments are.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[3])

from cappa_tf.utils import console, cpu  # noqa: E402
from tools.benchmarks.workers import protocol  # noqa: E402


def make(options):
    """What to measure, by the benchmark's own `make`."""
    name = options.pop("benchmark")
    return importlib.import_module(f"tools.benchmarks.{name}").make(options)


if __name__ == "__main__":
    cpu.prepare()  # As the tools do.
    console.hide_native_info()
    protocol.serve(make)
