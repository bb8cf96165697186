"""The benchmark compares two ways of computing the same."""

import importlib.util
import pathlib

import pytest

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "benchmark.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_ways_give_the_same_loss(benchmark):
    sizes = {
        "batch_size": 8,
        "length": 6,
        "tokens": 3,
        "vocabulary_size": 50,
        "width": 16,
    }
    plain = benchmark.measure_loss("plain", **sizes)
    chunked = benchmark.measure_loss("chunked", **sizes)
    assert chunked["loss"] == pytest.approx(plain["loss"], rel=1e-5)
