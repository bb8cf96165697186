"""Index of shards that do not tell their number of records.

tar shards and foreign TFRecords do not tell how many records they hold. They
are scanned when they are first opened, and the result is stored in a hidden
folder beside them (or in the user's cache folder if that is not writable):

    .cappa_index/<digest of pattern and settings>/index.json

From then on the index defines the data set, as dataset.json does for prepared
data: a shard that is missing or shorter has lost records, each at its position;
a shard that has grown, or a new one, is an error until the index is deleted. So
the order of a run cannot change unnoticed.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import os
import re
import time

import tensorflow as tf
from absl import logging

from cappa_tf.data import description
from cappa_tf.data.sources import folder_listing
from cappa_tf.data.stream import bad_records
from cappa_tf.utils import files

# Reason for the lost records of a shard that cannot be scanned to its end.
DAMAGED = "damaged shard"
# Problem of a tar that ends after a complete file, without the final zeros.
NO_MARK = "ends without a mark"
_FOLDER = ".cappa_index"
# Suffixes of tables of images (`tables.SUFFIXES`), and of lists.
_TABLES = (".csv", ".json", ".jsonl", ".parquet", ".tsv", ".txt")
_VERSION = 2
_THREADS = 8
_SECONDS_BETWEEN_SAVES = 30


@dataclasses.dataclass(frozen=True)
class Files:
    """The existing shards of a split.

    Attributes:
        root: Folder above all of them, independent of which exist.
        pattern: Pattern of the shards, relative to `root`.
        paths: Sorted paths of the shards.
    """

    root: str
    pattern: str
    paths: list[str]


@dataclasses.dataclass(frozen=True)
class IndexedShard:
    """Result of the scan of one file.

    Attributes:
        path: Full path of the file.
        num_examples: Number of records in it.
        num_bytes: Size of the file.
        max_captions: Maximum number of captions of a record, or None if
            unknown.
        problems: Dict reason -> (count, name of the first). The count of
            `DAMAGED` is 0 for a truncated shard, as only other shards can tell
            how much it held.
    """

    path: str
    num_examples: int
    num_bytes: int
    max_captions: int | None
    problems: dict


class Index:
    """Shards of one split, as they were when first opened.

    Args:
        shard_files: `Files`, the shards that exist now.
        settings: JSON-able value of everything else the index depends on.
        scan: Function of (path of a shard, path of a file it may write) that
            returns (number of records, maximum number of captions or None,
            problems).

    Attributes:
        shards: List of `IndexedShard`.
        digest: Hexadecimal digest of pattern and settings.
    """

    def __init__(self, shard_files, settings, scan):
        self._files = shard_files.paths
        self._root = shard_files.root
        text = json.dumps([_VERSION, shard_files.pattern, settings])
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        self._folder = self._find_folder()
        entries = self._load()
        if entries is None:
            entries = self._build(scan)
        self.shards = [
            IndexedShard(os.path.join(self._root, name), *entry)
            for name, entry in entries.items()
        ]
        if not sum(shard.num_examples for shard in self.shards):
            problems = [s.problems for s in self.shards if s.problems][:3]
            raise ValueError(
                f"The shards of a split must hold records. Received: "
                f"{self._files[0]} and {len(self._files) - 1} more, without "
                f"any {problems or ''}"
            )

    def companion(self, path):
        """Path of the file that `scan` may write for a shard."""
        name = self._name(path).replace("/", "_")
        return os.path.join(self._folder, f"{name}.records")

    def check(self, counter):
        """Compares the files with the index, as in `base.Records.check`."""
        advice = (
            f"Restore the files, or delete the index {self._folder} to start "
            "again with the existing files."
        )
        known = {shard.path for shard in self.shards}
        new = [path for path in self._files if path not in known]
        if new:
            raise ValueError(
                f"{len(new)} shards were added since the data were indexed: "
                f"{', '.join(new[:3])}. {advice}"
            )
        wrong = [
            (shard, size)
            for shard, size in zip(self.shards, self._sizes())
            if size != shard.num_bytes
        ]
        listed = ", ".join(
            f"{os.path.basename(shard.path)} had {shard.num_bytes} bytes and "
            f"has {size}"
            for shard, size in wrong[:5]
        )
        bad_records.check_shards(
            wrong,
            f"{len(wrong)} shards changed since they were indexed: {listed}. "
            + advice,
            sum(shard.num_examples for shard in self.shards),
            counter.max_fraction,
        )
        # If all shards lack the mark, their writer omits it.
        unmarked = len(self.shards) > 1 and all(
            shard.problems.get(DAMAGED, (0, ""))[1] == NO_MARK
            for shard in self.shards
        )
        for shard in self.shards:
            for reason, (count, name) in shard.problems.items():
                if name == NO_MARK and unmarked:
                    continue
                name = f"{shard.path}: {name}"
                if reason == DAMAGED and not count:
                    count, why = self._lost(shard)
                    name = f"{name}; {count} records count as lost, {why}"
                counter.add(reason, name, count=count)

    def _lost(self, shard):
        """Number of records lost by a truncated shard, and its reason."""
        whole = [
            other.num_examples
            for other in self.shards
            if DAMAGED not in other.problems
        ]
        usual = max(whole, default=0)
        if usual >= shard.num_examples:
            return (
                max(1, usual - shard.num_examples),
                f"as another shard holds {usual}",
            )
        # Unknown. Stopping a run is better than hiding a loss.
        return (
            max(1, shard.num_examples),
            "as many as it still holds, since no complete shard tells more",
        )

    def _sizes(self):
        paths = [shard.path for shard in self.shards]
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(description.file_size, paths))

    def _find_folder(self):
        """The folder of an existing index, or a new one."""
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        root = hashlib.sha256(os.path.abspath(self._root).encode()).hexdigest()
        folders = [
            os.path.join(self._root, _FOLDER, self.digest),
            os.path.join(
                os.path.expanduser(cache),
                "cappa_tf",
                f"index-{root[:12]}-{self.digest}",
            ),
        ]
        for folder in folders:
            if tf.io.gfile.exists(os.path.join(folder, "index.json")):
                return folder
        for folder in folders:
            try:
                files.check_folder(folder)
            except OSError as error:
                logging.info("No index in %s: %s", folder, error)
                continue
            return folder
        raise ValueError(
            "An index must be written beside the data or in the cache folder "
            f"($XDG_CACHE_HOME). Received: {folders}, neither is writable"
        )

    def _load(self):
        """Dict name -> entry of a complete index, or None."""
        path = os.path.join(self._folder, "index.json")
        if not tf.io.gfile.exists(path):
            return None
        with tf.io.gfile.GFile(path) as file:
            content = json.loads(file.read())
        self._done = content["shards"]
        return self._done if content["complete"] else None

    def _build(self, scan):
        """Scans the shards not indexed yet; resumes after an interruption."""
        entries = getattr(self, "_done", {})
        names = [self._name(path) for path in self._files]
        to_do = [
            (name, path)
            for name, path in zip(names, self._files)
            if name not in entries
        ]
        logging.info("%s: indexing %d shards", self._folder, len(to_do))

        def entry(item):
            name, path = item
            size = description.file_size(path)
            return name, [scan(path, self.companion(path)), size]

        saved = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            for name, (found, size) in pool.map(entry, to_do):
                count, max_captions, problems = found
                entries[name] = [count, size, max_captions, problems]
                if time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
                    self._save(entries, complete=False)
                    saved = time.monotonic()
        entries = {name: entries[name] for name in names}
        self._save(entries, complete=True)
        return entries

    def _save(self, entries, complete):
        path = os.path.join(self._folder, "index.json")
        content = {"complete": complete, "shards": entries}
        # Several hosts may write at the same time, with the same content.
        files.write_json(path, content, indent=None)

    def _name(self, path):
        """A shard's path relative to the data, which may be moved."""
        return path.removeprefix(self._root).lstrip("/")


