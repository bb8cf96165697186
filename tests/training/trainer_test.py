"""Errors of the data reach the user with the data set's own message."""

import types

import pytest
import tensorflow as tf
import tiny

from cappa_tf.training.trainer import plain_data_errors

FINE = types.SimpleNamespace(failure=None)
BROKEN = types.SimpleNamespace(failure=ValueError("3 of 100 records are bad"))


def _end_a_step():
    raise tf.errors.UnknownError(None, None, "trace upon trace")


def test_the_data_sets_own_error_is_raised():
    with (
        pytest.raises(ValueError, match="3 of 100 records"),
        plain_data_errors(None, FINE, BROKEN),
    ):
        _end_a_step()


def test_other_errors_pass():
    with (
        pytest.raises(tf.errors.UnknownError),
        plain_data_errors(None, FINE),
    ):
        _end_a_step()


def test_before_the_first_step(tmp_path):
    """Where the images of the samples are read."""

    class Bad(tiny.Data):
        failure = None

        def evaluate(self, batch_size, host=0, num_hosts=1):
            self.failure = BROKEN.failure
            raise tf.errors.UnknownError(None, None, "a long trace")

    with pytest.raises(ValueError, match="3 of 100 records are bad"):
        tiny.run(
            tmp_path,
            workdir=str(tmp_path / "run"),
            sample_images=1,
            eval_data=Bad(tmp_path),
        )
