"""Errors of the data reach the user in the data set's own words."""

import types

import pytest
import tensorflow as tf

from cappa_tf.training.run import plain_data_errors

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