def estimate(count, end, size):
    """Estimates how many records the rest of a shard holds.

    Args:
        count: Number of records before the damage.
        end: Size of these in bytes.
        size: Size of the shard in bytes.

    Returns:
        Number of records of average size, at least 1.
    """
    return max(1, math.ceil((size - end) * count / max(end, 1)))


def open_binary(path):
    """Opens a local or remote file for reading.

    A local file is opened by Python's own `open`, which is faster than
    TensorFlow's for scans with many seeks.
    """
    if files.is_remote(path):
        return _Remote(path, "rb")
    return open(path, "rb")


class _Remote(tf.io.gfile.GFile):
    """Remote file whose `seek` returns the position, like other files."""

    def seek(self, offset=0, whence=0):
        super().seek(offset, whence)
        return self.tell()


def find_files(path, split, suffix):
    """Lists the shards of a split.

        "data/{split}-*.tar"               any pattern with {split}
        {"train": "a/{00000..00127}.tar"}  a pattern for each split
        "data"                             data/train-*.tar, data/train/*.tar

    Args:
        path: One of these.
        split: Name of the split.
        suffix: Suffix of a shard, such as ".tar".

    Returns:
        `Files`.

    Raises:
        ValueError: If there is no such split, or it has no shards.
    """
    if isinstance(path, dict):
        if split not in path:
            raise ValueError(
                f"`split` must be one of {list(path)}. Received: {split!r}"
            )
        patterns = [os.fspath(path[split])]
    elif "{split}" in os.fspath(path):
        patterns = [os.fspath(path).replace("{split}", split)]
    elif tf.io.gfile.isdir(path):
        patterns = [f"{path}/{split}-*{suffix}", f"{path}/{split}/*{suffix}"]
    else:
        raise ValueError(
            "`path` must tell the shards of a split: a pattern with {split}, "
            "a dict from split to pattern, or a folder with "
            f"<split>-*{suffix} or <split>/*{suffix}. Received: "
            f"path={path!r}, which is not a folder that exists"
        )
    found, absent = [], []
    for pattern in patterns:
        if tf.io.gfile.isdir(pattern):
            pattern = os.path.join(pattern, f"*{suffix}")
        for name in _expand_braces(pattern):
            folder, rest = _literal_folder(name)
            try:
                matches = tf.io.gfile.glob(
                    folder_listing.escape_glob(folder) + rest
                )
            except UnicodeDecodeError:
                raise ValueError(
                    f"The names of shards must be UTF-8. Received: {name}, "
                    "which matches others as well"
                ) from None
            # As in a shell: among them are files that are being written.
            if not os.path.basename(name).startswith("."):
                matches = [
                    path
                    for path in matches
                    if not os.path.basename(path).startswith(".")
                ]
            found += sorted(matches)
            if not matches:
                absent.append(name)
    if not found:
        raise ValueError(
            f"Split {split!r} has no shards {' or '.join(patterns)}"
        )
    if "{" in pattern and absent:
        logging.warning(
            "%d shards of %s are missing: %s", len(absent), path, absent[:5]
        )
    # The folder before any wildcard.
    folder, rest = _literal_folder(patterns[0])
    root = (
        patterns[0]
        if tf.io.gfile.isdir(patterns[0])
        else os.path.dirname(folder + re.split(r"[*?\[{]", rest)[0])
    )
    return Files(root, patterns[0].removeprefix(root), found)


