"""Benchmarks of tools/benchmark.py, one per module, and shared functions."""

import json
import pathlib
import resource
import statistics
import subprocess
import sys

_TOOL = pathlib.Path(__file__).resolve().parents[1] / "benchmark.py"


def in_turns(ways, rounds, measure):
    """Measures several methods repeatedly, in turn.

    Other load on the machine then affects all methods equally.

    Args:
        ways: Names of the methods.
        rounds: Number of measurements of each.
        measure: Function of a name that returns a dict of numbers.

    Returns:
        Dict name -> dict of the medians of its numbers.
    """
    results = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            results[way].append(measure(way))
    return {
        way: {
            key: statistics.median(result[key] for result in found)
            for key in found[0]
        }
        for way, found in results.items()
    }


def in_a_process(name, **flags):
    """Runs a benchmark in a fresh process, so that peaks do not mix.

    Args:
        name: Name of the benchmark.
        **flags: Its flags; None leaves a flag out.

    Returns:
        The JSON value in the last line it prints.
    """
    given = [f"--{k}={v}" for k, v in flags.items() if v is not None]
    output = subprocess.run(
        [sys.executable, str(_TOOL), name, *given],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    return json.loads(output.splitlines()[-1])


def peak_bytes():
    """Peak resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
