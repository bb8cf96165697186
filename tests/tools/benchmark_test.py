"""The benchmarks compare equivalent computations."""

import json
import os
import random
import sys

import pytest
import small_run
import tensorflow as tf
import tiny
import tool_flags
from random_captioner import make_captioner

from cappa_tf import config
from tools import benchmark, benchmarks
from tools.benchmarks import caption, data, features, memory, models, score
from tools.benchmarks import start as start_benchmark
from tools.benchmarks.workers import protocol

# A captioner of one block each, in flags of a benchmark.
SIZES = {
    "variant": "Ti/16",
    "encoder_layers": 1,
    "image_size": 32,
    "batch_size": 2,
}
DECODER = {"decoder_layers": 1, "length": 8, "vocabulary_size": 80}
TURNS = {"rounds": 1, "steps": 1, "matmul": 16}


@pytest.fixture(name="rows")
def _rows(monkeypatch, capsys):
    """A function that runs a benchmark in this process; returns its rows."""

    def run(name, **values):
        given = [f"--{k}={v}" for k, v in values.items()]
        argv = ["benchmark", name, *given, "--json"]
        monkeypatch.setattr(sys, "argv", argv)
        with tool_flags.defined(benchmark):
            benchmark.flags.FLAGS(argv)
            benchmark.main(argv[:2])
        found = json.loads(capsys.readouterr().out)
        assert set(found) == {"benchmark", "machine", "rows"}
        assert found["benchmark"] == name and found["machine"]["cores"] >= 1
        for row in found["rows"]:
            assert set(row) == {"name", "value", "unit", "baseline", "ratio"}
            assert (row["baseline"] is None) == (row["ratio"] is None)
        return found["rows"]

    return run


def named(rows, name, unit):
    """The only row of a name whose unit begins so, without a comparison."""
    found = [
        row
        for row in rows
        if row["name"] == name and row["unit"].startswith(unit)
    ]
    return found[0]


def test_every_benchmark_can_be_loaded():
    for name in benchmark.BENCHMARKS:
        module = benchmark.load([name])
        assert callable(module.define_flags) and callable(module.run)
    with pytest.raises(
        ValueError, match=r"(?s)'speed'.*Benchmarks are:.*memory"
    ):
        benchmark.load(["speed"])


def test_both_ways_give_the_same_loss():
    sizes = {
        "batch_size": 8,
        "length": 6,
        "tokens": 3,
        "vocabulary_size": 50,
        "width": 16,
    }
    plain = memory.measure_loss("plain", **sizes)
    chunked = memory.measure_loss("chunked", **sizes)
    assert chunked["loss"] == pytest.approx(plain["loss"], rel=1e-5)


def test_ways_to_score_give_the_same_scores():
    """Also runs all methods, at a very small size."""
    captioner = models.make_scorer({**SIZES, **DECODER, "length": 14})
    labels = score.make_labels(9, 14, 30)
    lengths = (labels != 0).sum(1)
    assert lengths.min() >= 6 and lengths.max() <= 13
    ways = score.make_ways(captioner, labels, part=3)
    images = tf.random.stateless_uniform([2, 32, 32, 3], [0, 1])
    scores = {name: way(images)[:, :3] for name, (way, _) in ways.items()}
    for name in ("pass, cut", "prefix trees"):
        assert scores[name] == pytest.approx(scores["pass per label"], abs=1e-4)


def test_ways_to_caption_give_the_greedy_caption():
    captioner = make_captioner(length=5)
    images = caption.make_images(2, 16)
    for exact in (False, True):
        ways = caption.make_ways(captioner, 5, exact)
        same = caption.equal(
            {k: ways[k] for k in ("greedy", "uncached", "draft")}, images
        )
        assert same == {"greedy": 1.0, "uncached": 1.0, "draft": 1.0}
    assert tf.math.count_nonzero(ways["greedy"](images)) == 10


