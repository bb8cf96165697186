"""Strategies: devices are found, or the error lists those found."""

import json
import re

import pytest
import tensorflow as tf
import tiny
from conftest import two_devices

from cappa_tf.training.distribution import strategies
from cappa_tf.training.distribution.strategies import (
    check_static_shapes,
    make_strategy,
    on_replicas,
    tf_config_workers,
    training_iterator,
)


def _tf_config(kind="worker", index=1, **cluster):
    cluster = cluster or {"worker": ["a:1", "b:2"]}
    return json.dumps(
        {"cluster": cluster, "task": {"type": kind, "index": index}}
    )


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("TF_CONFIG", "TPU_NAME", "KUBE_GOOGLE_CLOUD_TPU_ENDPOINTS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "config, wanted",
    [
        ("", ([], 0)),
        ("{}", ([], 0)),
        (_tf_config(), (["a:1", "b:2"], 1)),
        (
            _tf_config(chief=["c:0"], worker=["a:1", "b:2"]),
            (["c:0", "a:1", "b:2"], 2),
        ),
        (
            _tf_config("chief", 0, chief=["c:0"], worker=["a:1"]),
            (["c:0", "a:1"], 0),
        ),
    ],
)
def test_workers_are_counted_from_the_chief(monkeypatch, config, wanted):
    monkeypatch.setenv("TF_CONFIG", config)
    assert tf_config_workers() == wanted


@pytest.mark.parametrize(
    "config, found",
    [
        ("{'cluster'", "JSONDecodeError"),
        ("[]", "AttributeError"),
        ('{"cluster": {"worker": ["a:1", "b:2"]}}', "KeyError: 'task'"),
        (_tf_config(index=2), "there is no worker 2"),
        (_tf_config("evaluator"), "there is no evaluator"),
        (_tf_config(ps=["p:1"], worker=["a:1", "b:2"]), "jobs .'ps'. are not"),
    ],
)
def test_a_cluster_that_makes_no_sense_is_shown(monkeypatch, config, found):
    monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(ValueError, match=f"TF_CONFIG must name.*{found}"):
        make_strategy("auto")


@pytest.mark.parametrize(
    "environment, name, devices, message",
    [
        ({}, "all", None, "must be one of .*multi_worker.*'all'"),
        ({}, "multi_worker", None, "at least two workers.*TF_CONFIG=None"),
        (
            {"TF_CONFIG": _tf_config(index=0, worker=["a:1"])},
            "multi_worker",
            None,
            "at least two workers",
        ),
        ({"TF_CONFIG": _tf_config()}, "one", None, "for one process.*a:1"),
        ({"TF_CONFIG": _tf_config()}, "mirrored", None, "for one process"),
        ({"TF_CONFIG": _tf_config()}, "auto", ["CPU:0"], "all GPUs of each"),
        ({}, "tpu", None, "needs a TPU.*TPU_NAME is not set.*CPU:0"),
        ({"TPU_NAME": "local"}, "tpu", None, "found no TPU under .*'local'"),
        ({"TPU_NAME": "local"}, "tpu", ["CPU:0"], "all cores of the TPU"),
        ({}, "mirrored", ["CPU:0"], "at least two devices.*CPU:1"),
        ({}, "mirrored", ["GPU:3", "GPU:4"], "name devices of this machine"),
        ({}, "one", ["CPU:0", "CPU:1"], "at most one device"),
    ],
)
def test_impossible_choices_are_refused_with_what_was_found(
    monkeypatch, environment, name, devices, message
):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make_strategy(name, devices)


def test_auto_takes_the_first_that_is_there(monkeypatch):
    def choice():
        return strategies._best_choice(tf_config_workers()[0], None)

    assert choice() == "one"
    monkeypatch.setattr(strategies, "_names", lambda kind: ["GPU:0", "GPU:1"])
    assert choice() == "mirrored"
    monkeypatch.setenv("TPU_NAME", "pod")
    assert choice() == "tpu"
    monkeypatch.setenv("TF_CONFIG", _tf_config())
    assert choice() == "multi_worker"


