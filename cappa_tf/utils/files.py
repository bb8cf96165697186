"""Files and folders that are finished or not there."""

import contextlib
import os


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary name that becomes `path` when all went well.

    Args:
        path: File to write; its folder is made if it is not there.

    Yields:
        A path beside it, with the same suffix (Keras asks for `.keras`).
    """
    stem, suffix = os.path.splitext(os.fspath(path))
    unfinished = f"{stem}.incomplete{suffix}"
    with folder(os.path.dirname(path)):
        try:
            yield unfinished
            os.replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.remove(unfinished)
            raise


@contextlib.contextmanager
def folder(path):
    """Makes a folder and its parents, which go again where nothing is written.

    Args:
        path: The folder; "" is the working directory.
    """
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


def check_output(flag, path, is_folder=False):
    """Refuses what cannot be written, before any work is done for it.

    Args:
        flag: Name of the flag, for the message.
        path: File to write, or folder to write to. An address in a bucket is
            not looked at.
        is_folder: Which of them it is.

    Raises:
        ValueError: It is the other one, or is in no folder that can be
            written to.
    """
    if "://" in path:
        return
    if os.path.exists(path) and os.path.isdir(path) != is_folder:
        kinds = ("a file", "a folder")
        raise ValueError(
            f"--{flag} must be {kinds[is_folder]}. Received: --{flag}={path}, "
            f"which is {kinds[not is_folder]}"
        )
    above = os.path.abspath(path if is_folder else os.path.dirname(path))
    while not os.path.exists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above) or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(
            f"--{flag} must be in a folder that can be written to. Received: "
            f"--{flag}={path}, and {above} cannot"
        )
