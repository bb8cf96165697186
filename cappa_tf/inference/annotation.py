"""Annotation of whole data sets: captions, scores or embeddings of all images.

    annotation.annotate(
        "data/mine", "data/mine_recaptioned", "runs/captioner",
        runner="DirectRunner",
        runner_arguments=["--direct_num_workers=8",
                          "--direct_running_mode=multi_processing"],
    )

The shards of the source are cut into pieces, each of which becomes a shard of
the output. A worker (this process, or a process of Apache Beam on any machine)
reads the records of a piece, passes them through the model in fixed batches and
writes the shard. So the same data yield the same bytes whatever the number of
workers of one kind, and no image is sent between them.

All files are in OUTPUT/.annotation until the work is complete:

    job.json                     the key: model, options, format of the output
    train-00003-DIGEST.tfrecord  a shard, renamed to this when complete
    train-00003-DIGEST.result    counts, bad records, checksum

DIGEST is that of the key and of the records of the piece, so a shard of other
data is never used. What a killed process has completed is reused; a folder of
another model or other options is refused.
"""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import os
import pickle
import threading

import tensorflow as tf

from cappa_tf.data import description
from cappa_tf.data.prepare import conversion, dataset_writer
from cappa_tf.data.sources import prepared
from cappa_tf.data.sources.image_rows import Skipped
from cappa_tf.data.sources.prepared import as_source
from cappa_tf.data.stream import bad_records
from cappa_tf.inference import annotation_shards
from cappa_tf.inference.annotator import AnnotationOptions, Annotator
from cappa_tf.inference.predictor import Predictor
from cappa_tf.utils import files
from cappa_tf.utils.arguments import check_counts

FOLDER = ".annotation"
LOG_NAME = "annotation.log"
_VERSION = 1
_THREADS = 8
# Fraction of bad records, of which truncated shards may have more than 1.
_ANY_NUMBER = 1e6


@dataclasses.dataclass(frozen=True)
class Piece:
    """Part of a shard of the source, which becomes a shard of the output.

    Attributes:
        split: Name of the split.
        number: Number of the piece in the split.
        first: Number of its first record in the split.
        part: Index in `base.Records.parts`.
        shard: Index of the shard of the part.
        skip: Number of records of the shard before the piece.
        count: Number of records.
        digest: Digest of the job's key and of the records.
    """

    split: str
    number: int
    first: int
    part: int
    shard: int
    skip: int
    count: int
    digest: str = ""


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker needs to know; it can be pickled.

    Attributes:
        source: The source, pickled before it was opened.
        model: Path of the model, as of `Predictor.open`.
        weights: Weights of a run, likewise.
        options: `AnnotationOptions`.
        output: Folder of the output.
        key: Dict of JSON values, what the results depend on beside the data.
    """

    source: bytes
    model: str
    weights: str
    options: AnnotationOptions
    output: str
    key: dict

    @property
    def folder(self):
        """Folder of the unfinished work."""
        return os.path.join(self.output, FOLDER)

    def paths(self, piece):
        """Paths of the shard and of the result of a piece."""
        stem = os.path.join(
            self.folder, f"{piece.split}-{piece.number:05d}-{piece.digest}"
        )
        return f"{stem}.{self.options.file_format}", f"{stem}.result"


@dataclasses.dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        splits: Dict split -> (records written, shards).
        skipped: `Skipped` of all bad records.
        reused: Number of shards of an interrupted job.
        was_complete: Whether all was there, so that nothing was done.
    """

    splits: dict
    skipped: Skipped
    reused: int = 0
    was_complete: bool = False


