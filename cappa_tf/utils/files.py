"""Atomic file writing and file system access, on disk or in a bucket.

A path that begins with a scheme (`gs://bucket/run`) is remote and is accessed
through `tf.io.gfile`, which supports `gs://`, `ram://` and the schemes of
plug-ins. Any other path is accessed through `os`: TensorFlow is not imported
for it, and names that are not UTF-8, which gfile refuses, are allowed. Errors
are OSErrors in both cases.

    write_json(path, value)           also write_text, write_bytes
    with replacing(path) as name:     a library writes to `name`
        model.save(name)

Everything is written under a temporary name in the same folder and renamed
when it is complete, so that a reader sees either the old file or the new one.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import socket
import tempfile
import time
import uuid

# Prefix of temporary names, followed by host and process.
UNFINISHED = ".incomplete-"


# -- File systems --------------------------------------------------------------


def is_remote(path):
    """Returns whether a path is remote: `gs://...`, `ram://...`."""
    return bool(re.match(r"[A-Za-z][\w+.-]*://", os.fsdecode(path)))


def absolute(path):
    """The absolute path; a remote path is unchanged."""
    return path if is_remote(path) else os.path.abspath(path)


@contextlib.contextmanager
def _remote(path):
    """Yields `tf.io.gfile`, and converts its errors to OSErrors."""
    import tensorflow as tf  # takes seconds, not needed for local files

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
    """Returns whether a path exists."""
    path = os.fspath(path)
    return _ask("exists", path) if is_remote(path) else os.path.exists(path)


def isdir(path):
    """Returns whether a path is a folder."""
    path = os.fspath(path)
    return _ask("isdir", path) if is_remote(path) else os.path.isdir(path)


def isfile(path):
    """Returns whether a path is a file."""
    if is_remote(path):
        return exists(path) and not isdir(path)
    return os.path.isfile(path)


def listdir(path, unfinished=False):
    """Names of the files and folders in a folder.

    Args:
        path: The folder.
        unfinished: Whether temporary names are among them. Their files may be
            half written, and gone the next moment.
    """
    if is_remote(path):
        # Names of folders in a bucket end with a slash.
        names = [name.rstrip("/") for name in _ask("listdir", path)]
    else:
        names = os.listdir(path)
    return [n for n in names if unfinished or not n.startswith(UNFINISHED)]


def makedirs(path):
    """Creates a folder and its parents, unless they exist."""
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
    """Deletes a folder and its contents."""
    if is_remote(path):
        _ask("rmtree", path)
    else:
        shutil.rmtree(path)


def rename(source, target):
    """Renames a file on its file system, replacing any file of that name.

    This is atomic on a disk. An object store copies and deletes, where the
    copy appears atomically.
    """
    if is_remote(source):
        with _remote(source) as gfile:
            gfile.rename(source, target, overwrite=True)
    else:
        os.replace(source, target)


# -- Reading and writing -------------------------------------------------------


def read_bytes(path):
    """Reads a file."""
    if is_remote(path):
        with _remote(path) as gfile, gfile.GFile(path, "rb") as file:
            return file.read()
    with open(path, "rb") as file:
        return file.read()


def read_text(path):
    """Reads a UTF-8 file; any line end becomes a newline."""
    return io.StringIO(read_bytes(path).decode(), newline=None).read()


@contextlib.contextmanager
def on_disk(path):
    """Yields a local path of a file, for libraries that cannot read remote.

    A remote file is copied for the duration of the block.
    """
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as scratch:
        local = os.path.join(scratch, os.path.basename(path))
        _copy(path, local)
        yield local


def sha256(path):
    """Hexadecimal SHA-256 of a file's bytes, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with contextlib.ExitStack() as opened:
        if is_remote(path):
            gfile = opened.enter_context(_remote(path))
            file = opened.enter_context(gfile.GFile(path, "rb"))
        else:
            file = opened.enter_context(open(path, "rb"))
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def folder_on_disk(path):
    """Yields a local path of a folder, as `on_disk` does of a file.

    A remote folder is copied with its subfolders for the duration of the block.
    """
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as scratch:
        _copy_below(path, scratch)
        yield scratch


def write_bytes(path, content):
    """Writes a file atomically; its folder is created if missing."""
    with replacing(path, remote=True) as unfinished:
        if is_remote(path):
            with _remote(path) as gfile, gfile.GFile(unfinished, "wb") as file:
                file.write(content)
        else:
            with open(unfinished, "wb") as file:
                file.write(content)


def write_text(path, text, errors="strict"):
    """Writes a UTF-8 file atomically; its folder is created if missing.

    Args:
        path: Path of the file.
        text: Contents of the file.
        errors: How to encode lone surrogates, which occur in names of files
            that are not UTF-8, as in `str.encode`.
    """
    write_bytes(path, text.encode(errors=errors))


