"""A plugin of pytest: CPU time of each file and test, and memory, at the end.

    PYTHONPATH=.ci python -m pytest -p cost

The time includes all threads, and other processes that a test waited for.
"""

import collections
import resource

import pytest

SHOWN = 15
_files = collections.Counter()
_tests = collections.Counter()


def _used():
    own = resource.getrusage(resource.RUSAGE_SELF)
    others = resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(x.ru_utime + x.ru_stime for x in (own, others))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """Adds what a test and its fixtures took to its file.

    A fixture that several tests share is counted in the first of them.
    """
    before = _used()
    result = yield
    used = _used() - before
    _files[item.nodeid.partition("::")[0]] += used
    _tests[item.nodeid] += used
    return result


def pytest_terminal_summary(terminalreporter):
    """Prints the dearest files and tests, and the sums."""
    write = terminalreporter.write_line
    terminalreporter.section("cost")
    for counter in (_files, _tests):
        for name, seconds in counter.most_common(SHOWN):
            write(f"{seconds:8.1f} s  {name}")
        write("")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    write(
        f"{_used() / 60:8.1f} minutes of CPU time in total with imports; "
        f"peak memory {peak:.0f} MiB"
    )