class Worker:
    """Writes pieces. One object is shared by the threads of a process.

    Args:
        job: `Job`.
        annotator: `Annotator` of the job, if this process has opened it; by
            default it is opened at the first piece.
        source: The source of the job, if this process has opened it.
    """

    def __init__(self, job, annotator=None, source=None):
        self._job, self._annotator = job, annotator
        self._source = source or pickle.loads(job.source)
        self._records, self._lock = {}, threading.RLock()

    def write(self, piece, on_record=None):
        """Writes the shard of a piece, unless it is there.

        Args:
            piece: `Piece`.
            on_record: Called without arguments after each record.

        Returns:
            Dict of the result.

        Raises:
            ValueError: The data or the model differ from those of the job.
        """
        on_record = on_record or (lambda: None)
        with self._lock:
            records = self._open(piece.split)
        digest = piece_digest(self._job.key, records, piece)
        if digest != piece.digest:
            raise ValueError(
                f"The data changed since the job was started: {records.name}, "
                f"records {piece.first} to {piece.first + piece.count - 1}. "
                "Run it again"
            )
        found = finished(self._job, piece)
        if found is not None:
            for _ in range(piece.count):
                on_record()
            found = {**found, "reused": True}
            files.write_json(self._job.paths(piece)[1], found, indent=None)
            return found
        with self._lock:
            annotator = self._open_annotator()
        return self._write(piece, records, annotator, on_record)

    def _write(self, piece, records, annotator, on_record):
        shard_path, result_path = self._job.paths(piece)
        options, skipped = self._job.options, []
        open_shard = annotation_shards.SHARDS[options.file_format]
        numbers = itertools.count(piece.first)
        with open_shard(shard_path, options) as shard:
            with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
                read = conversion.ordered_map(
                    pool,
                    lambda pair: annotator.read(
                        records, pair[1], f"{piece.split}/{pair[0]}"
                    ),
                    zip(numbers, _serialized(records, piece)),
                    ahead=2 * options.batch_size,
                )
                for batch in _batches(read, options.batch_size):
                    with self._lock:
                        annotator.annotate(batch)
                    for one, _ in batch:
                        if one.error is not None:
                            skipped.append([one.error, one.name])
                        shard.write(one)
                        on_record()
            written = shard.finish()
        result = {
            "shard": {**dataclasses.asdict(written), "path": shard_path},
            "skipped": skipped,
            "reused": False,
        }
        files.write_json(result_path, result, indent=None)
        return result

    def _open(self, split):
        if split not in self._records:
            self._records[split] = self._source.split(split)
        return self._records[split]

    def _open_annotator(self):
        if self._annotator is None:
            job = self._job
            predictor = Predictor.open(
                job.model, job.weights, batch_size=job.options.batch_size
            )
            annotator = Annotator(predictor, job.options)
            if job_key(annotator, job.options) != job.key:
                raise ValueError(
                    f"The weights of {job.model} changed since the job was "
                    "started. Annotate with those of a finished run, or copy "
                    "the folder first"
                )
            self._annotator = annotator
        return self._annotator


def annotate(
    source,
    output,
    model,
    options=None,
    *,
    splits=None,
    weights="auto",
    shard_size=1024,
    runner=None,
    runner_arguments=(),
    overwrite=False,
    on_record=None,
):
    """Annotates a data set, on Apache Beam or in this process.

    Args:
        source: A source, or what `prepared.Folder` takes.
        output: Folder to write; with TFRecord a data set to train on.
        model: Path of a model, as of `Predictor.open`.
        options: `AnnotationOptions`.
        splits: Names of the splits; by default all, for a source that knows
            their names.
        weights: Weights of a run, as of `Predictor.open`.
        shard_size: Maximum number of records of a shard.
        runner: Name of a Beam runner; None for this process.
        runner_arguments: Beam's own options.
        overwrite: Whether to replace what another job wrote to `output`.
        on_record: Function of (done, total) called after each record; without
            a runner.

    Returns:
        A `Report`.

    Raises:
        ValueError: The output belongs to another job; the model lacks what the
            options need; or the source has no such split.
    """
    options = options or AnnotationOptions()
    check_counts(shard_size=shard_size)
    output = files.absolute(os.fspath(output))
    model = files.absolute(model) if files.exists(model) else model
    source = _source(source, splits)
    pickled = pickle.dumps(source)
    name = os.path.basename(output)
    splits = _splits(source, splits)
    _check_apart(source.name, output)
    dataset_writer.check_name("output", name)
    predictor = Predictor.open(model, weights, batch_size=options.batch_size)
    annotator = Annotator(predictor, options)
    key = job_key(annotator, options)
    job = Job(pickled, model, weights, options, output, key)
    worker = Worker(job, annotator, source)
    pieces, skipped = _plan(worker, key, splits, shard_size)
    data = hashlib.sha256("".join(p.digest for p in pieces).encode())
    metadata = {
        "source": source.name,
        "annotation": {**key, "data": data.hexdigest(), "model_path": model},
    }
    classes = list(getattr(source, "class_names", []))
    if classes:
        metadata["classes"] = classes
    found = _check_output(job, name, metadata, overwrite)
    if found is not None:
        _remove_work(job)
        return found
    _claim(job, pieces, overwrite)
    if runner is None:
        _run_here(worker, pieces, on_record)
    else:
        from cappa_tf.inference import annotation_beam

        annotation_beam.run(job, pieces, runner, runner_arguments)
    return _finish(job, pieces, name, metadata, skipped)


