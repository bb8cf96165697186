"""Files that are written whole or not at all, on disk or in a bucket.

A path that begins with a scheme (`gs://bucket/run`) is remote and goes through
`tf.io.gfile`, which knows `gs://`, `ram://` and what plug-ins register. Any
other path goes through `os`: TensorFlow is not imported for it, and names that
are not UTF-8, which gfile refuses, are fine. What fails is an OSError on both.

    write_json(path, value)           also write_text, write_bytes
    with replacing(path) as name:     a library writes to `name`
        model.save(name)

Everything is written under a temporary name in the same folder, which becomes
the right one when all is there: whoever looks sees the old file or the new.
"""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import socket
import tempfile
import time
import uuid

# Begins the names of what is being written. Host and process follow.
UNFINISHED = ".incomplete-"


# -- File systems --------------------------------------------------------------


def is_remote(path):
    """Whether a path is TensorFlow's to open: `gs://...`, `ram://...`."""
    return bool(re.match(r"[A-Za-z][\w+.-]*://", os.fsdecode(path)))


def absolute(path):
    """The path from the root; a remote one is that already."""
    return path if is_remote(path) else os.path.abspath(path)


@contextlib.contextmanager
def _remote(path):
    """`tf.io.gfile`, whose errors become those of a disk."""
    import tensorflow as tf  # Seconds; not for local files.

    try:
        yield tf.io.gfile
    except tf.errors.NotFoundError as error:
        missing = errno.ENOENT
        raise FileNotFoundError(missing, os.strerror(missing), path) from error
    except tf.errors.OpError as error:
        raise OSError(f"{error.message or error}: {path!r}") from error


def _ask(question, path):
    with _remote(path) as gfile:
        return getattr(gfile, question)(path)


def exists(path):
    """Whether there is a file or a folder."""
    path = os.fspath(path)
    return _ask("exists", path) if is_remote(path) else os.path.exists(path)


def isdir(path):
    """Whether there is such a folder."""
    path = os.fspath(path)
    return _ask("isdir", path) if is_remote(path) else os.path.isdir(path)


def isfile(path):
    """Whether there is such a file."""
    if is_remote(path):
        return exists(path) and not isdir(path)
    return os.path.isfile(path)


def listdir(path):
    """Names of what is in a folder."""
    if not is_remote(path):
        return os.listdir(path)
    # Names of folders in a bucket end with a slash.
    return [name.rstrip("/") for name in _ask("listdir", path)]


def makedirs(path):
    """Makes a folder and its parents, unless they are there."""
    if not is_remote(path):
        os.makedirs(path, exist_ok=True)
    elif not re.fullmatch(r"[^/]+//[^/]*/?", path):  # A bucket.
        _ask("makedirs", path)


def remove(path):
    """Deletes a file."""
    if is_remote(path):
        _ask("remove", path)
    else:
        os.remove(path)


def rmtree(path):
    """Deletes a folder and all that is in it."""
    if is_remote(path):
        _ask("rmtree", path)
    else:
        shutil.rmtree(path)


def rename(source, target):
    """Gives a file another name on its file system, replacing what has it.

    In one step on a disk. An object store copies and deletes, and the copy
    appears whole.
    """
    if is_remote(source):
        with _remote(source) as gfile:
            gfile.rename(source, target, overwrite=True)
    else:
        os.replace(source, target)


# -- Reading and writing -------------------------------------------------------


def read_bytes(path):
    """The content of a file."""
    if is_remote(path):
        with _remote(path) as gfile, gfile.GFile(path, "rb") as file:
            return file.read()
    with open(path, "rb") as file:
        return file.read()


def read_text(path):
    """The content of a file of UTF-8; any line end becomes a newline."""
    return io.StringIO(read_bytes(path).decode(), newline=None).read()


