"""The terminal: without what TensorFlow tells its own developers."""

import logging as levels

import pytest
import tensorflow as tf
from absl import logging

from cappa_tf import console


@pytest.fixture
def written(capsys):
    """What absl's handler has written since the last call, from INFO on."""
    handler = logging.get_absl_handler()
    filters = [*handler.python_handler.filters]
    before = [*levels.root.handlers]
    verbosity = logging.get_verbosity()
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    yield lambda: capsys.readouterr().err
    logging.set_verbosity(verbosity)
    levels.root.handlers[:] = before
    handler.python_handler.filters[:] = filters


def write_what_tensorflow_logs_about(tmp_path):
    """A checkpoint and a SavedModel: messages of absl and of its own logger."""
    module = tf.Module()
    module.weight = tf.Variable(1.0)
    tf.train.Checkpoint(module=module).save(tmp_path / "checkpoint")
    tf.saved_model.save(module, str(tmp_path / "model"))


def test_messages_of_tensorflow_are_hidden(written, tmp_path):
    write_what_tensorflow_logs_about(tmp_path)
    before = written()
    assert "Sharding callback" in before
    assert "Assets written" in before
    console.hide_tensorflow_info()
    write_what_tensorflow_logs_about(tmp_path)
    assert written() == ""


def test_warnings_of_tensorflow_and_our_messages_are_not(written):
    console.hide_tensorflow_info()
    tf.get_logger().warning("a warning")
    logging.info("decoding images once")
    text = written()
    assert "a warning" in text
    assert "decoding images once" in text
