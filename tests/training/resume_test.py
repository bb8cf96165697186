"""A run killed at any moment resumes as if it had not been interrupted."""

import os
import random
import signal
import time

import numpy as np
import processes
import pytest
import small_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))
    small_run.write_data(folder)
    return folder


def _start(data, folder, name=""):
    return processes.Process(
        small_run.plain_run, data, folder, log=f"{folder}{name}.txt"
    )


@pytest.fixture(scope="module")
def rivals(data, tmp_path_factory):
    """Three runs on one folder: two started together, one much later.

    Returns the folder; the run that went to its end; the others.
    """
    folder = str(tmp_path_factory.mktemp("whole") / "run")
    pair = [_start(data, folder, f"-{i}") for i in range(2)]
    has_come = _after_steps(1, 0.0)(folder)
    while all(p.running for p in pair) or not has_come():
        time.sleep(0.05)
        assert any(p.running for p in pair), [p.output for p in pair]
    first, second = sorted(pair, key=lambda p: not p.running)
    late = _start(data, folder, "-late")
    for process in (late, second, first):
        process.wait()
    return folder, first, (second, late)


@pytest.fixture
def uninterrupted(rivals):
    return rivals[0]


def test_a_folder_has_one_run_at_a_time(rivals):
    folder, first, others = rivals
    assert first.wait() == 0, first.output
    for process in others:
        assert process.wait() == 1
        last = process.output.splitlines()[-1]
        assert "WorkdirInUseError: `workdir` must be used by one run" in last
        assert f"process {first.pid} on host {os.uname().nodename}" in last
        # No data was opened.
        assert "decoding" not in process.output
    assert "run.lock" not in os.listdir(folder)


def _after_steps(count, delay):
    """The moment some time after a process has logged `count` steps."""

    def watch(folder):
        path = os.path.join(folder, "train.log")
        before = _logged_steps(path)

        def has_come():
            if _logged_steps(path) < before + count:
                return False
            time.sleep(delay)
            return True

        return has_come

    return watch


def _logged_steps(path):
    if not os.path.exists(path):
        return 0
    with open(path) as file:
        return file.read().count("  loss ")


def _while_saving(folder):
    """The moment at which a checkpoint is half written."""
    path = os.path.join(folder, "checkpoints")

    def has_come():
        return os.path.isdir(path) and any(
            "_temp" in name for name in os.listdir(path)
        )

    # Files left by an earlier kill are deleted when the process starts.
    while has_come():
        time.sleep(0.01)
    return has_come


def _survive(data, folder, moments):
    """Runs to the end, killed once at each of the moments."""
    for watch in moments:
        process = _start(data, folder)
        has_come = watch(folder)
        while process.running and not has_come():
            time.sleep(0.0005)
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.output
    process = _start(data, folder)
    assert process.wait() == 0, process.output
    return process.output


def _assert_same_bits(one, other):
    wanted, found = small_run.saved(one), small_run.saved(other)
    assert wanted.keys() == found.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    # Steps made twice, before and after a kill, are the same as well.
    for tag in ("train/loss", "train/gradient_norm"):
        assert small_run.logged(one, tag) == small_run.logged(other, tag)


def test_killed_twice_is_never_interrupted_bit_by_bit(
    data, uninterrupted, tmp_path
):
    folder = str(tmp_path / "run")
    moments = [_while_saving, _after_steps(3, 0.005)]
    output = _survive(data, folder, moments)
    assert "resuming from" in output
    _assert_same_bits(uninterrupted, folder)
    left = os.listdir(os.path.join(folder, "checkpoints"))
    assert not [name for name in left if "temp" in name]


@pytest.mark.slow
def test_killed_ten_times_is_never_interrupted_bit_by_bit(
    data, uninterrupted, tmp_path
):
    draw = random.Random(0)
    moments = [
        _while_saving
        if i % 2
        else _after_steps(draw.randint(1, 4), draw.uniform(0.0, 0.05))
        for i in range(10)
    ]
    folder = str(tmp_path / "run")
    _survive(data, folder, moments)
    _assert_same_bits(uninterrupted, folder)
