"""Pytest plugin that reports CPU time per file, and memory.

    PYTHONPATH=.ci python -m pytest -p cost

The time includes all threads, and other processes that a test waited for.
"""

import collections
import resource

import pytest

SHOWN = 15
_seconds = collections.Counter()


def _used():
    own = resource.getrusage(resource.RUSAGE_SELF)
    others = resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(x.ru_utime + x.ru_stime for x in (own, others))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """Adds the time of a test and its fixtures to its file."""
    before = _used()
    result = yield
    _seconds[item.nodeid.partition("::")[0]] += _used() - before
    return result


def pytest_terminal_summary(terminalreporter):
    """Prints the most expensive files and the totals."""
    write = terminalreporter.write_line
    terminalreporter.section("cost")
    for name, seconds in _seconds.most_common(SHOWN):
        write(f"{seconds:8.1f} s  {name}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    write(
        f"{_used() / 60:8.1f} minutes of CPU time in total with imports; "
        f"peak memory {peak:.0f} MiB"
    )