@pytest.mark.parametrize("kind", ["pre_logits", "encoded"])
def test_cached_features_train_on_the_same_examples(tmp_path, kind):
    small_run.write_data(str(tmp_path))
    data = small_run.data(str(tmp_path))
    size = data.tokenizer.vocabulary_size
    losses = []
    for way in features.WAYS:
        random.seed(0)  # What Keras' initializers sample from.
        if kind == "encoded":
            model = tiny.make_model(size)
        else:
            model = tiny.make_contrastive(size, embedding_dim=(None, 16))
        model.build()
        model.freeze(["vision_encoder"])
        streams, _ = features.make_streams(
            data, model.vision_encoder, str(tmp_path / "cache"), kind
        )
        sums = features.make_steps(model, streams[way], 8)(2)[0]
        total, weight = sums.figures["loss"]
        losses.append(total / weight)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_train_compares_ways_with_the_first(rows):
    found = rows(
        "train",
        **SIZES,
        **DECODER,
        **TURNS,
        tokens=4,
        cut=6,
        ways="float32,bfloat16-cut,float32-records",
        one_process=True,
    )
    assert named(found, "float32", "images/s")["baseline"] is None
    cut = named(found, "bfloat16-cut", "images/s")
    assert cut["baseline"] == "float32"
    assert named(found, "bfloat16-cut", "GFLOP/s")["baseline"] == (
        "matmul bfloat16"
    )
    # As only these two have run, the ratio is that of the rates.
    first = named(found, "float32", "images/s")["value"]
    assert cut["ratio"] == pytest.approx(cut["value"] / first, rel=1e-6)
    used = named(found, "bfloat16-cut", "CPU ms")
    assert used["ratio"] == pytest.approx(
        used["value"] / named(found, "float32", "CPU ms")["value"], rel=1e-6
    )


def test_embed_and_its_precisions(rows):
    found = rows(
        "embed", **SIZES, **TURNS, ways="float32,half,int8", one_process=True
    )
    apart = {
        row["name"]: row["value"]
        for row in found
        if row["unit"] == "largest difference to float32"
    }
    assert set(apart) == {"half", "int8"}
    assert 0.0 < apart["half"] < 0.2 and 0.0 < apart["int8"] < 0.2
    assert named(found, "int8", "GFLOP/s")["baseline"] == "matmul float32"


def test_caption_and_score_print_rows(rows):
    found = rows(
        "caption", **SIZES, **DECODER, **TURNS, tokens=3, ways="encode,greedy"
    )
    assert named(found, "greedy", "images/s")["baseline"] == "encode"
    found = rows(
        "score",
        **{**SIZES, **DECODER, **TURNS, "length": 14},
        labels=12,
        part=2,
    )
    assert named(found, "prefix trees", "images/s")["baseline"] == (
        "pass per label"
    )
    unit = "largest difference"
    assert named(found, "prefix trees", unit)["value"] < 1e-4


def test_memory_grows_on_a_line(rows, monkeypatch):
    def in_this_process(name, way, **values):
        assert name == "memory"
        if way == "softmax, chunked":
            return memory.measure_contrastive(way, **values)
        # What a step takes, without making one.
        images = values.get("images", 3)
        size = 2**20 * (5 + 2 * images)
        estimate = 2**20 * 3 * images
        return {
            "bytes": size,
            "estimate": estimate,
            "seconds": images,
            "loss": 1,
        }

    monkeypatch.setattr(benchmarks, "in_a_process", in_this_process)
    found = rows(
        "memory",
        batch_size=4,
        width=8,
        length=4,
        tokens=2,
        vocabulary_size=20,
        pairs=4,
        embedding=8,
        rounds=1,
        batches="1,2,4",
    )
    way = "mixed_bfloat16"
    slope = named(found, f"a further image, {way}", "MiB")["value"]
    assert slope == pytest.approx(2.0)
    estimate = named(found, f"a further image, {way}, estimated", "MiB")
    assert (estimate["value"], estimate["ratio"]) == (3.0, 1.5)
    middle = named(found, f"step of 2, {way}", "MiB")
    assert (middle["value"], middle["ratio"]) == (9.0, 1.0)
    assert named(found, f"step of 4, {way}", "ms/image")["ratio"] == 1.0


def test_one_step_is_measured_in_a_process_of_its_own():
    found = memory.measure_step(
        "float32", "Ti/16", 1, 32, 2, 8, tokens=3, vocabulary_size=40
    )
    assert found["loss"] == pytest.approx(3.689, abs=0.01)  # log(40)
    assert found["estimate"] > 0 and found["seconds"] > 0


