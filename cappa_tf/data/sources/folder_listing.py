"""Listing of folders, on disk or in a bucket."""

import os
import re

import tensorflow as tf

from cappa_tf.data.images import formats

# macOS writes one of these beside each file on a foreign file system.
_COMPANION = "._"


def walk(root):
    """Walks a folder and all folders below it, in sorted order.

    Links to folders are followed. A folder that can be reached in several
    ways is listed once, so that a cycle of links ends.

    Args:
        root: The folder.

    Yields:
        (folder, names of the files in it), with names as in `os.walk`: one
        that is not UTF-8 contains lone surrogates. macOS's companion files
        (._NAME) are left out.
    """
    # os.walk supports local names that are not UTF-8; gfile.walk fails.
    local = os.path.isdir(root)
    seen = set()
    found = os.walk(root, followlinks=True) if local else _walk_remote(root)
    for folder, folders, files in found:
        if local:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
        folders.sort()
        yield (
            folder,
            sorted(name for name in files if not name.startswith(_COMPANION)),
        )


def _walk_remote(root):
    for folder, folders, files in tf.io.gfile.walk(root):
        # Their names may end with a slash.
        folders[:] = [name.rstrip("/") for name in folders]
        yield folder, folders, files


def names(folder):
    """Sorted names of files and folders in a folder, as in `walk`."""
    local = os.path.isdir(folder)
    found = os.listdir(folder) if local else tf.io.gfile.listdir(folder)
    return sorted(
        name.rstrip("/") for name in found if not name.startswith(_COMPANION)
    )


def is_image(name):
    """Returns whether a file's name has the suffix of an image."""
    return name.lower().endswith(formats.EXTENSIONS)


def is_file(path):
    """Returns whether a path is an existing file."""
    return tf.io.gfile.exists(path) and not tf.io.gfile.isdir(path)


def escape_glob(path):
    r"""A pattern that matches only this path: [1] becomes \[1\]."""
    return re.sub(r"([\\*?\[\]])", r"\\\1", path)