@pytest.mark.parametrize(
    "capabilities, built, compiled, said",
    [
        ([], ["sm_60", "compute_90"], False, ""),
        ([(8, 9)], ["sm_60", "compute_90"], True, ""),
        ([(9, 0), (9, 0)], ["sm_60", "compute_90"], True, ""),
        (
            [(10, 0)],
            ["sm_60", "compute_90"],
            False,
            "GPU 10.0 has .* 10.0.* 9.0",
        ),
        ([(9, 0), (12, 0)], ["sm_90a"], False, "GPU 12.0 has .* 12.0.* 9.0"),
        # A TensorFlow that supports them, and one that does not tell.
        ([(12, 0)], ["sm_80", "sm_120a"], True, ""),
        ([(12, 1)], ["sm_80", "compute_120"], True, ""),
        ([(9, 0)], None, True, ""),
        ([None], ["sm_80"], True, ""),
    ],
)
def test_xla_is_left_off_where_it_would_end_the_process(
    monkeypatch, caplog, capabilities, built, compiled, said
):
    """The devices are made up: as TensorFlow describes them."""

    def details(device):
        found = capabilities[int(device.name.rpartition(":")[2])]
        if found is None:
            return {}
        name = "GPU {}.{}".format(*found)
        return {"compute_capability": found, "device_name": name}

    devices = [
        tf.config.PhysicalDevice(f"/physical_device:GPU:{i}", "GPU")
        for i in range(len(capabilities))
    ]
    monkeypatch.setattr(
        tf.config,
        "get_visible_devices",
        lambda kind: devices if kind == "GPU" else [],
    )
    monkeypatch.setattr(
        strategies,
        "_names",
        lambda kind: [d.name for d in devices] if kind == "GPU" else [],
    )
    monkeypatch.setattr(tf.config.experimental, "get_device_details", details)
    info = {} if built is None else {"cuda_compute_capabilities": built}
    monkeypatch.setattr(tf.sysconfig, "get_build_info", lambda: info)
    with caplog.at_level("WARNING", logger="absl"):
        assert strategies.use_xla("auto") is compiled
        assert strategies.use_xla(False) is False
        assert re.search(said, caplog.text)
        assert bool(caplog.text) is bool(said)
        # If requested, it is tried, but the reason is logged first.
        caplog.clear()
        assert strategies.use_xla(True) is True
        assert re.search(said, caplog.text)
        assert bool(caplog.text) is bool(said)


def test_several_workers_come_before_anything_else_has_run(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", _tf_config())
    tf.zeros([])  # TensorFlow has chosen its devices.
    with pytest.raises(ValueError, match="before TensorFlow has run anything"):
        make_strategy("auto")


def test_a_step_has_the_same_examples_on_two_devices(tmp_path):
    data, strategy = tiny.Data(tmp_path), two_devices()
    iterator = training_iterator(strategy, data.train, 8)
    for step in range(3):
        index = strategy.experimental_local_results(next(iterator)["index"])
        found = tf.concat(index, 0).numpy().tolist()
        assert found == list(range(8 * step, 8 * step + 8))


def test_devices_share_a_batch_and_join_their_results():
    def double(batch):
        assert batch["x"].shape == (3, 2)
        return {"twice": 2 * batch["x"]}

    x = tf.reshape(tf.range(12.0), [6, 2])
    found = on_replicas(two_devices(), double)({"x": x})["twice"]
    assert (found.numpy() == 2 * x.numpy()).all()


def test_a_tpu_wants_closed_shapes():
    spec = {"labels": tf.TensorSpec([8, None]), "index": tf.TensorSpec([8])}
    with pytest.raises(ValueError, match="`length_buckets`.*labels"):
        check_static_shapes(spec)
    check_static_shapes({"labels": tf.TensorSpec([8, 64])})