def write_json(path, value, indent=2):
    """Writes JSON and a line end; refuses NaN, which is not valid JSON."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


@contextlib.contextmanager
def replacing(path, remote=False):
    """Yields a temporary name that is renamed to `path` on success.

    Args:
        path: File to write; its folder is created if missing.
        remote: Whether the writer supports remote paths. If not, it writes to
            the local disk, and the file is copied afterwards.

    Yields:
        A path with the same suffix (Keras requires `.keras`), beside `path` if
        possible.
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
def replacing_folder(path, last=(), overwrite=False):
    """Yields a temporary name of a folder that is renamed to `path`.

    A folder on disk appears in one step. Object stores cannot rename folders,
    so there the files appear one by one.

    Args:
        path: The folder; it must not exist unless `overwrite`.
        last: Names in it that are written after all others, so that a reader
            that looks for one of them finds a complete folder.
        overwrite: Whether an existing folder is deleted once the new one is
            complete.

    Yields:
        A local path at which the writer creates the folder.
    """
    path = os.fspath(path)
    if is_remote(path):
        with tempfile.TemporaryDirectory() as scratch:
            unfinished = os.path.join(scratch, os.path.basename(path))
            yield unfinished
            if overwrite and exists(path):
                rmtree(path)
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
            if overwrite and os.path.exists(path):
                old = temporary_name(path)
                os.rename(path, old)
                os.rename(unfinished, path)
                shutil.rmtree(old)
            else:
                os.rename(unfinished, path)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


class LineFile:
    """A text file to which lines are appended, also by several processes.

    On disk a line is appended right away. An object store cannot append, so a
    remote file is rewritten with all its lines, at most once per `period`
    seconds and on `close`.

    Args:
        path: Path of the file, created if missing.
        period: Seconds.
    """

    def __init__(self, path, period=10.0):
        self._path, self._period = path, period
        self._text, self._is_saved = None, True
        self._saved_at = -period

    def append(self, line):
        """Appends a line, passed without a line end."""
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
        """Writes all pending lines; more may still be appended."""
        if not self._is_saved:
            write_text(self._path, self._text)
            self._is_saved, self._saved_at = True, time.monotonic()


# -- Temporary names -----------------------------------------------------------


def temporary_name(path):
    """A unique path beside another, with the same suffix.

    The name begins with a dot, and holds host and process for
    `remove_abandoned`.
    """
    path = os.fspath(path)
    suffix = os.path.splitext(path)[1]
    mark = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
    return _beside(path, f"{_of_this_host()}{mark}{suffix}")


def remove_abandoned(path):
    """Deletes temporary files that killed processes of this host have left."""
    for name in listdir(path, unfinished=True):
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
    """Whether a process with this number runs on this machine."""
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
    """Creates a folder and its parents, and deletes them again on an error.

    Args:
        path: The folder; "" is the working directory. A remote one is not
            deleted, as in a bucket it is only a part of names.
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
    """Creates a folder and tries the operations that will be needed later.

    Args:
        path: The folder.

    Raises:
        OSError: If files cannot be written, replaced, listed or deleted there.
    """
    makedirs(path)
    if not is_remote(path):
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0")
        return
    probe = temporary_name(os.path.join(path, "probe"))
    for content in (b"1", b"2"):
        write_bytes(probe, content)
    is_listed = os.path.basename(probe) in listdir(path, unfinished=True)
    found = read_bytes(probe)
    remove(probe)
    if (found, is_listed) != (b"2", True):
        raise OSError(f"a replaced file does not have its new content: {path}")


def check_output(flag, path, is_folder=False):
    """Checks that an output can be written, before any work is done.

    Args:
        flag: Name of the flag, for the message.
        path: File to write, or folder to write to.
        is_folder: Whether `path` is a folder.

    Raises:
        ValueError: If it is of the other kind, or not in a folder that can be
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
            f"--{flag}={path}, and {above} is not such a folder"
        )


def _beside(path, name):
    # `dirname` would take ram://x to be in a folder "ram:".
    return path[: len(path) - len(os.path.basename(path))] + name


def _parent(path):
    parent = _beside(path, "")
    return parent if is_remote(path) else os.path.dirname(path)


def _copy(source, target):
    with _remote(source if is_remote(source) else target) as gfile:
        gfile.copy(source, target, overwrite=True)


def _copy_below(path, local):
    """Copies a remote folder to a local one."""
    for name in listdir(path):
        source, target = os.path.join(path, name), os.path.join(local, name)
        if isdir(source):
            os.mkdir(target)
            _copy_below(source, target)
        else:
            _copy(source, target)


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
