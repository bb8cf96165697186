"""Files that are finished or not there."""

import contextlib
import os


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary name that becomes `path` when all went well.

    Args:
        path: File to write; its folder must exist.

    Yields:
        A path beside it, with the same suffix (Keras asks for `.keras`).
    """
    stem, suffix = os.path.splitext(os.fspath(path))
    unfinished = f"{stem}.incomplete{suffix}"
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(unfinished)
        raise
