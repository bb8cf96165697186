"""A run is the same on one device, on several, and on several hosts."""

import json
import os
import signal

import numpy as np
import processes
import pytest
import small_run
from conftest import two_devices

from cappa_tf.models import stateless_random
from cappa_tf.saving.checkpoints import saved_state
from cappa_tf.training import train
from cappa_tf.training.distribution.hosts import Hosts, _messages
from cappa_tf.training.distribution.strategies import make_strategy

FIGURES = (
    "train/loss",
    "train/autoregressive/nll_per_token",
    "train/parallel/nll_per_token",
    "train/gradient_norm",
    "validation/nll_per_token",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))
    small_run.write_data(folder)
    return folder


@pytest.fixture(scope="module")
def one_device(data, tmp_path_factory):
    """Folder of a run of 20 steps on one device, never interrupted."""
    folder = str(tmp_path_factory.mktemp("one"))
    small_run.run(
        data, folder, deterministic=False, sample_images=0, evaluate=True
    )
    return folder


def _assert_same_run(one, other):
    for tag in FIGURES:
        _assert_same_figures(one, other, tag)
    arrays = small_run.saved(one), small_run.saved(other)
    assert arrays[0].keys() == arrays[1].keys()
    for name, array in arrays[0].items():
        np.testing.assert_allclose(
            arrays[1][name], array, rtol=1e-4, atol=1e-5, err_msg=name
        )
    states = [
        saved_state(os.path.join(f, "checkpoints", "step-20"))
        for f in (one, other)
    ]
    for state in states:
        state["best"] = pytest.approx(state["best"], rel=1e-5)
    assert states[0] == states[1]
    if not os.path.exists(os.path.join(other, "sheet.png")):
        return
    results = []
    for folder in (one, other):
        with open(os.path.join(folder, "results.json")) as file:
            results.append(json.load(file))
    assert "evaluation/perplexity/blind/perplexity" in results[0]
    assert results[1] == pytest.approx(results[0], rel=1e-5)
    _assert_same_figures(one, other, "evaluation/perplexity/nll_per_token")


def _assert_same_figures(one, other, tag):
    wanted, found = (small_run.logged(f, tag) for f in (one, other))
    assert wanted.keys() == found.keys() and wanted, tag
    for step, value in wanted.items():
        assert found[step] == pytest.approx(value, rel=1e-5), (tag, step)


def test_two_devices_are_the_same_run(data, one_device, tmp_path, monkeypatch):
    """With microbatches, too; each of the two alone is in step_test.py."""
    monkeypatch.setattr(
        train, "make_strategy", lambda name, devices: two_devices()
    )
    small_run.run(
        data,
        tmp_path,
        deterministic=False,
        sample_images=0,
        evaluate=True,
        accumulation_steps=2,
    )
    _assert_same_run(one_device, str(tmp_path))


def _start(data, run, folder, blow, sample_images=0):
    """Two hosts of a run; returns their exit codes and outputs."""
    workers = processes.start_workers(
        2, small_run.worker, data, run, blow, sample_images, folder=folder
    )
    codes = [worker.wait() for worker in workers]
    return codes, [worker.output for worker in workers]


def test_two_hosts_are_the_same_run(data, one_device, tmp_path):
    """Preempted after step 7, and resumed to the end."""
    run = str(tmp_path / "run")
    # Only the second host gets the signal; both stop after the same step.
    codes, outputs = _start(data, run, tmp_path, (1, 7, signal.SIGTERM))
    assert codes == [0, 0], outputs
    for output in outputs:
        assert "'step': 8, 'interrupted': 'SIGTERM'" in output
    assert os.path.exists(os.path.join(run, "checkpoints", "step-8.index"))

    codes, outputs = _start(data, run, tmp_path, None, sample_images=3)
    assert codes == [0, 0], outputs
    assert "resuming from" in outputs[0] and "step-8" in outputs[0]
    # A process that writes leaves a file of TensorBoard's.
    assert len(os.listdir(os.path.join(run, "tensorboard"))) == 2
    for name in ("sheet.png", "samples.png", "model.keras"):
        assert os.path.getsize(os.path.join(run, name)) > 0
    _assert_same_run(one_device, run)


