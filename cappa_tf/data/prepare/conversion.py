"""Conversion of captioned images to a data set, one shard at a time.

The listing alone decides where an image goes: image r of a split, in the order
of the source and before any is opened, goes to shard r modulo the number of
shards, in that order. Any worker (a thread, or a worker of Apache Beam on
another machine) writes a shard from its plan, a file of rows. So the same
input yields the same bytes on any number of machines, and no image is sent
between them.

All files are in OUTPUT/.conversion until the work is complete:

    train-00003-DIGEST.plan      options, then a JSON line for each row
    train-00003-DIGEST.tfrecord  the shard, renamed to this when complete
    train-00003-DIGEST.result    counts, skipped rows, checksums

DIGEST is the digest of the plan's content, so another conversion that is still
writing uses other names. A conversion that is killed leaves only this folder.
The next one reuses each shard whose plan, images and bytes are the same.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import os

import PIL
import tensorflow as tf

from cappa_tf.data import description, schema
from cappa_tf.data.prepare import dataset_writer
from cappa_tf.data.sources import image_rows
from cappa_tf.data.text import is_text
from cappa_tf.utils import files

FOLDER = ".conversion"
# Part of each plan, so that shards written by other code are written again.
_MAKER = {"version": 2, "pillow": PIL.__version__}


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of one plan.

    Attributes:
        inputs_sha256: Digest of sizes and modification times of the images.
        shard: The `dataset_writer.WrittenShard`.
        skipped: List of [number of the row in the source, reason, name] of
            everything left out.
        reused: Whether an earlier conversion wrote the shard.
    """

    inputs_sha256: str
    shard: dataset_writer.WrittenShard
    skipped: list
    reused: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """Plan of one shard.

    Attributes:
        path: Path of the plan's file; shard and result are beside it.
        split: Split of the shard.
        num_rows: Number of images in the plan.
    """

    path: str
    split: str
    num_rows: int


def plan(rows, output_dir, num_shards, options, skipped):
    """Assigns the rows to shards and writes the plans.

    A row whose key is repeated or not valid text is skipped here.

    Args:
        rows: A list of `image_rows.Row`s.
        output_dir: Folder of the data set.
        num_shards: Number of shards per split; a split with fewer rows gets one
            shard per row.
        options: `image_rows.Options`.
        skipped: `image_rows.Skipped` to which skipped rows are added.

    Returns:
        A list of `Plan`s.

    Raises:
        ValueError: If the name of a split is invalid.
    """
    split_rows = {}
    seen = set()
    for number, row in enumerate(rows):
        if not is_text(row.key):
            skipped.add("name is not valid Unicode", row.key)
        elif row.key in seen:
            skipped.add("repeated key", row.key)
        else:
            seen.add(row.key)
            split = image_rows.choose_split(row, options.split_fractions)
            split_rows.setdefault(split, []).append((number, row))
    for split in split_rows:
        dataset_writer.check_split(split)
    folder = os.path.join(output_dir, FOLDER)
    tf.io.gfile.makedirs(folder)
    header = {
        "options": dataclasses.asdict(options),
        "classes": image_rows.class_names(rows),
        "maker": _MAKER,
    }
    plans = []
    for split, numbered in split_rows.items():
        count = min(num_shards, len(numbered))
        for shard in range(count):
            stem = os.path.join(folder, f"{split}-{shard:05d}")
            plans.append(
                _write_plan(stem, split, header, numbered[shard::count])
            )
    kept = [(one.path, *_beside(one.path)) for one in plans]
    remove_others(folder, [path for paths in kept for path in paths])
    return plans


def convert(plan_path, workers=None, on_row=None):
    """Writes the shard of a plan, unless it already exists.

    Args:
        plan_path: `Plan.path`.
        workers: Number of threads that read and check images; by default one
            per core of this machine.
        on_row: Called without arguments after each row.

    Returns:
        The `Result`.
    """
    header, rows = _read_plan(plan_path)
    on_row = on_row or (lambda: None)
    workers = workers or os.cpu_count()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        found = _finished(plan_path, rows, pool)
        if found:
            for _ in rows:
                on_row()
            return found
        options = image_rows.Options(**header["options"])
        classes = {name: i for i, name in enumerate(header["classes"])}
        read = ordered_map(
            pool,
            lambda numbered: (
                numbered[0],
                _stamp(numbered[1].path),
                *image_rows.read_example(numbered[1], options, classes),
            ),
            rows,
            ahead=4 * workers,
        )
        return _write_shard(plan_path, read, on_row)


