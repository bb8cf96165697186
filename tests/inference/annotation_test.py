"""Annotation of whole data sets: the same bytes whatever does the work."""

import io
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import tensorflow as tf
import tiny
from conftest import ROOT
from PIL import Image

from cappa_tf.data import schema
from cappa_tf.data.caption_dataset import CaptionDataset
from cappa_tf.data.description import DatasetDescription
from cappa_tf.data.schema import Example
from cappa_tf.data.sources.mixture import Mixture
from cappa_tf.data.sources.webdataset import WebDataset
from cappa_tf.inference import annotation, annotator
from cappa_tf.inference.annotation import AnnotationOptions
from cappa_tf.inference.predictor import Predictor
from cappa_tf.saving import run_folder

BAD = "image cannot be decoded"
# Records of a shard of "recaptioned", whose bytes are those of other jobs.
SIZE = 3


def write_run(folder, make=tiny.make_model, seed=1):
    """The folder of an untrained run, whose captions differ."""
    folder.mkdir()
    model = make(tiny.vocabulary(folder)[1])
    model.build()
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if "decoder" in weight.path and len(weight.shape) > 1:
            weight.assign(rng.normal(0, 0.5, weight.shape))
    run_folder.describe_run(str(folder), model, tiny.Data(folder))
    run_folder.save_model(str(folder), model)
    return folder


