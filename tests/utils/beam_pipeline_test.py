"""Pipelines of Beam: an error ends them, in whichever process it happens."""

import pytest

pytest.importorskip("apache_beam", reason="pip install '.[beam]'")
import apache_beam as beam

from cappa_tf.utils import beam_pipeline

PROCESSES = ("--direct_running_mode=multi_processing", "--direct_num_workers=2")


class _Check(beam.DoFn):
    def process(self, element):
        if element < 0:
            raise ValueError(f"must not be negative. Received: {element}")
        yield element


@pytest.mark.parametrize(
    "arguments",
    [(), pytest.param(PROCESSES, marks=pytest.mark.slow)],
    ids=["one process", "two processes"],
)
def test_an_error_ends_the_run(arguments):
    with pytest.raises(ValueError, match="negative. Received: -1$"):
        beam_pipeline.run(
            [3, -1, 2], _Check(), "DirectRunner", arguments, "Check"
        )
