"""Runs pytest on the files it is given: the main file of Bazel's py_test."""

import sys

import pytest

if __name__ == "__main__":
    sys.exit(pytest.main(["--import-mode=importlib", *sys.argv[1:]]))
