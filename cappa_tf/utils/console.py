"""Console output of a program: its own lines, and one line for an error.

A tool is started with `run(main, define_flags)`, before TensorFlow is imported.
Messages of TensorFlow's C++ code for its own developers are then hidden;
everything else (warnings, errors, the output of a crash) is passed on.
"""

import atexit
import codecs
import contextlib
import faulthandler
import json
import logging as levels
import os
import re
import signal
import sys
import time

from absl import app, logging

from cappa_tf.utils import cpu

# Python modules whose messages below WARNING are for their own developers.
# gin's reader logs an error for a path that is found in the next folder.
_TENSORFLOW = f"{os.sep}tensorflow{os.sep}python{os.sep}"
_GIN_READER = os.path.join("gin", "resource_reader.py")

# Exit code of a program whose output pipe was closed: 128 + SIGPIPE.
_PIPE_CLOSED = 141


def run(main, define_flags):
    """Runs a tool and ends the program.

    Args:
        main: Function of the arguments other than flags (the program's name
            first) that returns the exit code.
        define_flags: Function that defines the tool's flags.
    """
    cpu.prepare()
    keep_what_cannot_be_encoded()
    hide_native_info()
    hide_tensorflow_info()
    define_flags()

    def start(argv):
        # absl makes it write around the pipe of `hide_native_info`, in pieces,
        # so that lines from the pipe would appear inside of its own.
        if faulthandler.is_enabled():
            faulthandler.enable(2)
        return main(argv)

    try:
        try:
            app.run(start)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes stdout again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(_PIPE_CLOSED)


@contextlib.contextmanager
def errors_as_lines(tool, *kinds):
    """Ends the program with a message in place of a traceback.

    Errors that a person can fix (a flag, a file, its contents) are of a few
    kinds; any other error is a bug of this program and keeps its traceback.

    Args:
        tool: Name at the beginning of the message.
        *kinds: Further exception classes.

    Raises:
        SystemExit: In place of the error.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # `run` ends quietly.
    except KeyboardInterrupt:
        raise SystemExit(f"{tool}: interrupted; run it again") from None
    except Exception as error:
        known = (ValueError, OSError, ImportError, *kinds)
        # If it is not imported, it cannot have raised the error.
        tensorflow = sys.modules.get("tensorflow")
        if tensorflow is not None:
            known = (*known, tensorflow.errors.OpError)
        if not isinstance(error, known):
            raise
        raise SystemExit(f"{tool}: {message(error)}") from error


@contextlib.contextmanager
def naming(flag, value):
    """Prefixes the message of an error with the flag that caused it."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"--{flag}={value}: {message(error)}") from error


def message(error):
    """The text of an error, without the position that gin adds."""
    text = getattr(error, "message", None) or str(error)
    text = str(text).partition("\n  In call to configurable")[0]
    return text or type(error).__name__


# -- Text ----------------------------------------------------------------------


def keep_what_cannot_be_encoded():
    """Makes stdout escape characters that the terminal cannot encode.

    stderr does so already. Otherwise a file name in Japanese would end a
    program whose locale is ASCII, and one that is not UTF-8 any program.
    """
    if sys.stdout is not None:  # It is None if started without a stdout.
        sys.stdout.reconfigure(errors="backslashreplace")


