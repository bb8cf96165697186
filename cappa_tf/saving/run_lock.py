"""Lock on the folder of a run, so that only one run writes to it.

The file `run.lock` names the run, and two things show that this run is alive.
The first is the operating system's lock on the file, which is released however
the process ends. It suffices on one machine, and on file systems that share
locks between machines. The second, for other file systems, is a heartbeat in
the file: a process that finds the name of a run on another machine watches for
a while whether the heartbeat changes (the clocks need not agree).

A bucket (`gs://...`) has no locks, and no way to create a file only if it does
not exist, so there the heartbeat is all. A second run is refused while the
first one beats. After a run that was killed, the next one waits for
`PATIENCE`. If two start at the same moment, the one whose name remains in the
file continues. The other one stops at its next check, at most one beat later;
until then both may have written.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import pathlib
import socket
import threading
import time
import uuid

from cappa_tf.saving.run_folder import open_workdir
from cappa_tf.utils import files

FILE_NAME = "run.lock"
# Seconds between two beats, and without a beat until a run counts as dead.
BEAT = 5.0
PATIENCE = 30.0
# Seconds until a simultaneous write of another machine is visible.
SETTLE = 2.0

# Errors of flock on a file system without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
# The record is always overwritten as a whole, so its length is fixed.
_LENGTH = 512


class WorkdirInUseError(ValueError):
    """Another run is using the folder."""


class RunLock:
    """Context manager that holds the lock on the folder of a run.

    Entering creates the folder if it does not exist, and deletes unfinished
    files that a killed process of this machine has left there. Leaving deletes
    a folder that was created here and is empty.

    Args:
        workdir: The folder.

    Raises:
        WorkdirInUseError: On entering, if another run uses the folder; the
            message names its host and process.
        ValueError: On entering, if the folder cannot be written to.
    """

    def __init__(self, workdir):
        self._workdir = workdir
        self._path = os.path.join(workdir, FILE_NAME)
        self._is_remote = files.is_remote(workdir)
        self._record = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "machine": _machine(),
            "run": uuid.uuid4().hex,
        }
        self._made = not self._is_remote and not os.path.isdir(workdir)
        self._file = self._taken_by = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self):
        open_workdir(self._workdir)
        locked = self._open()
        try:
            self._check_former(self._read(), locked)
            self._write(0)
            if not locked:
                time.sleep(SETTLE)
            self._taken_by = self._other()
            self.check()
            files.remove_abandoned(self._workdir)
        except BaseException:
            _close(self._file)
            raise
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if self._other() is None:
                # A process that has it open notices that it was deleted.
                files.remove(self._path)
        _close(self._file)
        if self._made:
            with contextlib.suppress(OSError):
                os.rmdir(self._workdir)

    def check(self):
        """Checks that the folder still belongs to this run.

        Raises:
            WorkdirInUseError: If another run has taken it over, because this
                one was suspended for too long or the file was deleted.
        """
        # A bucket is slow to answer, so there the last beat has checked.
        other = self._taken_by if self._is_remote else self._other()
        if other is not None:
            raise self._in_use(other)

    def _other(self):
        """The record of a run that has taken over, or None."""
        record = self._read()
        if record and record.get("run") != self._record["run"]:
            return record
        return None

    def _in_use(self, record):
        return WorkdirInUseError(
            "`workdir` must be used by one run at a time. Wait for the other "
            "run, stop it, or choose another folder. Received: "
            f"workdir={str(self._workdir)!r}, which another run is using: "
            f"process {record.get('pid', 'unknown')} on host "
            f"{record.get('host', 'unknown')}, started "
            f"{record.get('started', 'unknown')}"
        )

    def _open(self):
        """Opens the file; returns whether the system's lock on it is held."""
        if self._is_remote:
            return False
        while True:
            try:
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                raise ValueError(
                    "The file that claims `workdir` must be writable. "
                    f"Received: {error}"
                ) from error
            _open_files.add(self._file)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = True
            except BlockingIOError:
                _close(self._file)
                raise self._in_use(self._read_soon()) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    _close(self._file)
                    raise
                locked = False
            # A run that ended in between may have deleted the opened file.
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(self._file), os.stat(self._path)):
                    return locked
            _close(self._file)
            open_workdir(self._workdir)

    def _check_former(self, record, locked):
        """Checks that the run that the file names has ended.

        Args:
            record: The record in the file; None if the file is new.
            locked: Whether the system's lock is held.
        """
        if record is None:
            return
        here = record.get("machine") == self._record["machine"]
        # The holder of the system's lock is the only run on this machine.
        if not (here and locked) and self._beats(record):
            raise self._in_use(record)
        logging.warning(
            "%s was left behind by process %s on host %s, which has ended: "
            "this run takes over the folder",
            self._path,
            record.get("pid", "unknown"),
            record.get("host", "unknown"),
        )

    def _beats(self, record):
        """Watches for a heartbeat of another run; returns whether one came."""
        logging.warning(
            "%s names process %s on host %s: waiting up to %.0f s for its "
            "heartbeat",
            self._path,
            record.get("pid", "unknown"),
            record.get("host", "unknown"),
            PATIENCE,
        )
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            time.sleep(PATIENCE / 30)
            if self._read() not in (None, record):
                return True
        return False

    def _beat(self):
        beat = 0
        while not self._ended.wait(BEAT):
            beat += 1
            with contextlib.suppress(OSError):  # A full disk may be temporary.
                self._taken_by = self._other()
                if self._taken_by is None:
                    self._write(beat)

    def _write(self, beat):
        content = json.dumps({**self._record, "beat": beat}).encode()
        if self._is_remote:
            files.write_bytes(self._path, content)
            return
        # In place, as a new file of this name would not be the locked one.
        os.pwrite(self._file, content.ljust(_LENGTH - 1) + b"\n", 0)
        os.fsync(self._file)

    def _read(self):
        """The record in the file: None if empty, {} if it is not a record."""
        try:
            # Reopened, so that a network file system asks its server.
            content = files.read_bytes(self._path).strip()
            return json.loads(content) if content else None
        except OSError:
            return None
        except ValueError:
            return {}

    def _read_soon(self):
        """The record of a run that has the lock and is about to write it."""
        for _ in range(40):
            record = self._read()
            if record:
                return record
            time.sleep(0.05)
        return {}


def _machine():
    """An identifier of this machine since it was last booted."""
    try:
        path = pathlib.Path("/proc/sys/kernel/random/boot_id")
        return path.read_text().strip()
    except OSError:
        return socket.gethostname()


# A forked child must not keep the system's lock when its parent has ended.
_open_files = set()


def _close(file):
    if file is None:  # In a bucket.
        return
    _open_files.discard(file)
    os.close(file)


def _close_in_child():
    for file in list(_open_files):
        _close(file)


os.register_at_fork(after_in_child=_close_in_child)
