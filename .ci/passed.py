"""Pytest plugin that skips tests that passed in another environment.

    pytest -p passed --passed=FILE

deselects the tests listed in FILE, one per line, and adds those that pass.
"""

import pathlib

import pytest


def pytest_addoption(parser):
    """Defines --passed."""
    parser.addoption("--passed", type=pathlib.Path, required=True)


def pytest_collection_modifyitems(config, items):
    """Deselects the tests that have passed."""
    file = config.getoption("passed")
    passed = set(file.read_text().splitlines()) if file.exists() else set()
    known = [item for item in items if item.nodeid in passed]
    items[:] = [item for item in items if item.nodeid not in passed]
    config.hook.pytest_deselected(items=known)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Adds a passed test to the file."""
    report = yield
    if report.when == "call" and report.passed:
        with item.config.getoption("passed").open("a") as file:
            file.write(f"{item.nodeid}\n")
    return report