def job_key(annotator, options):
    """What the results depend on beside the data: a JSON object."""
    chosen = dataclasses.asdict(options)
    key = {
        "version": _VERSION,
        "model": annotator.key,
        "options": {**chosen, "kind": annotator.kind},
    }
    # As it is read from a file: without tuples.
    return json.loads(json.dumps(key))


def piece_digest(key, records, piece):
    """Digest of a job's key and of the records of a piece.

    Args:
        key: Dict, that of the job.
        records: `base.Records` of the piece's split.
        piece: `Piece`, with or without its digest.
    """
    part = records.parts[piece.part]
    identity = part.range_identity(piece.shard, piece.skip, piece.count)
    place = [piece.split, piece.number, piece.first]
    text = json.dumps([key, place, records.settings, identity], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def finished(job, piece):
    """The result of a piece whose shard is complete, or None."""
    shard_path, result_path = job.paths(piece)
    if not files.exists(result_path):
        return None
    found = json.loads(files.read_text(result_path))
    shard = found["shard"]
    if (
        description.file_size(shard_path) != shard["num_bytes"]
        or files.sha256(shard_path) != shard["sha256"]
    ):
        return None
    # The folder may have been moved.
    return {**found, "shard": {**shard, "path": shard_path}}


# -- Planning ------------------------------------------------------------------


def _source(source, splits):
    """The source; a path is made absolute, as workers have other folders."""
    if not isinstance(source, str | os.PathLike):
        return as_source(source)
    path = os.fspath(source)
    if path.startswith(prepared.TFDS_PREFIX):
        return as_source(path)
    path = files.absolute(path)
    for suffix, kind in prepared.SHARDS.items():
        if path.endswith(suffix) and "{split}" not in path:
            if len(splits or ()) != 1:
                raise ValueError(
                    "A pattern of shards without {split} needs the name of one "
                    f"split (--splits). Received: {path}, splits={splits}"
                )
            return kind({splits[0]: path})
    return as_source(path)


def _splits(source, splits):
    known = getattr(source, "splits", None)
    if splits is None:
        splits = known
    if not splits:
        raise ValueError(
            f"{source.name} does not tell the names of its splits: give "
            "`splits` (--splits). Received: none"
        )
    for split in splits:
        dataset_writer.check_split(split)
    return list(splits)


def _check_apart(source, output):
    """Refuses to write into the source, which publishing would delete."""

    def resolved(path):
        path = path if files.is_remote(path) else os.path.realpath(path)
        return os.path.join(path, "")

    if resolved(source).startswith(resolved(output)):
        raise ValueError(
            "The output must be another folder than the data. Received: "
            f"{output}"
        )


def _plan(worker, key, splits, shard_size):
    """Cuts all splits; returns the `Piece`s, and the `Skipped` known before."""
    pieces, skipped = [], Skipped()
    for split in splits:
        records = worker._open(split)
        worker._annotator.check(records)
        # They are counted and named, however many are bad.
        counter = bad_records.SkipCounter(
            _ANY_NUMBER, records.num_examples, split
        )
        records.check(counter)
        for reason, number in counter.counts.items():
            for _ in range(number):
                skipped.add(reason, records.name)
        pieces += _cut(split, records, shard_size)
    by_split = {split: worker._open(split) for split in splits}

    def with_digest(piece):
        digest = piece_digest(key, by_split[piece.split], piece)
        return dataclasses.replace(piece, digest=digest)

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(with_digest, pieces)), skipped


def _cut(split, records, shard_size):
    """The pieces of a split, which begin anew at each shard."""
    pieces, first = [], 0
    for number, part in enumerate(records.parts):
        for shard, one in enumerate(part.shards):
            for skip in range(0, one.num_examples, shard_size):
                count = min(shard_size, one.num_examples - skip)
                pieces.append(
                    Piece(split, len(pieces), first, number, shard, skip, count)
                )
                first += count
    return pieces


# -- The folder ----------------------------------------------------------------


def _check_output(job, name, metadata, overwrite):
    """The `Report` of an output that is complete, or None if it is to do.

    Raises:
        ValueError: The folder holds something else.
    """
    old = _description(job)
    if old is None or overwrite:
        if job.options.file_format == "parquet":
            annotation_shards.check_parquet_output(job.output)
        else:
            dataset_writer.check_output(job.output, name, metadata, overwrite)
        return None
    found, shards = old
    differing = _differing(metadata["annotation"], found.get("annotation"))
    if not differing and all(
        description.file_size(os.path.join(job.output, shard["file"]))
        == shard["num_bytes"]
        for split in shards.values()
        for shard in split["shards"]
    ):
        splits = {
            split: (content["num_examples"], len(content["shards"]))
            for split, content in shards.items()
        }
        skipped = Skipped()
        for reason, number in found["skipped"].items():
            skipped.counts[reason] += number
        return Report(splits, skipped, was_complete=True)
    raise ValueError(
        f"{job.output} already holds a data set, "
        + (
            f"which differs from this job in: {', '.join(differing)}"
            if differing
            else "of which shards are missing"
        )
        + ". Write to another --output, or pass --overwrite to replace it"
    )