def finish(plans, output_dir, name, metadata, skipped):
    """Publishes the data set once each plan has its shard.

    Args:
        plans: The list that `plan` returned.
        output_dir: Folder of the data set.
        name: Name of the data set.
        metadata: Dict stored in the description.
        skipped: The `image_rows.Skipped` of `plan`, to which the skipped rows
            of the shards are added in the order of the source.

    Returns:
        The `DatasetDescription`, and the number of shards that were reused
        from an earlier conversion.

    Raises:
        ValueError: If a shard is missing, or no image was usable.
    """
    results = [_load_result(plan.path) for plan in plans]
    missing = [p.path for p, r in zip(plans, results) if r is None]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(plans)} shards are missing, such as "
            f"that of {missing[0]}: run the conversion again"
        )
    for _, reason, key in sorted(
        (line for result in results for line in result.skipped),
        key=lambda line: line[0],
    ):
        skipped.add(reason, key)
    folder = os.path.join(output_dir, FOLDER)
    if not any(result.shard.num_examples for result in results):
        tf.io.gfile.rmtree(folder)
        raise ValueError(f"No usable example was left: {skipped}")
    splits = {}
    for plan_, result in zip(plans, results):
        splits.setdefault(plan_.split, []).append(result.shard)
    found = dataset_writer.publish(output_dir, name, metadata, splits)
    tf.io.gfile.rmtree(folder)
    return found, sum(result.reused for result in results)


def _write_shard(plan_path, read, on_row):
    """Writes the rows of a shard; it becomes visible when complete."""
    shard_path, result_path = _beside(plan_path)
    inputs = hashlib.sha256()
    skipped = []
    with files.replacing(shard_path, remote=True) as unfinished:
        with schema.ShardWriter(unfinished) as writer:
            for number, stamp, example, reasons in read:
                inputs.update(stamp.encode())
                skipped += [[number, *reason] for reason in reasons]
                if example is not None:
                    writer.write(example)
                on_row()
        shard = dataclasses.replace(writer.finish(), path=shard_path)
    result = Result(inputs.hexdigest(), shard, skipped)
    files.write_json(result_path, dataclasses.asdict(result), indent=None)
    return result


def _finished(plan_path, rows, pool):
    """The result of an earlier conversion if it is still valid, or None."""
    result = _load_result(plan_path)
    if result is None:
        return None
    shard = result.shard
    if (
        description.file_size(shard.path) != shard.num_bytes
        or files.sha256(shard.path) != shard.sha256
    ):
        return None
    inputs = hashlib.sha256()
    for stamp in pool.map(_stamp, (row.path for _, row in rows)):
        inputs.update(stamp.encode())
    if inputs.hexdigest() != result.inputs_sha256:
        return None
    result = dataclasses.replace(result, reused=True)
    result_path = _beside(plan_path)[1]
    files.write_json(result_path, dataclasses.asdict(result), indent=None)
    return result


def _stamp(path):
    """Size and modification time of a file, which detect a replacement."""
    try:
        found = tf.io.gfile.stat(path)
    except tf.errors.OpError:
        return "none\n"
    return f"{found.length} {found.mtime_nsec}\n"


def _write_plan(stem, split, header, numbered_rows):
    """Writes the plan of one shard."""
    lines = [json.dumps(header)]
    for number, row in numbered_rows:
        lines.append(json.dumps([number, dataclasses.asdict(row)]))
    text = "".join(line + "\n" for line in lines)
    path = f"{stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.plan"
    files.write_text(path, text)
    return Plan(path, split, len(numbered_rows))


def _read_plan(path):
    """Header and (number, `Row`) pairs of a plan."""
    with tf.io.gfile.GFile(path) as file:
        header, *lines = map(json.loads, file.read().splitlines())
    return header, [(number, image_rows.Row(**row)) for number, row in lines]


def _load_result(plan_path):
    """The `Result` beside a plan, or None."""
    path = _beside(plan_path)[1]
    if not tf.io.gfile.exists(path):
        return None
    with tf.io.gfile.GFile(path) as file:
        content = json.loads(file.read())
    try:
        shard = dataset_writer.WrittenShard(**content.pop("shard"))
        return Result(shard=shard, **content)
    except (KeyError, TypeError):  # Of another version of this code.
        return None


def _beside(plan_path):
    """Paths of the shard and the result of a plan."""
    stem = plan_path.removesuffix(".plan")
    return f"{stem}.tfrecord", f"{stem}.result"


def remove_others(folder, kept):
    """Removes what another or an unfinished conversion left in a folder.

    Args:
        folder: The folder.
        kept: Paths of the files that remain if they exist.
    """
    names = {*map(os.path.basename, kept)}
    for file in tf.io.gfile.listdir(folder):
        if file not in names:
            tf.io.gfile.remove(os.path.join(folder, file))


def ordered_map(pool, function, items, ahead):
    """Yields results in order, with at most `ahead` items in progress."""
    items = iter(items)
    waiting = collections.deque(
        pool.submit(function, item) for item in itertools.islice(items, ahead)
    )
    try:
        while waiting:
            yield waiting.popleft().result()
            for item in itertools.islice(items, 1):
                waiting.append(pool.submit(function, item))
    finally:
        for future in waiting:
            future.cancel()
