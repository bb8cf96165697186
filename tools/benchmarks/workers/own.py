"""A worker that runs one way of a benchmark of this project.

Its options are those of the benchmark's `make`, and `benchmark`, its name.
"""

import importlib
import os
import pathlib
import sys

# Started by its path, as workers of other environments are.
sys.path[0] = str(pathlib.Path(__file__).resolve().parents[3])

from cappa_tf.utils import console  # noqa: E402
from tools.benchmarks.workers import protocol  # noqa: E402


def make(options):
    """What to measure, by the benchmark's own `make`."""
    name = options.pop("benchmark")
    if name == "train":  # As tools/train.py does, before TensorFlow is loaded.
        os.environ.setdefault("TF_CPU_ALLOCATOR_USE_BFC", "true")
        from cappa_tf.data.stream import caching

        caching.keep_freed_memory()
    return importlib.import_module(f"tools.benchmarks.{name}").make(options)


if __name__ == "__main__":
    console.hide_native_info()
    protocol.serve(make)
