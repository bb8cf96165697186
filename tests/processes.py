"""Training runs in separate processes, which tests combine and kill.

They are forked from a server that has imported TensorFlow but not used it:
a fork needs no import, and may still choose its devices.
"""

import contextlib
import json
import multiprocessing
import os
import pathlib
import socket
import sys

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["small_run"])


class Process:
    """One process, whose output goes to a file.

    Args:
        function: Importable function.
        *args: Its arguments.
        log: Path of the file.
        environment: Dict of variables to set there.
    """

    def __init__(self, function, *args, log, environment=None):
        self._log = pathlib.Path(log)
        self._process = _context.Process(
            target=_main, args=(function, args, str(log), environment or {})
        )
        with _importable():
            self._process.start()

    @property
    def output(self):
        """Its output so far."""
        return self._log.read_text() if self._log.exists() else ""

    @property
    def pid(self):
        return self._process.pid

    @property
    def running(self):
        return self._process.is_alive()

    def wait(self, timeout=600):
        """Its exit code; fails the test if it takes longer than `timeout`."""
        self._process.join(timeout)
        if self.running:
            self._process.kill()
            raise AssertionError(f"still running:\n{self.output}")
        return self._process.exitcode

    def kill(self):
        """Kills the process with SIGKILL."""
        self._process.kill()
        self._process.join()


def start_workers(count, function, *args, folder, **kwargs):
    """Starts processes that find each other by TF_CONFIG.

    Args:
        count: How many.
        function: Called in each with its number, then `args`.
        *args: Further arguments.
        folder: Where their output goes.
        **kwargs: See `Process`.
    """
    addresses = [f"127.0.0.1:{port}" for port in _free_ports(count)]
    workers = []
    for i in range(count):
        config = {
            "cluster": {"worker": addresses},
            "task": {"type": "worker", "index": i},
        }
        workers.append(
            Process(
                function,
                i,
                *args,
                log=pathlib.Path(folder) / f"worker-{i}.txt",
                environment={"TF_CONFIG": json.dumps(config)},
                **kwargs,
            )
        )
    return workers


def _free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def _importable():
    """Passes this process's module path to the server."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _main(function, args, log, environment):
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    function(*args)