def has_shards(path, suffix):
    """Whether a folder holds numbered shards, and no images or tables itself.

    Args:
        path: The folder.
        suffix: Suffix of a shard: <split>-00000SUFFIX or <split>/*SUFFIX.
    """
    if not tf.io.gfile.isdir(path):
        return False
    names = tf.io.gfile.listdir(path)
    if any(map(folder_listing.is_image, names)) or any(
        name.lower().endswith(_TABLES) for name in names
    ):
        return False
    numbered = re.compile(rf".+-\d+(-of-\d+)?{re.escape(suffix)}")
    if any(map(numbered.fullmatch, names)):
        return True
    below = folder_listing.escape_glob(os.fspath(path))
    return bool(tf.io.gfile.glob(f"{below}/*/*{suffix}"))


def _literal_folder(pattern):
    """Splits a pattern after the leading folders that exist literally.

    A folder may be called a[1], which as a pattern would match a1.
    """
    end = pattern.find("/") + 1
    while end:
        further = pattern.find("/", end) + 1
        if not further or not tf.io.gfile.isdir(pattern[:further]):
            break
        end = further
    return pattern[:end], pattern[end:]


def _expand_braces(pattern):
    """Expands a/{000..127}.tar to its 128 names, as the shell does."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    return [
        name
        for number in range(int(first), int(last) + 1)
        for name in _expand_braces(
            f"{pattern[: match.start()]}{number:0{len(first)}d}"
            f"{pattern[match.end() :]}"
        )
    ]
