"""A function for each of many elements, on Apache Beam (the extra `beam`).

Beam only distributes the elements. Its workers read and write files themselves,
so all of them need access to these under the same names.
"""

import logging
import os
import pathlib
import tempfile
import traceback
import uuid

import apache_beam as beam
from apache_beam.options import pipeline_options

COUNTED = "counted"
_QUIET = "--default_sdk_harness_log_level=WARNING"


def count(reason, number=1):
    """Adds to the counters that `run` returns, on a worker.

    Args:
        reason: Name of the counter.
        number: What to add.
    """
    beam.metrics.Metrics.counter(COUNTED, reason).inc(number)


def run(elements, do_fn, runner, arguments, name):
    """Passes all elements through a `beam.DoFn` and waits for the end.

    Args:
        elements: A list of elements that Beam can encode.
        do_fn: The `beam.DoFn`.
        runner: Name of a Beam runner: DirectRunner, DataflowRunner, ...
        arguments: Beam's own pipeline options, as on a command line.
        name: Name of the step.

    Returns:
        Dict name -> sum of `count`; empty for a runner that keeps none.

    Raises:
        ValueError: If an element failed, or the DirectRunner does not know an
            option. For other runners Beam only warns, as they may have options
            that its Python side does not know.
    """
    # Beam reports each start and end of each of its channels.
    logging.getLogger("apache_beam").setLevel(logging.WARNING)
    options = pipeline_options.PipelineOptions(
        [f"--runner={runner}", _QUIET, *arguments]
    )
    if runner == "DirectRunner":
        known = options.get_all_options(drop_default=True)
        given = options.get_all_options(
            drop_default=True, retain_unknown_options=True
        )
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(
                "Options after -- must be Beam's. Received: "
                + ", ".join(f"--{option}" for option in unknown)
            )
        return _run_here(elements, do_fn, options, name)
    return _run(elements, do_fn, options, name)


class _Reporting(beam.DoFn):
    """Another DoFn, whose first error goes to a file and ends the work.

    The DirectRunner waits forever for a process (of its `multi_processing`) in
    which an element has failed.
    """

    def __init__(self, do_fn, folder):
        self._do_fn, self._folder = do_fn, folder

    def process(self, element):
        """Yields what the other one does, or nothing after an error."""
        if os.listdir(self._folder):
            return
        try:
            yield from self._do_fn.process(element)
        except Exception as error:
            if not isinstance(error, ValueError | OSError):
                traceback.print_exc()
            path = pathlib.Path(self._folder, uuid.uuid4().hex)
            path.write_text(str(error) or type(error).__name__)


def _run_here(elements, do_fn, options, name):
    """Runs on the processes or threads of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        counts = _run(elements, _Reporting(do_fn, folder), options, name)
        errors = sorted(pathlib.Path(folder).iterdir())
        if errors:
            raise ValueError(errors[0].read_text())
    return counts


def _run(elements, do_fn, options, name):
    _let_workers_find_the_package()
    pipeline = beam.Pipeline(options=options)
    # Without Reshuffle one worker would get all elements.
    _ = (
        pipeline
        | "Elements" >> beam.Create(elements)
        | "Deal" >> beam.Reshuffle()
        | name >> beam.ParDo(do_fn)
    )
    try:
        result = pipeline.run()
        result.wait_until_finish()
    except RuntimeError as error:
        # The message ends with the traceback of the worker.
        lines = [line for line in str(error).splitlines() if line.strip()]
        cause = [line for line in lines if _is_error(line)]
        raise ValueError((cause or lines or ["unknown error"])[-1]) from error
    return {
        counter.key.metric.name: counter.result
        for counter in result.metrics().query()["counters"]
        if counter.key.metric.namespace == COUNTED
    }


def _is_error(line):
    return not line.startswith((" ", "\t")) and "Error: " in line


def _let_workers_find_the_package():
    """For worker processes that Beam starts on this machine."""
    root = str(pathlib.Path(__file__).resolve().parents[2])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if root not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, *paths]))
