"""Images per second and memory of the data pipeline, from shards to batches.

    python tools/benchmark.py data --data=photos

Compares the following methods, in turn and with the same number of threads, on
the photos of the folder (synthetic ones without --data) as they are, enlarged
to 1,024 x 768, and these as `tools/prepare_data.py --resize` would store them:

    plain      decode_jpeg + resize + cast, as in the recipe
    antialias  decode_jpeg + resize(antialias=True) + cast
    decode     this project's decode + resize: a JPEG at the smallest scale
               that covers the target (these yield uint8 [H, W, 3])
    floor      decode_jpeg at 1/8, which reads the coefficients and little
               more, so that no reduced scale is faster
    pipeline   a CaptionDataset from shards to batches of [-1, 1] and tokens

Then measures reading without decoding: the bare files, TensorFlow's reader
alone, and the shuffled stream after one epoch. Finally measures the resident
memory for two numbers of records. Freed memory is kept, as by all
tools (`cpu.prepare`).
"""

import dataclasses
import io
import json
import os
import pathlib
import tempfile
import time

import numpy as np
import tensorflow as tf
from absl import flags
from PIL import Image

from cappa_tf.data import caption_dataset, schema, tokenizer
from cappa_tf.data.images import decode_resize, image_files
from cappa_tf.data.stream import shuffling
from tools import benchmarks

_ENLARGED = (1024, 768)
_READ = 3000  # Records of 100 kB that are read without decoding.
_CAPTIONS = (
    "a young girl in a pink dress climbs the stairs of a wooden playhouse",
    "two dogs of different breeds look at each other on the road",
    "children play in a fountain on a hot day",
    "a brown dog runs through deep snow after a red ball",
    "a man in a blue shirt stands on a ladder cleaning a window",
)
_WAYS = ("plain", "antialias", "decode", "floor", "pipeline")
# Pairs of (set, method), and the goal or the meaning of their ratio.
_RATIOS = (
    (("enlarged", "decode"), ("enlarged", "plain"), "goal 1.8"),
    (("enlarged", "decode"), ("enlarged", "antialias"), "goal 3"),
    (("enlarged", "floor"), ("enlarged", "plain"), "best of any scale"),
    (("enlarged", "pipeline"), ("enlarged", "decode"), "goal 0.85"),
    (("resized", "pipeline"), ("enlarged", "plain"), "resized beforehand"),
    (("originals", "decode"), ("originals", "plain"), "goal 1"),
    (("originals", "pipeline"), ("originals", "decode"), "goal 0.85"),
)


def define_flags():
    """Defines the flags of this benchmark."""
    count = {"lower_bound": 1}
    flags.DEFINE_string("data", None, "Folder of photos (JPEG).")
    flags.DEFINE_integer("image_size", 224, "Target size in pixels.", **count)
    flags.DEFINE_integer("quality", 75, "JPEG quality after enlarging.")
    flags.DEFINE_integer("images", 960, "Images per measurement.", **count)
    flags.DEFINE_integer("batch_size", 32, "Images per batch.", **count)
    flags.DEFINE_integer("rounds", 5, "Measurements per method.", **count)
    flags.DEFINE_integer(
        "threads", os.cpu_count(), "Images decoded in parallel.", **count
    )
    flags.DEFINE_list(
        "records", ["10000", "200000"], "Sizes of the sets to read."
    )
    flags.DEFINE_string("read", None, "Only read this data set, to the end.")


