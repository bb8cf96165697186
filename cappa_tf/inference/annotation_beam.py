"""Annotation on the workers of Apache Beam (the extra `beam`).

Beam distributes only the pieces. Its workers open the model, read the records
and write the shards themselves, so all of them need access to the model, the
data and the output under the same names.
"""

import collections

import apache_beam as beam
from apache_beam.utils import shared

from cappa_tf.inference import annotation
from cappa_tf.utils import beam_pipeline


class _Annotate(beam.DoFn):
    """Writes the shard of a piece, with one model in each process."""

    def __init__(self, job):
        self._job, self._shared = job, shared.Shared()

    def process(self, piece):
        worker = self._shared.acquire(lambda: annotation.Worker(self._job))
        result = worker.write(piece)
        beam_pipeline.count("written", result["shard"]["num_examples"])
        counts = collections.Counter(reason for reason, _ in result["skipped"])
        for reason, number in counts.items():
            beam_pipeline.count(reason, number)
        yield piece.number


def run(job, pieces, runner, arguments):
    """Writes the shards of all pieces and waits for them.

    Args:
        job: `annotation.Job`.
        pieces: List of `annotation.Piece`s.
        runner: As of `beam_pipeline.run`.
        arguments: As of `beam_pipeline.run`.

    Returns:
        Dict name -> count of Beam's counters.

    Raises:
        ValueError: As `beam_pipeline.run`.
    """
    return beam_pipeline.run(
        pieces, _Annotate(job), runner, arguments, "Annotate"
    )