def _description(job):
    """(Metadata, splits) of what the output holds, or None."""
    if job.options.file_format == "parquet":
        path = os.path.join(job.output, annotation_shards.PARQUET_DESCRIPTION)
    else:
        path = os.path.join(job.output, description.FILE_NAME)
    if not files.exists(path):
        return None
    content = json.loads(files.read_text(path))
    return content.get("metadata", {}), content["splits"]


def _differing(key, other):
    """Names of what differs between two keys: "weights", "batch_size", ..."""
    if not isinstance(other, dict):
        return ["origin"]
    flat, flat_other = (
        {
            **one.get("model", {}),
            **one.get("options", {}),
            **{k: one.get(k) for k in ("version", "data") if k in one},
        }
        for one in (key, other)
    )
    differing = [
        name
        for name in {**flat, **flat_other}
        if flat.get(name) != flat_other.get(name)
    ]
    # The digest of the data covers the other parts of the key.
    return [name for name in differing if name != "data"] or differing


def _claim(job, pieces, overwrite):
    """Writes the job's key, and removes what belongs to none of its pieces."""
    files.makedirs(job.folder)
    path = os.path.join(job.folder, "job.json")
    if files.exists(path) and not overwrite:
        differing = _differing(job.key, json.loads(files.read_text(path)))
        if differing:
            raise ValueError(
                f"{job.output} holds an unfinished job, which differs from "
                f"this one in: {', '.join(differing)}. Finish it with its own "
                "flags, write to another --output, or pass --overwrite to "
                "delete it"
            )
    files.write_json(path, job.key)
    kept = [path for piece in pieces for path in job.paths(piece)]
    conversion.remove_others(job.folder, [path, *kept])


def _remove_work(job):
    if files.exists(job.folder):
        files.rmtree(job.folder)


def _finish(job, pieces, name, metadata, skipped):
    """Publishes the output once each piece has its shard."""
    results = [finished(job, piece) for piece in pieces]
    missing = [p for p, result in zip(pieces, results) if result is None]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(pieces)} shards are missing, such as "
            f"{os.path.basename(job.paths(missing[0])[0])}: run it again, with "
            "an --output that all workers see under this name"
        )
    splits = {}
    for piece, result in zip(pieces, results):
        for reason, key in result["skipped"]:
            skipped.add(reason, key)
        shard = dataset_writer.WrittenShard(**result["shard"])
        splits.setdefault(piece.split, []).append(shard)
    is_empty = not any(
        shard.num_examples for shards in splits.values() for shard in shards
    )
    if is_empty:
        _remove_work(job)
        raise ValueError(f"No image could be annotated: {skipped}")
    metadata["annotation"]["features"] = annotation_shards.FEATURES[
        annotation_shards.what(job.options)
    ]
    metadata["skipped"] = dict(skipped.counts)
    lines = "".join(f"{line}\n" for line in skipped.lines)
    files.write_text(
        os.path.join(job.output, LOG_NAME), lines, errors="backslashreplace"
    )
    if job.options.file_format == "parquet":
        annotation_shards.publish_parquet(job.output, name, metadata, splits)
    else:
        dataset_writer.publish(job.output, name, metadata, splits)
    _remove_work(job)
    return Report(
        {
            split: (
                sum(shard.num_examples for shard in shards),
                sum(shard.num_examples > 0 for shard in shards),
            )
            for split, shards in splits.items()
        },
        skipped,
        sum(result["reused"] for result in results),
    )


# -- Work ----------------------------------------------------------------------


def _run_here(worker, pieces, on_record):
    total, done = sum(piece.count for piece in pieces), itertools.count(1)
    on_record = on_record or (lambda done, total: None)
    for piece in pieces:
        worker.write(piece, lambda: on_record(next(done), total))


def _serialized(records, piece):
    """Yields the serialized records of a piece."""
    part = records.parts[piece.part]
    with tf.device("CPU:0"):
        place = [
            tf.constant(x, tf.int64)
            for x in (piece.shard, piece.skip, piece.count)
        ]
        found = part.read(*place).prefetch(16)
    yield from found.as_numpy_iterator()


def _batches(items, size):
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch
