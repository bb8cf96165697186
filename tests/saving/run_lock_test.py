"""The run lock: one run per folder, whatever happened to the previous one."""

import errno
import fcntl
import json
import os
import threading
import time

import pytest
import tensorflow as tf

from cappa_tf.saving import run_lock
from cappa_tf.saving.run_lock import RunLock, WorkdirInUseError
from cappa_tf.utils import files


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT", 0.02)
    monkeypatch.setattr(run_lock, "PATIENCE", 0.6)
    monkeypatch.setattr(run_lock, "SETTLE", 0.3)


@pytest.fixture(params=["mounted", "remote"])
def lockless(request, tmp_path, monkeypatch):
    """A folder in a bucket, mounted or through TensorFlow's gfile."""

    def flock(file, operation):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    return f"ram:/{tmp_path}" if request.param == "remote" else str(tmp_path)


def _leave_behind(folder, **changes):
    """The file that a killed run leaves."""
    path = os.path.join(folder, run_lock.FILE_NAME)
    with RunLock(folder):
        record = json.loads(files.read_text(path)) | {"run": "other"} | changes
    files.write_text(path, json.dumps(record))
    return path, record


def _refused(folder):
    with pytest.raises(WorkdirInUseError) as error, RunLock(folder):
        pass
    return str(error.value)


def test_the_second_is_told_of_the_first(tmp_path):
    with RunLock(tmp_path):
        message = _refused(tmp_path)
        assert f"process {os.getpid()} on host {os.uname().nodename}" in message
        assert str(tmp_path) in message
        assert "Received" in message
    with RunLock(tmp_path) as lock:
        lock.check()
    assert os.listdir(tmp_path) == []


def test_a_folder_without_a_result_goes_again(tmp_path):
    with pytest.raises(KeyError), RunLock(tmp_path / "new" / "run"):
        raise KeyError
    assert not (tmp_path / "new" / "run").exists()
    (tmp_path / "mine").mkdir()
    with RunLock(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()


def test_a_dead_run_of_this_machine_is_taken_over_at_once(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(run_lock, "PATIENCE", 1e6)
    _leave_behind(tmp_path, pid=123456789)
    with RunLock(tmp_path):
        assert "process 123456789" in caplog.text
        assert "takes over the folder" in caplog.text


def test_a_silent_run_of_another_machine_is_taken_over(tmp_path, caplog):
    _leave_behind(tmp_path, machine="b", host="far", pid=7)
    start = time.monotonic()
    with RunLock(tmp_path):
        assert time.monotonic() - start >= run_lock.PATIENCE
    assert "process 7 on host far: waiting" in caplog.text
    assert "takes over the folder" in caplog.text


def test_a_living_run_of_another_machine_is_not(tmp_path):
    """A run whose system lock is not visible here."""
    path, record = _leave_behind(tmp_path, machine="b", host="far", pid=7)

    def beat():
        files.write_text(path, json.dumps(record | {"beat": 1}))

    timer = threading.Timer(0.2, beat)
    timer.start()
    assert "process 7 on host far" in _refused(tmp_path)
    timer.join()
    assert json.loads(files.read_text(path))["host"] == "far"


def test_without_system_locks_the_beat_decides(lockless):
    with RunLock(lockless):
        assert f"process {os.getpid()} on" in _refused(lockless)
    _leave_behind(lockless)
    half = files.temporary_name(os.path.join(lockless, "model.keras"))
    files.write_text(half.replace(f"-{os.getpid()}-", "-999999999-"), "half")
    with RunLock(lockless):
        assert files.listdir(lockless) == [run_lock.FILE_NAME]
    assert files.listdir(lockless) == []


def test_started_together_without_system_locks(lockless):
    """One of them runs, the one that the file names in the end."""
    won, lost = [], []
    together = threading.Barrier(2)

    def start(name):
        together.wait()
        try:
            with RunLock(lockless):
                won.append(name)
                time.sleep(1.0)
        except WorkdirInUseError:
            lost.append(name)

    threads = [threading.Thread(target=start, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(lost) == 1


def test_a_run_that_lost_its_folder_is_told(tmp_path):
    with RunLock(tmp_path) as lock:
        lock.check()
        (tmp_path / run_lock.FILE_NAME).unlink()
        with RunLock(tmp_path), pytest.raises(WorkdirInUseError):
            lock.check()


def test_a_run_that_lost_its_bucket_learns_it_from_the_beat(tmp_path):
    path = f"ram:/{tmp_path}/{run_lock.FILE_NAME}"
    with RunLock(os.path.dirname(path)) as lock:
        lock.check()
        files.write_json(path, {"run": "other", "host": "far", "pid": 7})
        time.sleep(10 * run_lock.BEAT)
        with pytest.raises(WorkdirInUseError, match="process 7 on host far"):
            lock.check()
    assert files.exists(path)  # The other one's.


def test_a_file_system_that_cannot_hold_a_run_is_named(monkeypatch):
    def rename(source, target, overwrite=False):
        raise tf.errors.UnimplementedError(None, None, "no renaming")

    monkeypatch.setattr(tf.io.gfile, "rename", rename)
    for path, reason in (
        ("none://bucket/run", "scheme 'none' not implemented"),
        ("ram://bucket/run", "no renaming"),
    ):
        rule = f"`workdir` must be a folder.*workdir='{path}'.*{reason}"
        with pytest.raises(ValueError, match=rule), RunLock(path):
            pass


def test_a_child_does_not_keep_the_folder(tmp_path):
    """As a worker of multiprocessing that outlives a killed parent."""
    ready, done = os.pipe(), os.pipe()
    lock = RunLock(tmp_path)
    lock.__enter__()
    child = os.fork()
    if child == 0:
        os.close(done[1])
        os.write(ready[1], b"x")
        os.read(done[0], 1)  # Until the test is over.
        os._exit(0)
    os.read(ready[0], 1)
    # As the kernel does with a killed process.
    lock._ended.set()
    lock._thread.join()
    run_lock._close(lock._file)
    with RunLock(tmp_path):
        pass
    os.write(done[1], b"x")
    os.waitpid(child, 0)
    for end in (*ready, *done):
        os.close(end)