@contextlib.contextmanager
def on_disk(path):
    """Yields a path of the file on this machine's disk, to read from.

    For libraries that cannot read remote ones: these are copied for the time.
    """
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as scratch:
        local = os.path.join(scratch, os.path.basename(path))
        _copy(path, local)
        yield local


def write_bytes(path, content):
    """Writes a file; its folder is made if it is not there."""
    with replacing(path, remote=True) as unfinished:
        if is_remote(path):
            with _remote(path) as gfile, gfile.GFile(unfinished, "wb") as file:
                file.write(content)
        else:
            with open(unfinished, "wb") as file:
                file.write(content)


def write_text(path, text, errors="strict"):
    """Writes a file of UTF-8; see `write_bytes`.

    Args:
        path: The file.
        text: Its content.
        errors: What to do with halves of pairs, which names of files that are
            not UTF-8 have; see `str.encode`.
    """
    write_bytes(path, text.encode(errors=errors))


def write_json(path, value, indent=2):
    """Writes JSON with a line end; refuses NaN, which is not JSON."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


@contextlib.contextmanager
def replacing(path, remote=False):
    """Yields a temporary name that becomes `path` when all went well.

    Args:
        path: File to write; its folder is made if it is not there.
        remote: Whether the writer can write to remote paths. One that cannot
            writes to this machine's disk, and its file is then copied.

    Yields:
        A path with the same suffix (Keras asks for `.keras`), beside `path`
        if it can be.
    """
    path = os.fspath(path)
    if is_remote(path) and not remote:
        with tempfile.TemporaryDirectory() as scratch:
            local = os.path.join(scratch, os.path.basename(path))
            yield local
            with replacing(path, remote=True) as unfinished:
                _copy(local, unfinished)
        return
    with folder(_parent(path)):
        unfinished = temporary_name(path)
        try:
            yield unfinished
            rename(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                remove(unfinished)
            raise


@contextlib.contextmanager
def replacing_folder(path, last=()):
    """Yields a name for a folder that becomes `path`, which is not there yet.

    A folder on disk appears in one step. Object stores have no folders that
    could be renamed: there the files come one by one.

    Args:
        path: The folder.
        last: Names in it that come after all others, so that a reader who
            asks for one of them first finds the folder whole.

    Yields:
        A path on this machine's disk, at which the writer makes the folder.
    """
    path = os.fspath(path)
    if is_remote(path):
        with tempfile.TemporaryDirectory() as scratch:
            unfinished = os.path.join(scratch, os.path.basename(path))
            yield unfinished
            try:
                _copy_folder(unfinished, path, last)
            except BaseException:
                with contextlib.suppress(OSError):
                    rmtree(path)
                raise
        return
    with folder(_parent(path)):
        unfinished = temporary_name(path)
        try:
            yield unfinished
            os.rename(unfinished, path)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


class LineFile:
    """A text file that grows by lines, also over several processes.

    On disk a line is appended at once. An object store has no appending, so a
    remote file is written anew with all its lines: no more than once in
    `period` seconds, and on `close`.

    Args:
        path: The file, made if it is not there.
        period: Seconds.
    """

    def __init__(self, path, period=10.0):
        self._path, self._period = path, period
        self._text, self._is_saved = None, True
        self._saved_at = -period

    def append(self, line):
        """Adds a line, given without its end."""
        if not is_remote(self._path):
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
            return
        if self._text is None:
            found = exists(self._path)
            self._text = read_text(self._path) if found else ""
        self._text += line + "\n"
        self._is_saved = False
        if time.monotonic() - self._saved_at >= self._period:
            self.close()

    def close(self):
        """Writes what is not written yet; lines may still follow."""
        if not self._is_saved:
            write_text(self._path, self._text)
            self._is_saved, self._saved_at = True, time.monotonic()


# -- Temporary names -----------------------------------------------------------


def temporary_name(path):
    """A path beside another, with the same suffix, that nobody else uses.

    It begins with a dot, and tells host and process to `remove_abandoned`.
    """
    path = os.fspath(path)
    suffix = os.path.splitext(path)[1]
    mark = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return _beside(path, f"{_of_this_host()}{mark}{suffix}")


def remove_abandoned(path):
    """Deletes from a folder what killed processes of this host left in it."""
    for name in listdir(path):
        if not name.startswith(_of_this_host()):
            continue
        if _is_running(name.removeprefix(_of_this_host()).split("-")[0]):
            continue
        left = os.path.join(path, name)
        with contextlib.suppress(OSError):
            (rmtree if isdir(left) else remove)(left)


def _of_this_host():
    host = re.sub(r"[^\w.]", "_", socket.gethostname())
    return f"{UNFINISHED}{host}-"


def _is_running(pid):
    """Whether a process of this number lives on this machine."""
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (ValueError, OSError):
        return False
    return True


# -- Folders -------------------------------------------------------------------


@contextlib.contextmanager
def folder(path):
    """Makes a folder and its parents, which go again where nothing is written.

    Args:
        path: The folder; "" is the working directory. A remote one stays: in
            a bucket it is no more than a part of names.
    """
    if is_remote(path):
        if not isdir(path):
            makedirs(path)
        yield
        return
    missing, above = [], os.path.abspath(path)
    while not os.path.exists(above):
        missing.append(above)
        above = os.path.dirname(above)
    os.makedirs(os.path.abspath(path), exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for made in missing:
                os.rmdir(made)
        raise


def check_folder(path):
    """Makes a folder and does in it what will be done later.

    Args:
        path: The folder.

    Raises:
        OSError: Files cannot be written, replaced, listed or deleted there.
    """
    makedirs(path)
    if not is_remote(path):
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0")
        return
    probe = temporary_name(os.path.join(path, "probe"))
    for content in (b"1", b"2"):
        write_bytes(probe, content)
    found = read_bytes(probe), os.path.basename(probe) in listdir(path)
    remove(probe)
    if found != (b"2", True):
        raise OSError(f"a file that was replaced is not found as it is: {path}")


def check_output(flag, path, is_folder=False):
    """Refuses what cannot be written, before any work is done for it.

    Args:
        flag: Name of the flag, for the message.
        path: File to write, or folder to write to.
        is_folder: Which of them it is.

    Raises:
        ValueError: It is the other one, or is in no folder that can be
            written to.
    """
    try:
        is_other = exists(path) and isdir(path) != is_folder
        if is_remote(path) and not is_other:
            check_folder(path if is_folder else _parent(path))
    except OSError as error:
        raise ValueError(
            f"--{flag} must be in a folder that can be written to. Received: "
            f"--{flag}={path} ({error})"
        ) from error
    if is_other:
        kinds = ("a file", "a folder")
        raise ValueError(
            f"--{flag} must be {kinds[is_folder]}. Received: --{flag}={path}, "
            f"which is {kinds[not is_folder]}"
        )
    if is_remote(path):
        return
    above = os.path.abspath(path if is_folder else os.path.dirname(path))
    while not os.path.exists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above) or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(
            f"--{flag} must be in a folder that can be written to. Received: "
            f"--{flag}={path}, and {above} cannot"
        )


def _beside(path, name):
    # Not by `dirname`, which takes ram://x to be in a folder "ram:".
    return path[: len(path) - len(os.path.basename(path))] + name


def _parent(path):
    parent = _beside(path, "")
    return parent if is_remote(path) else os.path.dirname(path)


def _copy(source, target):
    with _remote(source if is_remote(source) else target) as gfile:
        gfile.copy(source, target, overwrite=True)


def _copy_folder(local, path, last):
    found = [
        os.path.relpath(os.path.join(above, name), local)
        for above, _, names in os.walk(local)
        for name in names
    ]
    for name in sorted(found, key=lambda name: (name in last, name)):
        target = os.path.join(path, name)
        makedirs(_parent(target))
        _copy(os.path.join(local, name), target)