def json_line(values):
    """Formats a JSON object as a line that stdout can encode."""
    line = json.dumps(values, ensure_ascii=False)
    try:
        codecs.encode(line, sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return json.dumps(values)
    return line


# -- TensorFlow's own messages -------------------------------------------------


def hide_tensorflow_info():
    """Hides messages for TensorFlow's developers from the log.

    These are of level INFO: how long sharding took, how inputs were renamed.
    They come with every checkpoint and break the progress bar. TensorFlow's
    warnings and this project's messages remain. Messages about the folders in
    which gin looks for a file are hidden, too; if it is not found at all, that
    is an error of its own.
    """
    handler = logging.get_absl_handler().python_handler
    # absl keeps the stream that existed when it was imported.
    if getattr(handler, "stream", None) is sys.__stderr__:
        handler.stream = sys.stderr
    # On the handler, as TensorFlow logs under two names, one of them absl's.
    handler.addFilter(_is_wanted)


def _is_wanted(record):
    if record.pathname.endswith(_GIN_READER):
        return False
    return record.levelno > levels.INFO or _TENSORFLOW not in record.pathname


# "I0000 00:00:1795665247.305868    7471 cudart_stub.cc:31] ..." and
# "2026-11-26 03:54:07.305868: I tensorflow/core/util/port.cc:153] ..."
_NATIVE = re.compile(
    rb"(?:\x1b\[\w*m)?"
    rb"(?:([IWEF])\d{4} \d\d:\d\d:[\d.]+ +\d+|[\d-]{10} [\d:.]+: ([IWEF])) "
    rb"\S+\.(?:cc|cpp|cu|h|hpp|mm):\d+\] "
)
# Harmless messages of a higher level: TensorFlow's libraries register the same
# plug-ins twice, look for a GPU driver without a GPU (303: the driver's library
# is missing; NO_DEVICE: it finds no GPU), mark the operations of tf.data with
# an attribute that these do not have, and compute bfloat16 without oneDNN where
# it cannot.
_HARMLESS = re.compile(
    rb"Unable to register cu\w+ factory"
    rb"|computation placer already registered"
    rb"|failed call to cuInit: .*(\(303\)|CUDA_ERROR_NO_DEVICE)"
    rb"|NodeDef mentions attribute use_unbounded_threadpool"
    rb"|Cannot dlopen some GPU libraries"
    rb"|Could not find TensorRT"
    rb"|TF-TRT Warning"
    rb"|oneDNN supports DT_\w+ only on platforms with"
)
# Lines without a level of their own.
_NOTES = (
    b"WARNING: All log messages before absl::InitializeLog() is called",
    b"To enable the following instructions:",
    b"Skipping registering GPU devices...",
)


def hide_native_info():
    """Hides messages of level INFO that C++ code writes to stderr.

    TensorFlow's libraries write to file descriptor 2 as soon as they are
    loaded, some before they read TF_CPP_MIN_LOG_LEVEL. The descriptor becomes
    a pipe to a small process that passes on all other lines. It lives as long
    as anything may write to it, so that the last output of a crash is not
    lost. Python's own `sys.stderr` bypasses it.

    If TF_CPP_MIN_LOG_LEVEL is 0, or a TF_CPP_*VLOG variable is set, nothing is
    hidden.
    """
    asked = os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "0"
    if asked or {"TF_CPP_MAX_VLOG_LEVEL", "TF_CPP_VMODULE"} & {*os.environ}:
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        terminal = os.dup(2)
    except OSError:  # The program was started without a stderr.
        return
    reader, writer = os.pipe()
    sys.stderr.flush()
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        os.close(writer)
        _pass_on(reader, terminal)
    os.close(reader)
    os.dup2(writer, 2)
    os.close(writer)
    sys.stderr = sys.__stderr__ = open(  # noqa: SIM115 (as long as the program)
        terminal,
        "w",
        buffering=1,
        encoding=sys.stderr.encoding,
        errors=sys.stderr.errors,
    )
    atexit.register(_end_passing_on, process, terminal)


def _end_passing_on(process, terminal):
    """Waits for the last lines, so that none appears after the prompt."""
    os.dup2(terminal, 2)
    for _ in range(100):
        if os.waitpid(process, os.WNOHANG) != (0, 0):
            return
        time.sleep(0.005)  # Another process still has the pipe open.


def _pass_on(reader, terminal):
    """Passes lines from one descriptor to the other; the small process."""
    # It ends after the last writer, and ignores signals from the terminal.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for other in range(3):
        os.close(other)
    with contextlib.suppress(OSError), open(terminal, "wb") as output:
        for line in open(reader, "rb"):  # noqa: SIM115 (the process ends)
            if is_for_people(line):
                output.write(line)
                output.flush()
    os._exit(0)


def is_for_people(line):
    """Returns whether a line that C++ code wrote is meant for users.

    Args:
        line: Bytes.
    """
    if line.startswith(_NOTES):
        return False
    match = _NATIVE.match(line)
    if match is None:
        return True
    level = match[1] or match[2]
    return level != b"I" and not _HARMLESS.search(line)
