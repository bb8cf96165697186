"""Shared fixtures: quiet TensorFlow, a clean gin, optional real data."""

import functools
import gc
import inspect
import os
import pathlib

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Code that XLA compiles here runs once or twice, and optimizing it would take
# an eighth of the time of these tests without changing their results.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import tensorflow as tf
from tensorflow.python.framework import ops

# Two devices for tests of several replicas; possible only before the first op.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * 2,
)
# Grappler goes over each function of each pipeline anew, which is half of what
# a small one costs. It is on in the processes that tests start by themselves:
# the tools, and the hosts of a run.
tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})

ROOT = pathlib.Path(__file__).resolve().parents[1]


# pytest and the tests each import this file, so it may be wrapped already.
_init_strategy = inspect.unwrap(tf.distribute.MirroredStrategy.__init__)


@functools.wraps(_init_strategy)
def _refuse_strategy(self, *args, **kwargs):
    raise AssertionError("Tests share the strategy of conftest.two_devices().")


tf.distribute.MirroredStrategy.__init__ = _refuse_strategy


@functools.cache
def two_devices():
    """The strategy over both devices, shared by all tests.

    Each strategy numbers its collective operations from the start, so those of
    a second one in the same process would meet the numbers of the first: they
    give wrong sums, or wait for each other for ever.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tf.distribute.MirroredStrategy, "__init__", _init_strategy
        )
        return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def shared_data(name):
    """Path of an optional real data set; skips the test if it is absent.

    Args:
        name: A folder or file below `CAPPA_TEST_DATA` (by default
            `../shared/data` beside the repository).
    """
    default = ROOT.parent / "shared" / "data"
    path = pathlib.Path(os.environ.get("CAPPA_TEST_DATA", default)) / name
    if not path.exists():
        pytest.skip(f"real data not found: {path} (set CAPPA_TEST_DATA)")
    return path


def shared_reference(name):
    """Path of an optional file of reference arrays; skips if it is absent.

    Args:
        name: A file below `CAPPA_TEST_REFERENCE` (by default
            `../shared/reference` beside the repository).
    """
    default = ROOT.parent / "shared" / "reference"
    path = pathlib.Path(os.environ.get("CAPPA_TEST_REFERENCE", default)) / name
    if not path.exists():
        pytest.skip(f"reference not found: {path} (set CAPPA_TEST_REFERENCE)")
    return path


def pytest_collection_finish():
    """What was imported is not searched by each collection of garbage."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _forget_graphs():
    """Frees the graphs that the tests of a file have traced.

    TensorFlow keeps the gradient of each use of `tf.custom_gradient` in a graph
    under a name of its own, and with it the graph: gigabytes over all tests.
    """
    registry = ops.gradient_registry._registry
    known = set(registry)
    yield
    for name in registry.keys() - known:
        if name.startswith("CustomGradient-"):
            del registry[name]
    gc.collect()


@pytest.fixture(autouse=True)
def _clean_gin():
    """Clears gin, so that no binding of one test affects the next."""
    import gin

    gin.clear_config()
    yield
    gin.clear_config()


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """A small captioner behind a server (tests/serving.py)."""
    pytest.importorskip("tensorflow_serving", reason="pip install '.[serving]'")
    import serving

    from cappa_tf.export import saved_model

    folder = tmp_path_factory.mktemp("served")
    run = serving.write_run(folder)
    model = folder / "model"
    saved_model.export_saved_model(
        model, serving.service(run), name=serving.NAME
    )
    with serving.serve(run, model) as running:
        yield running
