"""A cell of a study as a process: trains, then evaluates.

    python -m cappa_tf.studies.cell runs/study/cells/CapPa-seed0

Its folder holds

    cell.json       arguments of tools/train.py and tools/evaluate.py
    run/            the run
    transfer/NAME/  a run that starts from it, such as a linear probe
    evaluation/     NAME.json of each evaluator, and its other files
    log.txt         what both programs printed
    status.json     how it ended

Started again, it resumes: a run from its checkpoint, evaluations that are
complete not at all. `--cores=2,3` binds it to CPU cores.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time

from cappa_tf.utils import files

DONE, FAILED, INTERRUPTED = "done", "failed", "interrupted"
# Characters of the log in which its last line is searched.
_TAIL = 20_000
# gin adds lines to the message of an error.
_OF_GIN = ("In call to configurable", "No values supplied by Gin")
_PROGRESS_BAR = re.compile(r"\d+%\|")


def write(folder, description):
    """Writes cell.json; what has changed in it will be done again.

    Args:
        folder: Folder of the cell.
        description: Dict, `Cell.description`.

    Raises:
        ValueError: If the run was made with other arguments. Evaluations and
            probes of other arguments are deleted instead, as the run stays.
    """
    path = os.path.join(folder, "cell.json")
    if files.exists(path):
        found = json.loads(files.read_text(path))
        if found == description:
            return
        was, now = set(found["train"]), set(description["train"])
        if was != now:
            raise ValueError(
                f"{folder} was made with other arguments. Run it again from "
                f"its start with --again={os.path.basename(folder)}, or use "
                f"another --workdir. Received: {sorted(now - was)} instead of "
                f"{sorted(was - now)}"
            )
        stale = [
            os.path.join(folder, "transfer", name)
            for name, arguments in found["transfer"].items()
            if description["transfer"].get(name) != arguments
        ]
        if found["evaluate"] != description["evaluate"]:
            stale.append(os.path.join(folder, "evaluation"))
        for one in stale:
            if files.exists(one):
                files.rmtree(one)
        ended = status(folder)
        if ended is not None:
            # Not done any more; the time of the run is kept.
            ended |= {"state": INTERRUPTED, "message": "to be evaluated anew"}
            files.write_json(os.path.join(folder, "status.json"), ended)
    files.makedirs(folder)
    files.write_json(path, description)


def status(folder):
    """What status.json says, a dict with "state"; None before the first end."""
    path = os.path.join(folder, "status.json")
    return json.loads(files.read_text(path)) if files.exists(path) else None


def run(folder):
    """Trains and evaluates; returns the status that it has written.

    Args:
        folder: Folder of the cell, with cell.json.
    """
    description = json.loads(files.read_text(os.path.join(folder, "cell.json")))
    before = status(folder) or {}
    seconds = dict(before.get("seconds", {}))
    workdir = os.path.join(folder, "run")
    evaluation = os.path.join(folder, "evaluation")
    stages = [_training("train", workdir, description["train"])]
    for name, arguments in description["transfer"].items():
        encoder = f"--gin_param=ENCODER = {workdir!r}"
        path = os.path.join(folder, "transfer", name)
        stages.append(_training(name, path, [*arguments, encoder]))
    if description["evaluate"]:
        files.makedirs(evaluation)
        stages.append(
            (
                "evaluate",
                "evaluate",
                [
                    f"--checkpoint={workdir}",
                    f"--output={evaluation}",
                    *description["evaluate"],
                ],
                os.path.join(evaluation, "complete"),
            )
        )
    state, message = DONE, None
    for stage, tool, arguments, result in stages:
        if files.exists(result):
            continue
        start = time.monotonic()
        code = _call(tool, arguments, os.path.join(folder, "log.txt"))
        took = time.monotonic() - start
        seconds[stage] = seconds.get(stage, 0.0) + took
        if code == 0 and tool == "evaluate":
            files.write_text(result, "")
        if code or not files.exists(result):
            state = FAILED if code else INTERRUPTED
            line = _last_line(os.path.join(folder, "log.txt"))
            # The program's own name is at the beginning of its message.
            message = f"{stage}: {line.removeprefix(f'{tool}: ')}"
            break
    found = {"state": state, "message": message, "seconds": seconds}
    files.write_json(os.path.join(folder, "status.json"), found)
    return found


def _training(name, workdir, arguments):
    """A stage that is a run: (name, tool, arguments, file it ends with)."""
    result = os.path.join(workdir, "results.json")
    return name, "train", [f"--workdir={workdir}", *arguments], result


def _call(tool, arguments, log):
    """Runs a tool; a signal to this process is passed on to it."""
    command = [sys.executable, "-m", "cappa_tf.commands", tool, *arguments]
    with open(log, "ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)

        def forward(number, frame):
            del frame
            process.send_signal(number)

        numbers = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(number, forward) for number in numbers]
        try:
            return process.wait()
        finally:
            for number, handler in zip(numbers, before):
                signal.signal(number, handler)


def _last_line(log):
    """The last line of a log, apart from gin's comments and progress bars."""
    with open(log, "rb") as file:
        file.seek(max(0, os.path.getsize(log) - _TAIL))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines()]
    lines = [
        x
        for x in lines
        if x and not x.startswith(_OF_GIN) and not _PROGRESS_BAR.match(x)
    ]
    return lines[-1] if lines else "no output"


def main():
    """Runs the cell of the folder on the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--cores")
    given = parser.parse_args()
    if given.cores:
        # The tools inherit it, and make as many threads as they have cores.
        os.sched_setaffinity(0, map(int, given.cores.split(",")))
    found = run(given.folder)
    print(found["state"], found["message"] or "")
    sys.exit(found["state"] == FAILED)


if __name__ == "__main__":
    main()
