"""What lies in a folder, on disk or in a bucket."""

import os
import re

import tensorflow as tf

from cappa_tf.data.images import formats

# macOS writes one of these beside each file on a foreign file system.
_COMPANION = "._"


def walk(root):
    """Goes through a folder and all folders below it, in sorted order.

    Links to folders are followed. A folder that can be reached in several
    ways is given once, so that a loop of links ends.

    Args:
        root: The folder.

    Yields:
        (folder, names of the files in it), as `os.walk` gives them: a name
        that is not UTF-8 holds halves of pairs. macOS's companions of files
        (._NAME) are left out.
    """
    # os.walk gives local names that are not UTF-8, too; gfile.walk fails.
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
    """Names of what lies in a folder, sorted; as `walk` has them."""
    local = os.path.isdir(folder)
    found = os.listdir(folder) if local else tf.io.gfile.listdir(folder)
    return sorted(
        name.rstrip("/") for name in found if not name.startswith(_COMPANION)
    )


def is_image(name):
    """Whether a file is an image by its name."""
    return name.lower().endswith(formats.EXTENSIONS)


def is_file(path):
    """Whether there is such a file."""
    return tf.io.gfile.exists(path) and not tf.io.gfile.isdir(path)


def escape_glob(path):
    r"""A pattern that stands for this path alone: [1] becomes \[1\]."""
    return re.sub(r"([\\*?\[\]])", r"\\\1", path)
