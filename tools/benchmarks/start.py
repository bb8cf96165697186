"""Seconds from the command to the first step, and where they go.

    python tools/benchmark.py start
    python tools/benchmark.py start --variant=L/16 --decoder_layers=6

1. The command: tools/train.py on a new folder until its first step has been
   made, in a process of its own, with --precision and without XLA as
   gin/cappa_b16.gin does it on a CPU. The baseline is importing TensorFlow and
   Keras in an otherwise empty process.
2. Its parts, measured in a further process: imports, building model and
   optimizer, tracing the step (the first step less the second), and the nodes
   of its graph.
3. Growth: seconds from opening a data set to its first batch, for the numbers
   of records in --records.
"""

import json
import os
import pathlib
import struct
import subprocess
import sys
import tempfile
import time

from absl import flags

from tools import benchmarks
from tools.benchmarks import models

_TRAIN = pathlib.Path(__file__).resolve().parents[1] / "train.py"


def define_flags():
    """Defines the flags of this benchmark."""
    models.define_flags()
    flags.DEFINE_integer("rounds", 3, "Turns.", lower_bound=1)
    flags.DEFINE_enum(
        "precision",
        "mixed_bfloat16",
        ["float32", "mixed_bfloat16"],
        "PRECISION of the run.",
    )
    flags.DEFINE_list("records", ["1000", "100000"], "Sizes of data sets.")
    flags.DEFINE_bool("parts", False, "Only measures the parts, prints them.")


def run():
    """Returns rows, or prints the parts and returns None."""
    options = models.given()
    if flags.FLAGS.parts:
        print(json.dumps(measure_parts(options, flags.FLAGS.precision)))
        return None
    with tempfile.TemporaryDirectory() as folder:
        rows = _command_rows(options, folder)
    return [*rows, *_record_rows()]