def test_two_hosts_compare_the_whole_batch(data, tmp_path):
    """A contrastive run on one device, and one whose hosts see half of it."""
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    workers = processes.start_workers(
        2, small_run.contrastive_worker, data, two, folder=tmp_path
    )
    small_run.contrastive_run(data, one)
    codes = [worker.wait() for worker in workers]
    assert codes == [0, 0], [worker.output for worker in workers]
    for tag in ("train/loss", "train/gradient_norm"):
        _assert_same_figures(one, two, tag)
    arrays = small_run.saved(one), small_run.saved(two)
    assert arrays[0].keys() == arrays[1].keys()
    for name, array in arrays[0].items():
        np.testing.assert_allclose(
            arrays[1][name], array, rtol=1e-4, atol=1e-5, err_msg=name
        )


@pytest.mark.slow
def test_a_host_that_is_killed_ends_the_others(data, one_device, tmp_path):
    run = str(tmp_path / "run")
    codes, outputs = _start(data, run, tmp_path, (1, 12, signal.SIGKILL))
    assert codes == [1, -signal.SIGKILL], outputs
    assert "WorkerLostError: Another worker ended" in outputs[0]
    codes, outputs = _start(data, run, tmp_path, None)
    assert codes == [0, 0], outputs
    assert "resuming from" in outputs[0] and "step-10" in outputs[0]
    _assert_same_run(one_device, run)


@pytest.mark.parametrize(
    ("cache", "numbers"), [("stream", (2, 3)), ("records", (3,))]
)
def test_hosts_share_the_stream_with_its_captions_and_masks(
    data, cache, numbers
):
    """Host h of H has positions p % H == h; steps hold the same for all H.

    So their number may change between two starts, at any position.
    """
    start = 35  # of 37 in an epoch, and no multiple of the hosts
    options = {"cache": cache, "captions_per_image": 2, "flip": True}
    dataset = small_run.data(data, **options)
    model = small_run.make_model(data, seed=5)
    whole = _by_position(model, dataset.train(6, start, seed=3), 2)
    assert sorted(whole) == list(range(start, start + 12))
    for hosts in numbers:
        shares = [
            _by_position(
                model, dataset.train(6 // hosts, start, 3, h, hosts), 2
            )
            for h in range(hosts)
        ]
        together = {p: e for share in shares for p, e in share.items()}
        assert together.keys() == whole.keys()
        for h, share in enumerate(shares):
            assert {p % hosts for p in share} == {h}
        for position, example in whole.items():
            for part, other in zip(example, together[position], strict=True):
                np.testing.assert_array_equal(part, other)


def _by_position(model, batches, count):
    """Position to (pixels, labels, objective, decoder's input)."""
    examples = {}
    for batch in batches.take(count):
        index, labels = batch["index"], batch["labels"]
        seeds = stateless_random.example_seeds(model.seed, index)
        parallel = model._sample_parallel(seeds, len(index))
        inputs, _, _ = model._decoder_inputs(labels[:, 0], parallel, seeds)
        rows = zip(index.numpy(), batch["image"], labels, parallel, inputs)
        for position, *example in rows:
            examples[int(position)] = [part.numpy() for part in example]
    return examples


def test_values_of_any_length_travel_in_words():
    import pickle

    values = [None, {"a": [1.5, "x" * 7]}, np.arange(5)]
    words = []
    for value in values:
        pickled = pickle.dumps(value)
        padded = pickled + b"\0" * (-len(pickled) % 4)
        words += [len(pickled), *np.frombuffer(padded, np.int32)]
    found = list(_messages(np.array(words, np.int32)))
    assert found[:2] == values[:2]
    np.testing.assert_array_equal(found[2], values[2])


def test_a_single_host_asks_nobody():
    hosts = Hosts(make_strategy("one"))
    assert (hosts.count, hosts.index, hosts.is_chief) == (1, 0, True)
    assert hosts.gather("x") == ["x"] and hosts.first(None) is None
