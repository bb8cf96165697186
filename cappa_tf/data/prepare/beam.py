"""Conversion on the workers of Apache Beam (the extra `beam`).

Beam distributes only the plans (`conversion.Plan`). Its workers read the images
and write the shards themselves, so all of them need access to the input and
the output folder under the same names.
"""

import apache_beam as beam

from cappa_tf.data.prepare import conversion
from cappa_tf.utils import beam_pipeline


class _Convert(beam.DoFn):
    """Writes the shard of a plan; counts images and skips for the runner."""

    def __init__(self, workers):
        self._workers = workers

    def process(self, plan_path):
        result = conversion.convert(plan_path, self._workers)
        beam_pipeline.count("usable", result.shard.num_examples)
        for _, reason, _ in result.skipped:
            beam_pipeline.count(reason)
        yield plan_path


def convert(plans, runner, arguments, workers=None):
    """Writes the shards of all plans and waits for them.

    Args:
        plans: A list of `conversion.Plan`s.
        runner: As of `beam_pipeline.run`.
        arguments: As of `beam_pipeline.run`.
        workers: Number of threads per shard; by default one per core of the
            worker.

    Returns:
        Dict name -> count of Beam's counters; empty for a runner that keeps
        none.

    Raises:
        ValueError: As `beam_pipeline.run`.
    """
    paths = [plan.path for plan in plans]
    return beam_pipeline.run(
        paths, _Convert(workers), runner, arguments, "Convert"
    )