def png(seed, size=16):
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 255, (size, size, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def make_examples(count, bad=()):
    return [
        Example(
            f"k{i}",
            b"no image" if i in bad else png(i),
            [f"red {'circle' if i % 2 else 'square'}"] + ["blue"] * (i % 3),
            label=i % 2,
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {
        "captioner": str(write_run(folder / "captioner")),
        "other": str(write_run(folder / "other", seed=2)),
        "towers": str(write_run(folder / "towers", tiny.make_contrastive)),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eleven records in three shards; the fifth is not an image."""
    folder = tmp_path_factory.mktemp("data") / "some"
    examples = make_examples(11, bad=(4,))
    splits = {"train": examples[:8], "test": examples[8:]}
    metadata = {"source": "made", "classes": ["cat", "dog"]}
    schema.write_dataset(
        splits, folder, "some", {"train": 2, "test": 1}, metadata
    )
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_graph(runs):
    """Opens and traces each model once for all tests of this file.

    A test of what opens a model asks for `opened_anew`.
    """
    opened, decoders = {}, {}
    really, really_decoder = Predictor.open, Predictor.make_decoder

    def open_once(path, weights="auto", *, batch_size=32):
        key = (path, batch_size)
        if key not in opened:
            opened[key] = really(path, weights, batch_size=batch_size)
        return opened[key]

    def decoder_once(self, **generation):
        key = (id(self), repr(generation))
        if key not in decoders:
            decoders[key] = really_decoder(self, **generation)
        return decoders[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Predictor, "open", open_once)
        patch.setattr(Predictor, "make_decoder", decoder_once)
        yield


def annotate(source, output, run, shard_size=100, **options):
    given = {
        name: options.pop(name)
        for name in ("splits", "overwrite", "runner", "runner_arguments")
        if name in options
    }
    return annotation.annotate(
        source,
        output,
        run,
        AnnotationOptions(batch_size=2, **options),
        shard_size=shard_size,
        **given,
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def examples_of(folder, split="train"):
    """The examples of a split, and the further features of each."""
    found = []
    for shard in DatasetDescription.load(folder).shards(split):
        for record in tf.data.TFRecordDataset(shard.path).as_numpy_iterator():
            feature = tf.train.Example.FromString(record).features.feature
            found.append((schema.deserialize(record), feature))
    return found


@pytest.fixture(scope="module")
def recaptioned(data, runs, tmp_path_factory):
    """The output "out", and the report."""
    output = tmp_path_factory.mktemp("whole") / "out"
    return output, annotate(data, output, runs["captioner"], SIZE)


def test_captions_are_those_of_each_image_alone(recaptioned, runs):
    output, _ = recaptioned
    predictor = Predictor.open(runs["captioner"], batch_size=2)
    captions = []
    for example, feature in examples_of(output):
        image = predictor.preprocessing.read_bytes(example.image)
        (row,) = predictor.decoder.decode(image[None], [example.key])
        # Random weights may end in an unknown token, which has a space.
        assert example.captions == [row.caption.strip()]
        np.testing.assert_allclose(
            feature["log_likelihoods"].float_list.value,
            [row.log_likelihood],
            rtol=1e-5,
        )
        captions.append(row.caption)
    assert len(set(captions)) > 1


def test_keys_images_labels_splits_and_classes_are_kept(recaptioned, data):
    output, report = recaptioned
    for split in ("train", "test"):
        old = {e.key: e for e, _ in examples_of(data, split)}
        new = {e.key: e for e, _ in examples_of(output, split)}
        assert new.keys() == old.keys() - {"k4"}
        for key, example in new.items():
            assert example.image == old[key].image
            assert example.label == old[key].label
    description = DatasetDescription.load(output)
    description.verify(checksums=True)
    assert description.metadata["classes"] == ["cat", "dog"]
    # Four records of a shard are two pieces.
    assert report.splits == {"train": (7, 4), "test": (3, 1)}


def test_a_bad_image_is_counted_and_named(recaptioned):
    output, report = recaptioned
    assert report.skipped.counts == {BAD: 1}
    assert (output / annotation.LOG_NAME).read_text() == f"{BAD}\tk4\n"
    assert DatasetDescription.load(output).metadata["skipped"] == {BAD: 1}


def test_the_output_trains(recaptioned, runs):
    output, _ = recaptioned
    tokenizer, preprocessing = run_folder.load_preprocessing(runs["captioner"])
    dataset = CaptionDataset(
        output, "train", tokenizer, preprocessing=preprocessing
    )
    batch = next(iter(dataset.train(7)))
    captions = [e.captions[0] for e, _ in examples_of(output)]
    expected = tokenizer(captions).numpy()
    assert sorted(batch["labels"][:, 0].numpy().tolist()) == sorted(
        expected.tolist()
    )
    assert dataset.skipped == {}


def test_captions_can_be_added(data, recaptioned, runs, tmp_path):
    annotate(data, tmp_path / "out", runs["captioner"], keep_captions=True)
    old = {e.key: e.captions for e, _ in examples_of(data)}
    new = {e.key: e.captions for e, _ in examples_of(recaptioned[0])}
    for example, feature in examples_of(tmp_path / "out"):
        assert example.captions == old[example.key] + new[example.key]
        known = np.isfinite(feature["log_likelihoods"].float_list.value)
        assert known.tolist() == [False] * len(old[example.key]) + [True]


def test_questions_stay_with_their_answers_where_captions_are_added():
    example = Example("k", b"", ["yes"], None, ["is it?"], ["yes/no"])
    added = annotator._with_captions(example, ["a"], example)
    assert (added.captions, added.prompts) == (["yes", "a"], ["is it?", ""])
    assert added.question_types == ["yes/no", ""]
    assert annotator._with_captions(example, ["a"]).prompts is None


class Stop(Exception):
    """An injected failure."""


def stop_after(pieces, monkeypatch):
    """Lets the work on the next piece fail halfway."""
    left, write = [pieces], annotation.Worker._write

    def counted(self, piece, records, annotator, on_record):
        if not left[0]:
            raise Stop
        left[0] -= 1
        return write(self, piece, records, annotator, on_record)

    monkeypatch.setattr(annotation.Worker, "_write", counted)


def test_a_killed_job_resumes(data, recaptioned, runs, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        with pytest.raises(Stop):
            annotate(data, output, runs["captioner"], SIZE)
    assert [path.name for path in output.iterdir()] == [annotation.FOLDER]
    # Of a process that was killed while it wrote a shard.
    (output / annotation.FOLDER / ".incomplete-x-1.tfrecord").write_text("half")
    # A damaged shard is written again.
    (shard,) = (output / annotation.FOLDER).glob("train-00001-*.tfrecord")
    shard.write_bytes(shard.read_bytes()[:-1])
    report = annotate(data, output, runs["captioner"], SIZE)
    assert report.reused == 1
    assert contents(output) == contents(recaptioned[0])


def test_a_complete_output_is_left_as_it_is(recaptioned, data, runs):
    output, report = recaptioned
    before = {p.name: p.stat().st_mtime_ns for p in output.iterdir()}
    again = annotate(data, output, runs["captioner"], SIZE)
    assert again.was_complete
    assert (again.splits, again.skipped.counts) == (
        report.splits,
        report.skipped.counts,
    )
    assert {p.name: p.stat().st_mtime_ns for p in output.iterdir()} == before


def test_the_output_of_another_job_is_refused(
    data, recaptioned, runs, tmp_path, monkeypatch
):
    output, _ = recaptioned
    before = contents(output)
    with pytest.raises(ValueError, match="differs .* in: weights. Write to"):
        annotate(data, output, runs["other"], SIZE)
    with pytest.raises(ValueError, match="differs .* in: keep_captions"):
        annotate(data, output, runs["captioner"], SIZE, keep_captions=True)
    with pytest.raises(ValueError, match="differs .* in: data"):
        annotate(data, output, runs["captioner"], SIZE, splits=["train"])
    with pytest.raises(ValueError, match="differs .* in: origin"):
        annotate(recaptioned[0], data, runs["captioner"], SIZE)
    with pytest.raises(ValueError, match="another folder than the data"):
        annotate(data, data, runs["captioner"], SIZE, overwrite=True)
    assert contents(output) == before
    unfinished = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        with pytest.raises(Stop):
            annotate(data, unfinished, runs["other"], SIZE)
    with pytest.raises(ValueError, match="unfinished job, .* in: weights"):
        annotate(data, unfinished, runs["captioner"], SIZE)
    report = annotate(data, unfinished, runs["captioner"], SIZE, overwrite=True)
    assert report.reused == 0
    assert contents(unfinished) == before


def test_what_changes_during_a_job_is_not_mixed(data, runs, tmp_path):
    """Neither other weights nor other data, as a worker would find them."""
    options = AnnotationOptions(batch_size=2)
    predictor = Predictor.open(runs["captioner"], batch_size=2)
    key = annotation.job_key(annotator.Annotator(predictor, options), options)
    source = annotation.prepared.as_source(data)
    job = annotation.Job(
        annotation.pickle.dumps(source),
        runs["other"],
        "auto",
        options,
        str(tmp_path),
        key,
    )
    worker = annotation.Worker(job)
    piece = annotation.Piece("train", 0, 0, 0, 0, 0, 3)
    with pytest.raises(ValueError, match="records 0 to 2"):
        worker.write(piece)
    digest = annotation.piece_digest(key, source.split("train"), piece)
    with pytest.raises(ValueError, match="weights of .*other changed"):
        worker.write(annotation.dataclasses.replace(piece, digest=digest))


def write_tars(folder, examples):
    """Two tar files of the split "train"."""
    folder.mkdir()
    for number in range(2):
        path = folder / f"train-{number:05d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for example in examples[number::2]:
                files = {
                    "png": example.image,
                    "txt": example.captions[0].encode(),
                }
                for suffix, content in files.items():
                    member = tarfile.TarInfo(f"{example.key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def write_images(folder, examples):
    """Images with text files beside them."""
    folder.mkdir()
    for example in examples:
        (folder / f"{example.key}.png").write_bytes(example.image)
        (folder / f"{example.key}.txt").write_text(example.captions[0])


def test_every_source_is_read_in_pieces(data, recaptioned, runs, tmp_path):
    """Alone by its path, and in a mixture of all of them."""
    examples = make_examples(11, bad=(4,))[:8]
    write_tars(tmp_path / "tars", examples)
    write_images(tmp_path / "images", examples)
    expected = sorted(e.captions[0] for e, _ in examples_of(recaptioned[0]))

    def captions(output):
        found = {e.key: e.captions for e, _ in examples_of(output)}
        assert len(set(found)) == len(found)
        return sorted(caption for (caption,) in found.values())

    jobs = {
        "tars": {"splits": ["train"]},
        "tars/train-*.tar": {"splits": ["train"]},
        "tars/{split}-*.tar": {"splits": ["train"]},
    }
    for number, (path, given) in enumerate(jobs.items()):
        output = tmp_path / f"out{number}"
        report = annotate(tmp_path / path, output, runs["captioner"], **given)
        assert captions(output) == expected
        assert report.skipped.counts == {BAD: 1}
    # The folder divides its images itself.
    report = annotate(
        tmp_path / "images", tmp_path / "folder", runs["captioner"]
    )
    assert report.skipped.lines == [f"{BAD}\tk4.png"]
    found = [
        e.captions[0]
        for split in report.splits
        for e, _ in examples_of(tmp_path / "folder", split)
    ]
    assert sorted(found) == expected
    mixture = Mixture([str(data), WebDataset(tmp_path / "tars")], [1, 3])
    annotate(mixture, tmp_path / "mixed", runs["captioner"], splits=["train"])
    assert captions(tmp_path / "mixed") == sorted(expected * 2)
    with pytest.raises(ValueError, match="one split .--splits"):
        annotate(
            tmp_path / "tars" / "train-*.tar", tmp_path / "x", runs["captioner"]
        )
    with pytest.raises(ValueError, match="does not tell .*--splits"):
        annotate(tmp_path / "tars", tmp_path / "x", runs["captioner"])


def test_a_replaced_image_costs_only_its_piece(
    data, runs, tmp_path, monkeypatch
):
    write_images(tmp_path / "images", make_examples(6))
    output = tmp_path / "out"
    job = (tmp_path / "images", output, runs["captioner"])
    total = 6
    with monkeypatch.context() as patch:
        patch.setattr(annotation, "_finish", lambda *arguments: None)
        annotate(*job, shard_size=1)
    (tmp_path / "images" / "k3.png").write_bytes(png(99, 20))
    assert annotate(*job, shard_size=1).reused == total - 1


def test_parquet_has_a_row_for_each_record(data, recaptioned, runs, tmp_path):
    parquet = pytest.importorskip(
        "pyarrow.parquet", reason="pip install '.[parquet]'"
    )
    output = tmp_path / "out"
    given = {"file_format": "parquet"}
    report = annotate(data, output, runs["captioner"], **given)
    assert report.splits == {"train": (8, 2), "test": (3, 1)}
    rows = {
        row["key"]: row
        for path in output.glob("out-train-*.parquet")
        for row in parquet.read_table(path).to_pylist()
    }
    bad = rows.pop("k4")
    assert (bad["error"], bad["captions"]) == (BAD, None)
    for example, _ in examples_of(recaptioned[0]):
        row = rows.pop(example.key)
        assert row["captions"] == example.captions
        assert (row["label"], row["error"]) == (example.label, None)
    assert not rows
    assert annotate(data, output, runs["captioner"], **given).was_complete
    with pytest.raises(ValueError, match="in: weights"):
        annotate(data, output, runs["other"], **given)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="which holds .'notes.txt'"):
        annotate(data, output, runs["other"], **given, overwrite=True)


@pytest.mark.parametrize("run", ["captioner", "towers"])
def test_scores_are_those_of_the_records_captions(data, runs, tmp_path, run):
    annotate(data, tmp_path / "out", runs[run], write="scores")
    predictor = Predictor.open(runs[run], batch_size=2)
    found = examples_of(tmp_path / "out")
    assert len(found) == 7
    for example, feature in found:
        image = predictor.preprocessing.read_bytes(example.image)
        (scores,) = predictor.score_captions(image[None], [example.captions])
        np.testing.assert_allclose(
            feature["scores"].float_list.value, scores, rtol=1e-4, atol=1e-6
        )


def test_labels_and_embeddings(data, runs, tmp_path):
    predictor = Predictor.open(runs["captioner"], batch_size=2)
    labels = ["red circle", "blue", "green"]
    annotate(
        data,
        tmp_path / "labels",
        runs["captioner"],
        write="scores",
        labels=labels,
    )
    annotate(data, tmp_path / "embedded", runs["captioner"], write="embeddings")
    embedded = {e.key: f for e, f in examples_of(tmp_path / "embedded")}
    for example, feature in examples_of(tmp_path / "labels"):
        image = predictor.preprocessing.read_bytes(example.image)[None]
        (scores,) = predictor.score(image, labels)
        np.testing.assert_allclose(
            feature["scores"].float_list.value, scores, rtol=1e-4
        )
        best = feature["best"].bytes_list.value[0].decode()
        assert best == labels[scores.argmax()]
        np.testing.assert_allclose(
            embedded[example.key]["embedding"].float_list.value,
            predictor.features(image)[0],
            rtol=1e-4,
            atol=1e-6,
        )
        assert example.captions[0].startswith("red")


def test_what_the_model_cannot_do_is_refused_before_any_work(
    data, runs, tmp_path
):
    output = tmp_path / "out"
    for given, message in (
        ({"write": "captions"}, "Captioning needs .*: generate"),
        ({"write": "scores", "kind": "parallel"}, "kind='parallel'"),
        ({"write": "embeddings", "kind": "blind"}, "kind='blind'"),
        ({"write": "embeddings", "labels": ["a"]}, "`labels` is for"),
    ):
        with pytest.raises(ValueError, match=message):
            annotate(data, output, runs["towers"], **given)
    with pytest.raises(ValueError, match="trained without prompts"):
        annotate(data, output, runs["captioner"], prompt="caption:")
    questions = [Example("k", png(0), ["yes"], None, ["is it?"])]
    schema.write_dataset({"test": questions}, tmp_path / "asked", "asked")
    with pytest.raises(ValueError, match="answer questions"):
        annotate(tmp_path / "asked", output, runs["captioner"], write="scores")
    schema.write_dataset(
        {"test": make_examples(1, bad=(0,))}, tmp_path / "bad", "bad"
    )
    with pytest.raises(ValueError, match="No image .* 1 x image cannot"):
        annotate(tmp_path / "bad", output, runs["captioner"])
    assert not list(output.iterdir())


def beam(mode, workers=2):
    pytest.importorskip("apache_beam", reason="pip install '.[beam]'")
    return {
        "runner": "DirectRunner",
        "runner_arguments": [
            f"--direct_num_workers={workers}",
            f"--direct_running_mode={mode}",
        ],
    }


def test_two_threads_of_beam_write_the_same_bytes(
    data, recaptioned, runs, tmp_path
):
    output = tmp_path / "out"
    report = annotate(
        data, output, runs["captioner"], SIZE, **beam("multi_threading")
    )
    assert contents(output) == contents(recaptioned[0])
    assert report.skipped.lines == recaptioned[1].skipped.lines


def test_an_error_of_a_worker_is_one_line(data, runs, tmp_path, monkeypatch):
    given = beam("in_memory", 1)

    def fail(self, piece, on_record=None):
        raise ValueError("of this worker")

    monkeypatch.setattr(annotation.Worker, "write", fail)
    with pytest.raises(ValueError, match="^of this worker.*$"):
        annotate(data, tmp_path / "out", runs["captioner"], **given)


def start(data, output, run):
    """A process of its own, which writes a shard for each record."""
    code = (
        "import sys; from cappa_tf.inference import annotation; "
        "print(annotation.annotate(*sys.argv[1:], "
        "annotation.AnnotationOptions(batch_size=2), shard_size=1).reused)"
    )
    arguments = map(str, (data, output, run))
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def elsewhere(data, runs, tmp_path_factory):
    """The output "out" of an uninterrupted process.

    TensorFlow optimizes graphs there, which tests leave out (conftest.py), so
    the last bits may be others than in this process.
    """
    output = tmp_path_factory.mktemp("elsewhere") / "out"
    assert start(data, output, runs["captioner"]).communicate()[0] == "0\n"
    return output


@pytest.mark.slow
def test_two_processes_of_beam_write_the_same_bytes(
    data, elsewhere, runs, tmp_path
):
    output = tmp_path / "out"
    annotate(data, output, runs["captioner"], 1, **beam("multi_processing"))
    assert contents(output) == contents(elsewhere)


@pytest.mark.slow
def test_kill_9_costs_at_most_a_shard(data, elsewhere, runs, tmp_path):
    """The process is killed as soon as it has written a shard."""
    job = (data, tmp_path / "out", runs["captioner"])
    process = start(*job)
    folder = job[1] / annotation.FOLDER
    while not list(folder.glob("*.result")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    written = len(list(folder.glob("*.result")))
    assert 1 <= written < 11
    assert start(*job).communicate()[0] == f"{written}\n"
    assert contents(job[1]) == contents(elsewhere)
