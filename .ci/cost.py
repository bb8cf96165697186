"""A plugin of pytest: CPU time of each file and test, and memory, at the end.

    PYTHONPATH=.ci python -m pytest -p cost

The time includes all threads, and other processes that a test waited for. With
pytest-xdist the workers' figures are summed.
"""

import collections
import resource

import pytest

SHOWN = 15
_files = collections.Counter()
_tests = collections.Counter()
_workers = []  # (CPU seconds, peak memory in MiB) of each finished worker.


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


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def pytest_sessionfinish(session):
    """Hands a worker's figures to the process that prints them."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["cost"] = [dict(_files), dict(_tests), _used(), _peak()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Receives a worker's figures, which one that crashed does not send."""
    output = getattr(node, "workeroutput", {})
    files, tests, used, peak = output.get("cost", ({}, {}, 0.0, 0.0))
    _files.update(files)
    _tests.update(tests)
    _workers.append((used, peak))


def pytest_terminal_summary(terminalreporter):
    """Prints the dearest files and tests, and the sums."""
    write = terminalreporter.write_line
    terminalreporter.section("cost")
    for counter in (_files, _tests):
        for name, seconds in counter.most_common(SHOWN):
            write(f"{seconds:8.1f} s  {name}")
        write("")
    # The children of this process are its workers, if there are any.
    used = sum(x for x, _ in _workers) if _workers else _used()
    peaks = [peak for _, peak in _workers] or [_peak()]
    write(
        f"{used / 60:8.1f} minutes of CPU time in total with imports; "
        f"peak memory {' + '.join(f'{x:.0f}' for x in peaks)} MiB"
    )
