"""Conversion on the workers of Apache Beam (the extra `beam`).

Beam distributes only the plans (`conversion.Plan`). Its workers read the images
and write the shards themselves, so all of them need access to the input and
the output folder under the same names.
"""

import apache_beam as beam
from apache_beam.options import pipeline_options

from cappa_tf.data.prepare import conversion

_PICTURES = "pictures"


class _Convert(beam.DoFn):
    """Writes the shard of a plan; counts images and skips for the runner."""

    def __init__(self, workers):
        self._workers = workers

    def process(self, plan_path):
        result = conversion.convert(plan_path, self._workers)
        counter = beam.metrics.Metrics.counter
        counter(_PICTURES, "usable").inc(result.shard.num_examples)
        for _, reason, _ in result.skipped:
            counter("skipped", reason).inc()
        yield plan_path


def convert(plans, runner, arguments, workers=None):
    """Writes the shards of all plans and waits for them.

    Args:
        plans: A list of `conversion.Plan`s.
        runner: Name of a Beam runner: DirectRunner, DataflowRunner, ...
        arguments: Beam's own pipeline options, as on a command line.
        workers: Number of threads per shard; by default one per core of the
            worker.

    Returns:
        Dict name -> count of Beam's counters; empty for a runner that keeps
        none.

    Raises:
        ValueError: If the DirectRunner does not know an option. For other
            runners Beam only warns, as they may have options that its Python
            side does not know.
    """
    options = pipeline_options.PipelineOptions(
        [f"--runner={runner}", *arguments]
    )
    if runner == "DirectRunner":
        known = options.get_all_options(drop_default=True)
        given = options.get_all_options(
            drop_default=True, retain_unknown_options=True
        )
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(
                "Options after -- must be Beam's. Received: "
                + ", ".join(f"--{name}" for name in unknown)
            )
    pipeline = beam.Pipeline(options=options)
    # Without Reshuffle one worker would write all shards.
    _ = (
        pipeline
        | "Plans" >> beam.Create([plan.path for plan in plans])
        | "Deal" >> beam.Reshuffle()
        | "Convert" >> beam.ParDo(_Convert(workers))
    )
    result = pipeline.run()
    result.wait_until_finish()
    return {
        counter.key.metric.name: counter.result
        for counter in result.metrics().query()["counters"]
        if counter.key.metric.namespace in (_PICTURES, "skipped")
    }