def test_start_runs_what_it_says(rows, monkeypatch):
    commands = []

    def in_this_process(name, parts, precision, **options):
        assert name == "start" and parts
        return start_benchmark.measure_parts(options, precision)

    monkeypatch.setattr(benchmarks, "in_a_process", in_this_process)
    monkeypatch.setattr(
        start_benchmark, "_wait", lambda command, work: commands.append(command)
    )
    monkeypatch.setattr(
        start_benchmark, "_children", iter(range(1, 9)).__next__
    )
    found = rows(
        "start", **SIZES, **DECODER, tokens=4, rounds=1, records="40,80"
    )
    assert named(found, "nodes", "of the graph")["value"] > 100
    assert named(found, "command to first step", "s")["baseline"] == "imports"
    last = named(found, "first batch of 80 records", "s")
    assert last["baseline"] == "40 records"
    given = dict(x.lstrip("-").split("=", 1) for x in commands[1][2:5])
    assert given["gin_file"] == "gin/cappa_b16.gin"
    params = [x.split("=", 1)[1] for x in commands[1] if "gin_param" in x]
    config.parse([given["gin_file"]], params, workdir=given["workdir"])
    encoder = config.arguments()["model"]().vision_encoder
    assert (encoder.hidden_dim, encoder.num_layers) == (192, 1)


def test_data_prints_rows(rows, monkeypatch):
    def in_this_process(name, read):
        assert name == "data"
        return data.read_everything(read)

    monkeypatch.setattr(benchmarks, "in_a_process", in_this_process)
    monkeypatch.setattr(data, "_ENLARGED", (64, 48))
    monkeypatch.setattr(data, "_READ", 20)
    found = rows(
        "data", image_size=16, images=4, batch_size=2, rounds=1, records="8,16"
    )
    assert named(found, "enlarged pipeline", "images/s")["value"] > 0
    assert named(found, "after 16 records", "MiB resident")["ratio"] > 0


def test_features_print_rows(rows, tmp_path):
    small_run.write_data(str(tmp_path))
    found = rows(
        "features",
        data=str(tmp_path),
        layers=1,
        variant="Ti/8",
        image_size=16,
        length=8,
        batch_size=4,
        steps=1,
        rounds=1,
    )
    assert named(found, "cached", "images/s")["baseline"] == "images"


def test_a_plan_has_all_stages_of_a_run(rows, tmp_path):
    bindings = """
    include 'gin/cappa_b16_fast.gin'
    HIDDEN_DIM = 16
    NUM_LAYERS = 1
    DECODER_LAYERS = 1
    NUM_HEADS = 2
    MLP_DIM = 32
    MAX_LENGTH = 8
    VOCABULARY_SIZE = 27
    DATA = 'none'
    TOTAL_STEPS = 1000
    BATCH_SIZE = 8
    WARMUP_STEPS = 1
    """
    path = tmp_path / "fast.gin"
    path.write_text(bindings.replace("\n    ", "\n"))
    device = "name=x,bfloat16=1e12,bandwidth=1e11,memory=1e9,price=3"
    found = rows("plan", gin_file=path, device=device, count=1)
    seconds = [
        next(r["value"] for r in found if r["name"].startswith(name))
        for name in (
            "1 x x, stage 1 of 800 steps: step",
            "1 x x, stage 2 of 200 steps: step",
        )
    ]
    assert seconds[0] < seconds[1]
    hours = (800 * seconds[0] + 200 * seconds[1]) / 3600
    assert named(found, "1 x x: run", "days")["value"] == pytest.approx(
        hours / 24
    )
    assert named(found, "1 x x: cost", "$")["value"] == pytest.approx(3 * hours)


def test_the_check_of_a_plan_measures_products_of_step_and_update(
    rows, tmp_path
):
    bindings = """
    include 'gin/flickr8k.gin'
    HIDDEN_DIM = 16
    NUM_LAYERS = 1
    DECODER_LAYERS = 1
    NUM_HEADS = 2
    MLP_DIM = 32
    MAX_LENGTH = 8
    VOCABULARY_SIZE = 27
    IMAGE_SIZE = 32
    DATA = 'none'
    BATCH_SIZE = 4
    JIT_COMPILE = False
    """
    path = tmp_path / "muon.gin"
    path.write_text(bindings.replace("\n    ", "\n"))
    found = rows("plan", gin_file=path, check=True, matmul=32, copy=1, rounds=1)
    measured = {row["name"] for row in found if "GFLOP/s" in row["unit"]}
    assert "update: 16x16 by 16x32" in measured
    assert any(not name.startswith(("update", "matmul")) for name in measured)
    planned = named(found, "planned: products", "s")["value"]
    assert 0.0 < planned < named(found, "measured step", "s")["value"] * 10