def run():
    """Returns rows of all methods, or reads a data set, prints its memory."""
    if flags.FLAGS.read:
        print(json.dumps(read_everything(flags.FLAGS.read)))
        return None
    photos = load_photos(flags.FLAGS.data)
    enlarged = enlarge(photos, flags.FLAGS.quality)
    side = round(flags.FLAGS.image_size * 256 / 224)
    sets = {
        "originals": photos,
        "enlarged": enlarged,
        "resized": shrink(enlarged, side),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, encoded in sets.items():
            write(os.path.join(folder, name), encoded)
        rows = _speed_rows(sets, folder)
        rows += _difference_rows(sets)
        rows += _reading_rows(folder)
    return rows + _memory_rows()


def load_photos(folder):
    """Contents of a folder's JPEG files; synthetic photos without a folder."""
    if folder is None:
        random = np.random.default_rng(0)
        return [_synthetic_photo(random) for _ in range(24)]
    paths = sorted(pathlib.Path(folder).glob("*.jp*g"))
    if not paths:
        raise ValueError(f"`data` must hold JPEG files. Received: {folder!r}")
    return [path.read_bytes() for path in paths]


def _synthetic_photo(random):
    """A JPEG with detail at all scales, like a photo."""
    pixels = np.zeros((375, 500, 3))
    for side in (3, 8, 24, 72, 216):
        rough = random.uniform(0, 255, (side, side, 3)).astype(np.uint8)
        fine = Image.fromarray(rough).resize((500, 375), Image.BICUBIC)
        pixels += (np.asarray(fine) - 127.5) * side**-0.35
    pixels = np.clip(pixels + 127.5, 0, 255).astype(np.uint8)
    return jpeg(Image.fromarray(pixels), 90)


def enlarge(photos, quality):
    """The photos at 1,024 x 768 (upright ones at 768 x 1,024)."""
    result = []
    for photo in photos:
        image = Image.open(io.BytesIO(photo)).convert("RGB")
        upright = image.height > image.width
        size = _ENLARGED[::-1] if upright else _ENLARGED
        result.append(jpeg(image.resize(size, Image.BICUBIC), quality))
    return result


def shrink(photos, side):
    """The photos as prepare_data stores them with `--resize=side`."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "photo.jpg")
        result = []
        for photo in photos:
            path.write_bytes(photo)
            result.append(image_files.read(path, resize=side))
    return result


def jpeg(image, quality):
    """Contents of a JPEG file."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def write(folder, encoded, shards=4):
    """Writes images with captions as a data set with a vocabulary."""
    examples = (
        schema.Example(f"{i:06d}", image, [f"{c} {i % 7}" for c in _CAPTIONS])
        for i, image in enumerate(encoded)
    )
    schema.write_dataset({"train": examples}, folder, "benchmark", shards)
    tokenizer.train_tokenizer(
        [f"{c} {i}" for c in _CAPTIONS for i in range(7)],
        os.path.join(folder, tokenizer.FILE_NAME),
        150,
    )


def dataset(folder, size, **options):
    """The data set in a folder that `write` wrote, its images of that size."""
    return caption_dataset.CaptionDataset(
        folder, "train", tokenizer.Tokenizer(folder, 64), size, **options
    )


def _dataset(folder, size, **options):
    """The same, with batches and threads as the flags say."""
    return dataset(
        folder,
        size,
        batch_size=flags.FLAGS.batch_size,
        num_parallel_calls=flags.FLAGS.threads,
        **options,
    )


def decoder(way, size):
    """Function of one method, from an encoded image to uint8 [H, W, 3]."""
    size = (size, size)
    if way == "floor":
        # One pixel, as images of different shapes cannot be batched.
        return lambda e: tf.io.decode_jpeg(e, channels=3, ratio=8)[:1, :1]
    if way == "decode":
        return lambda encoded: decode_resize.resize(
            decode_resize.decode(encoded, None, size), size
        )
    return lambda encoded: tf.cast(
        tf.image.resize(
            tf.io.decode_jpeg(encoded, channels=3),
            size,
            antialias=way == "antialias",
        ),
        tf.uint8,
    )


def _batches(way, encoded, folder):
    """An endless data set of batches, by one method."""
    if way == "pipeline":
        return _dataset(folder, flags.FLAGS.image_size).train()
    return (
        tf.data.Dataset.from_tensor_slices(encoded)
        .repeat()
        .map(
            decoder(way, flags.FLAGS.image_size),
            num_parallel_calls=flags.FLAGS.threads,
        )
        .batch(flags.FLAGS.batch_size, drop_remainder=True)
        .prefetch(2)
    )


def _speed_rows(sets, folder):
    """Images per second of each method on each set, and ratios."""
    streams = {
        (name, way): _batches(way, encoded, os.path.join(folder, name))
        for name, encoded in sets.items()
        for way in _WAYS
    }
    steps = max(1, flags.FLAGS.images // flags.FLAGS.batch_size)

    def measure(key):
        # A new stream each time, as one that waits for its next turn would
        # work ahead during the turns of others.
        batches = iter(streams[key])
        for _ in range(3):
            next(batches)
        start, used = time.perf_counter(), time.process_time()
        for _ in range(steps):
            next(batches)
        count = steps * flags.FLAGS.batch_size
        return {
            "speed": count / (time.perf_counter() - start),
            "ms": (time.process_time() - used) / count * 1e3,
        }

    found = benchmarks.turns_of(streams, flags.FLAGS.rounds, measure)
    rows = []
    for key in found:
        name = " ".join(key)
        speed, used = (
            benchmarks.median(found, key, x) for x in ("speed", "ms")
        )
        rows += [
            benchmarks.Row(name, speed, "images/s"),
            benchmarks.Row(name, used, "CPU ms/image"),
        ]
    for one, other, comment in _RATIOS:
        name, base = " ".join(one), " ".join(other)
        rows += [
            benchmarks.Row(
                f"{name} ({comment})",
                benchmarks.median(found, one, key),
                unit,
                base,
                benchmarks.ratio(found, one, other, key),
            )
            for key, unit in (("speed", "images/s"), ("ms", "CPU ms/image"))
        ]
    return rows


def _difference_rows(sets):
    """How far each method is from a full antialiased resize."""
    size, rows = flags.FLAGS.image_size, []
    for name, encoded in sets.items():
        exact = np.array(
            [
                tf.image.resize(
                    tf.io.decode_jpeg(e, channels=3),
                    (size, size),
                    antialias=True,
                )
                for e in encoded[:20]
            ]
        )
        for way in ("plain", "decode"):
            off = np.abs(
                [decoder(way, size)(e).numpy() for e in encoded[:20]] - exact
            )
            for value, which in (
                (off.mean(), "on average"),
                (np.quantile(off, 0.99), "at most in 99%"),
            ):
                unit = f"gray levels off {which}"
                rows.append(benchmarks.Row(f"{name} {way}", float(value), unit))
    return rows


def _reading_rows(folder):
    """Bytes per second of the shuffled stream and of the bare files."""
    path = os.path.join(folder, "large")
    rng = np.random.default_rng(0)
    write(path, (rng.bytes(100_000) for _ in range(_READ)), shards=8)
    shards = _dataset(path, 8).records
    size = sum(shard.num_bytes for shard in shards)

    paths = [shard.path for shard in shards]
    streams = {
        "reader": tf.data.TFRecordDataset(paths, buffer_size=1 << 20).repeat(),
        "stream": shuffling.from_readers(shards, seed=0).map(lambda i, s: s),
    }

    def measure(way):
        if way in streams:
            # A new stream each time, as above; an epoch fills its buffers.
            batches = iter(streams[way].map(tf.strings.length).batch(100))
            _ = [next(batches) for _ in range(_READ // 100)]
        start, used = time.perf_counter(), time.process_time()
        if way == "files":
            for path in paths:
                with open(path, "rb", buffering=0) as file:
                    while file.read(1 << 20):
                        pass
        else:
            _ = [next(batches) for _ in range(_READ // 100)]
        return {
            "speed": size / (time.perf_counter() - start),
            "cpu": size / (time.process_time() - used),
        }

    found = benchmarks.turns_of(("files", *streams), 3, measure)
    rows = []
    for way in found:
        name = f"reading without decoding, {way}"
        for key, unit in (("speed", "GB/s"), ("cpu", "GB per CPU second")):
            row = benchmarks.Row(
                name, benchmarks.median(found, way, key) / 1e9, unit
            )
            if way != "files":
                row = dataclasses.replace(
                    row,
                    baseline="files",
                    ratio=benchmarks.ratio(found, way, "files", key),
                )
            rows.append(row)
    return rows


def read_everything(path):
    """Reads one epoch from disk; returns the resident memory at its end."""
    data = _dataset(path, 16, cache="stream")
    steps = data.num_examples // flags.FLAGS.batch_size
    for _ in data.train().take(steps):
        pass
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {"bytes": resident, "peak": benchmarks.peak_bytes()}


def _memory_rows():
    """Resident memory after an epoch over few and many records."""
    image = jpeg(Image.new("RGB", (16, 16), (90, 30, 200)), 75)
    rows, first = [], None
    for count in map(int, flags.FLAGS.records):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "generated")
            write(path, (image for _ in range(count)), shards=16)
            found = benchmarks.in_a_process("data", read=path)
        name = f"after {count:,} records"
        row = benchmarks.Row(name, found["bytes"] / 2**20, "MiB resident")
        if first is not None:
            ratio = found["bytes"] / first["bytes"]
            row = dataclasses.replace(row, baseline=rows[0].name, ratio=ratio)
        first = first or found
        rows += [
            row,
            benchmarks.Row(name, found["peak"] / 2**20, "MiB at most"),
        ]
    return rows
