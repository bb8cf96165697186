"""What a benchmark and its worker processes say to each other.

One JSON object a line. The first that a worker reads are its options; it
answers with facts once it is ready. Each further one asks for a measurement,
`{"count": 3, "save": null}`. The worker ends with its standard input.

Needs nothing but Python, as some workers run in another environment.
"""

import json
import os
import pathlib
import resource
import sys
import time


def serve(make):
    """Answers requests until standard input ends.

    Args:
        make: Function of the options that returns (function to measure, dict
            of facts).
    """
    # What libraries print must not get between the answers.
    answers = open(os.dup(1), "w", buffering=1)  # noqa: SIM115
    os.dup2(2, 1)
    requests = iter(sys.stdin.readline, "")
    run, facts = make(json.loads(next(requests)))
    print(json.dumps(facts), file=answers)
    for line in requests:
        print(json.dumps(measured(run, **json.loads(line))), file=answers)


def measured(run, count, save=None):
    """Runs a function several times.

    Args:
        run: Function without arguments.
        count: Number of runs.
        save: Optional path of an npy file for the last result.

    Returns:
        Dict of `wall` and `cpu`, seconds a run (CPU: user and system time of
        all threads), and `peak_bytes`.
    """
    start, used = time.perf_counter(), time.process_time()
    for _ in range(count):
        result = run()
    found = {
        "wall": (time.perf_counter() - start) / count,
        "cpu": (time.process_time() - used) / count,
        "peak_bytes": peak_bytes(),
    }
    if save is not None and result is not None:
        import numpy as np

        np.save(save, result)
    return found


def peak_bytes():
    """Peak resident memory of this process so far, in bytes."""
    try:
        # `getrusage` would count what the parent held when it forked.
        status = pathlib.Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(x for x in status.splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
