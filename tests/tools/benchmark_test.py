"""The benchmarks compare ways of computing the same."""

import importlib.util
import pathlib

import pytest

from tools.benchmarks import memory

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "benchmark.py"


@pytest.fixture(name="benchmark", scope="module")
def _benchmark():
    spec = importlib.util.spec_from_file_location("benchmark", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_benchmark_can_be_loaded(benchmark):
    for name in benchmark.BENCHMARKS:
        module = benchmark.load([name])
        assert callable(module.define_flags) and callable(module.run)
    with pytest.raises(ValueError, match=r"'speed'.*There are:\s+memory"):
        benchmark.load(["speed"])


def test_both_ways_give_the_same_loss():
    sizes = {
        "batch_size": 8,
        "length": 6,
        "tokens": 3,
        "vocabulary_size": 50,
        "width": 16,
    }
    plain = memory.measure_loss("plain", **sizes)
    chunked = memory.measure_loss("chunked", **sizes)
    assert chunked["loss"] == pytest.approx(plain["loss"], rel=1e-5)