@pytest.mark.parametrize(
    "name, given, message",
    [
        ("train", {"ways": "float64"}, "--ways must be of the form"),
        ("train", {"ways": "float32,float32"}, "--ways must be among"),
        ("train", {"tokens": 9, "length": 8}, "--tokens must be at most"),
        ("train", {"cut": 2, "tokens": 3}, "--cut must be at least"),
        ("embed", {"ways": "int4"}, "--ways must be among"),
        ("caption", {"ways": "greedy"}, "--ways must have encode and greedy"),
        ("train", {"reference": "."}, "--reference_python go together"),
        (
            "train",
            {"reference": ".", "reference_python": sys.executable},
            "--reference must be a checkout",
        ),
        ("memory", {"batches": "8,4"}, "--batches must be increasing"),
        ("plan", {"devices": "A1"}, "--devices must be among A100, H100"),
        ("plan", {"device": "name=mine"}, "--device: A device must be"),
        ("plan", {}, "Give a --gin_file"),
    ],
)
def test_a_bad_flag_is_refused_by_name(rows, name, given, message):
    with pytest.raises(SystemExit, match=message):
        rows(name, **given)


WORKER = """
import protocol

def make(options):
    print("not an answer")
    calls = []
    if options["fails"]:
        raise ValueError("what is wrong")

    def run():
        calls.append(0)
        return [len(calls)]

    return run, {"asked": options["fails"]}

protocol.serve(make)
"""


def test_a_process_waits_for_its_turn(tmp_path, monkeypatch):
    copy = tmp_path / "protocol.py"
    with open(protocol.__file__) as file:
        copy.write_text(file.read())
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(protocol, "__file__", str(copy))
    worker = benchmarks.Process("worker", {"fails": False}, sys.executable)
    try:
        assert worker.facts == {"asked": False}
        found = worker.measure(3, str(tmp_path / "last.npy"))
        assert set(found) == {"wall", "cpu", "peak_bytes"}
        assert list(data.np.load(tmp_path / "last.npy")) == [3]
    finally:
        worker.close()
    with pytest.raises(ValueError, match="ended early.*what is wrong"):
        benchmarks.Process("worker", {"fails": True}, sys.executable)


def test_ratios_are_those_within_a_turn():
    """A machine that becomes slower changes both sides of a ratio."""
    turns = iter([1.0, 2.0, 8.0, 4.0, 10.0, 20.0])
    found = benchmarks.turns_of("ab", 3, lambda way: {"x": next(turns)})
    assert [x["x"] for x in found["a"]] == [1.0, 4.0, 10.0]
    assert [x["x"] for x in found["b"]] == [2.0, 8.0, 20.0]
    assert benchmarks.ratio(found, "b", "a", "x") == 2.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "embed", "score"])
def test_the_reference_gives_the_same(rows, name):
    """With CAPPA_TEST_BIG_VISION, a checkout, and .._PYTHON for it."""
    path = os.environ.get("CAPPA_TEST_BIG_VISION")
    python = os.environ.get("CAPPA_TEST_BIG_VISION_PYTHON")
    if not (path and python):
        pytest.skip("no checkout of big_vision: set CAPPA_TEST_BIG_VISION")
    given = {**SIZES, **TURNS, "one_process": True}
    if name != "embed":
        given |= {**DECODER, "length": 14}
    given |= {
        "train": {"tokens": 4, "cut": 6, "ways": "float32"},
        "embed": {"ways": "float32"},
        "score": {"labels": 12, "part": 3},
    }[name]
    found = rows(name, **given, reference=path, reference_python=python)
    way = "pass per label" if name == "score" else "float32"
    assert named(found, way, "images/s")["baseline"] == "reference"
    if name != "train":
        unit = "largest difference to reference"
        assert named(found, way, unit)["value"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["embed", "caption"])
def test_peers_are_models_of_transformers(rows, name):
    pytest.importorskip("torch", reason="pip install '.[interop]'")
    pytest.importorskip("transformers", reason="pip install '.[interop]'")
    given = {**SIZES, **TURNS, "peers": True}
    if name == "caption":
        given |= {**DECODER, "tokens": 3, "ways": "encode,greedy"}
    else:
        given |= {"ways": "float32", "one_process": True}
    assert named(rows(name, **given), "peers bfloat16", "images/s")["value"] > 0