def _command_rows(options, folder):
    from tools.benchmarks import data

    # Enough for a batch.
    photos = data.load_photos(None)
    repeats = -(-options["batch_size"] // len(photos))
    data.write(os.path.join(folder, "data"), photos * repeats)
    _fill_vocabulary(os.path.join(folder, "data"), options["vocabulary_size"])

    def measure(way):
        benchmarks.note(way)
        if way == "parts":
            return benchmarks.in_a_process(
                "start", parts=True, precision=flags.FLAGS.precision, **options
            )
        command = [sys.executable, "-c", "import tensorflow, keras"]
        if way == "command":
            work = tempfile.mkdtemp(dir=folder)
            command = train_command(options, os.path.join(folder, "data"), work)
        start, used = time.perf_counter(), _children()
        _wait(command, work if way == "command" else None)
        return {
            "wall": time.perf_counter() - start,
            "cpu": _children() - used,
        }

    found = benchmarks.turns_of(
        ("imports", "command", "parts"), flags.FLAGS.rounds, measure
    )
    rows = []
    for way in ("imports", "command"):
        for key, unit in (("wall", "s"), ("cpu", "CPU s")):
            other = (None, None)
            if way == "command":
                ratio = benchmarks.ratio(found, way, "imports", key)
                other = ("imports", ratio)
            value = benchmarks.median(found, way, key)
            name = {"command": "command to first step"}.get(way, way)
            rows.append(benchmarks.Row(name, value, unit, *other))
    for part in found["parts"][0]:
        unit = "of the graph" if part == "nodes" else "s"
        value = benchmarks.median(found, "parts", part)
        rows.append(benchmarks.Row(part, value, unit))
    return rows


def _fill_vocabulary(folder, size):
    """Adds pieces that no text has, so that the vocabulary has a given size."""
    from cappa_tf.data import tokenizer

    found = tokenizer.Tokenizer(folder, 8).vocabulary_size
    if found > size:
        raise ValueError(
            f"--vocabulary_size must be at least {found}, the pieces of the "
            f"captions. Received: --vocabulary_size={size}"
        )
    # SentencePiece's ModelProto, to whose repeated field 1 messages may be
    # appended: `piece` (field 1) and `score` (field 2, float).
    with open(os.path.join(folder, tokenizer.FILE_NAME), "ab") as file:
        for i in range(size - found):
            piece = f"\u2581piece{i}".encode()
            fields = bytes([0x0A, len(piece)]) + piece
            fields += b"\x15" + struct.pack("<f", -100.0 - i)
            file.write(bytes([0x0A, len(fields)]) + fields)


def train_command(options, data, work):
    """The command line of a run of one step.

    Args:
        options: Dict of `models.SIZES`.
        data: Folder of the data.
        work: Folder of the run.
    """
    sizes = models.encoder_sizes(options)
    values = {
        "DATA": data,
        "EVAL_SPLIT": "train",
        "HIDDEN_DIM": sizes["hidden_dim"],
        "NUM_LAYERS": sizes["num_layers"],
        "NUM_HEADS": sizes["num_heads"],
        "MLP_DIM": sizes["mlp_dim"],
        "PATCH_SIZE": sizes["patch_size"],
        "DECODER_LAYERS": options["decoder_layers"],
        "IMAGE_SIZE": options["image_size"],
        "MAX_LENGTH": options["length"],
        "VOCABULARY_SIZE": options["vocabulary_size"],
        "BATCH_SIZE": options["batch_size"],
        "TOTAL_STEPS": 2,
        "WARMUP_STEPS": 1,
        "PRECISION": flags.FLAGS.precision,
    }
    return [
        sys.executable,
        str(_TRAIN),
        "--gin_file=gin/cappa_b16.gin",
        f"--workdir={work}",
        *(f"--gin_param={name}={value!r}" for name, value in values.items()),
    ]


def _wait(command, work):
    """Waits for a process, or for the file it writes after its first step."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        while process.poll() is None:
            if work and os.path.exists(_first_step(work)):
                process.kill()
                return
            time.sleep(0.02)
        if process.returncode:
            lines = process.stderr.read().strip().splitlines()
            raise ValueError(
                f"{command[1]} failed. Received: {lines[-1] if lines else ''}"
            )


def _first_step(work):
    return os.path.join(work, "operative_config-1.gin")


def _children():
    """CPU seconds of the processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def measure_parts(options, precision):
    """Seconds of each part of a start, and the nodes of the step's graph."""
    clock = [time.perf_counter()]

    def lap():
        clock.append(time.perf_counter())
        return clock[-1] - clock[-2]

    import tensorflow as tf

    from cappa_tf.training import construct, step
    from cappa_tf.training.optimizers import adafactor

    parts = {"imports, in process": lap()}
    strategy = tf.distribute.get_strategy()
    model, optimizer = construct.build_model(
        lambda: models.make_captioner(options),
        lambda: adafactor.Adafactor(weight_decay=1e-4, global_clip_norm=1.0),
        strategy,
        precision=precision,
    )
    parts["building"] = lap()
    batch = {
        "image": tf.constant(models.make_images(options)),
        "labels": tf.constant(models.make_labels(options)[:, None]),
        "index": tf.range(options["batch_size"], dtype=tf.int64),
    }
    iterator = iter(tf.data.Dataset.from_tensors(batch).repeat())
    loop = step.TrainLoop(strategy, model, optimizer, options["batch_size"])
    lap()
    loop(iterator, 1)
    first = lap()
    loop(iterator, 1)
    second = lap()
    parts["tracing"] = first - second
    parts["second step"] = second
    parts["nodes"] = loop.count_nodes(iterator)
    return parts


def _record_rows():
    """Seconds to the first batch, for several numbers of records."""
    from PIL import Image

    from tools.benchmarks import data

    image = data.jpeg(Image.new("RGB", (16, 16), (90, 30, 200)), 75)
    counts = [int(count) for count in flags.FLAGS.records]
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            path = os.path.join(folder, str(count))
            data.write(path, (image for _ in range(count)), shards=16)

        def measure(count):
            start = time.perf_counter()
            path = os.path.join(folder, str(count))
            stream = data.dataset(path, 16, batch_size=32, cache="stream")
            next(iter(stream.train()))
            return {"wall": time.perf_counter() - start}

        measure(counts[0])
        found = benchmarks.turns_of(counts, flags.FLAGS.rounds, measure)
    rows = []
    for count in counts:
        value = benchmarks.median(found, count, "wall")
        base = (f"{counts[0]:,} records",) if count != counts[0] else ()
        if base:
            base += (benchmarks.ratio(found, count, counts[0], "wall"),)
        name = f"first batch of {count:,} records"
        rows.append(benchmarks.Row(name, value, "s", *base))
    return rows
