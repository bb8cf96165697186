"""The entry point of a study: runs its cells and writes the report.

It knows nothing of gin: `cappa_tf.config` calls it with what the files bind.
"""

import contextlib
import logging
import os

from cappa_tf.saving.run_lock import RunLock
from cappa_tf.studies import cell as cells
from cappa_tf.studies import results, runners
from cappa_tf.studies.report import write_report
from cappa_tf.studies.study import Study
from cappa_tf.utils import arguments, files

RUNNERS = ("local", "ray", "slurm", "none")


def compare(
    study: Study | None = None,
    workdir: str | None = None,
    *,
    flops_of=None,
    runner="local",
    again: list | tuple = (),
    only: list | tuple = (),
    devices: list | tuple | None = None,
    processes: int | None = None,
    ray_address: str | None = None,
    cpus=1.0,
    gpus=0.0,
    slurm_options: list | tuple = (),
    log=logging.info,
):
    """Runs the cells of a study that are not done, and reports on all.

    Args:
        study: The `Study`.
        workdir: Its folder; cells, figures and report are below it.
        flops_of: See `Study.cells`; given by the caller, not by a gin file.
        runner: "local", "ray" or "slurm", or "none" to report only.
        again: Names of cells to run again from their start.
        only: Names of the cells to run; all by default.
        devices: Numbers of the GPUs for "local", a cell on each.
        processes: Cells at a time for "local", each on its share of the CPU
            cores.
        ray_address: Address of a cluster for "ray"; None starts one here.
        cpus: CPU cores of a cell, for "ray".
        gpus: GPUs of a cell, for "ray".
        slurm_options: Options of sbatch for "slurm".
        log: Function that prints a line.

    Returns:
        List of `results.Row`.

    Raises:
        ValueError: If an argument cannot be used, or a cell was made with
            other arguments.
    """
    if not isinstance(study, Study) or not workdir:
        raise ValueError(
            "A study and a folder (WORKDIR) are needed. Received: "
            f"study={study!r}, workdir={workdir!r}"
        )
    arguments.check_choice(RUNNERS, runner=runner)
    for name, value, only_for in (
        ("devices", devices, "local"),
        ("processes", processes, "local"),
        ("ray_address", ray_address, "ray"),
        ("slurm_options", slurm_options or None, "slurm"),
    ):
        if value is not None and runner != only_for:
            raise ValueError(
                f"`{name}` goes with runner={only_for!r}. Received: "
                f"{name}={value!r}, runner={runner!r}"
            )
    with contextlib.ExitStack() as stack:
        if runner in ("local", "ray"):
            # Two programs would run the same cells.
            files.makedirs(workdir)
            stack.enter_context(RunLock(workdir))
        return _compare(
            study,
            workdir,
            flops_of,
            again,
            only,
            log,
            run={
                "local": lambda folders, report: runners.run_local(
                    folders, report, devices, processes
                ),
                "ray": lambda folders, report: runners.run_ray(
                    folders, report, ray_address, cpus, gpus
                ),
                "slurm": lambda folders, report: _submit(
                    folders, workdir, slurm_options, log
                ),
                "none": lambda folders, report: None,
            }[runner],
        )


def _submit(folders, workdir, options, log):
    """Writes the script for Slurm and says how to go on."""
    script = runners.write_slurm(folders, workdir, options)
    log(f"Submit the cells with: sbatch {script}")
    log("Afterwards --runner=none writes the report.")


def _compare(study, workdir, flops_of, again, only, log, run):
    """Runs the cells that are missing by `run(folders, report)`."""
    planned = {cell.name: cell for cell in study.cells(flops_of)}
    for name in (*again, *only):
        if name not in planned:
            raise ValueError(
                f"There is no cell {name!r} (--again, --only). The study has: "
                f"{', '.join(planned)}"
            )
    folders = {
        os.path.join(workdir, "cells", name): cell
        for name, cell in planned.items()
    }
    for folder, cell in folders.items():
        if cell.name in again and files.exists(folder):
            files.rmtree(folder)
        cells.write(folder, cell.description())
    missing = [folder for folder in folders if not _is_done(folder)]
    waiting = [f for f in missing if not only or folders[f].name in only]
    log(
        f"{len(folders)} cells: {len(folders) - len(missing)} done, "
        f"{len(waiting)} to run"
    )

    def report(folder, status):
        message = status["message"] or ""
        log(f"{folders[folder].name}: {status['state']} {message}".rstrip())
        _report(study, folders, workdir)

    if waiting:
        run(waiting, report)
    rows, table = _report(study, folders, workdir)
    log(table.rstrip())
    if all(row.state == cells.DONE for row in rows):
        measured = {name for row in rows for name in row.metrics}
        for name in study.metrics:
            if name not in measured:
                log(f"No run has the metric {name!r} of the study")
    log(f"report: {os.path.join(workdir, 'report.html')}")
    return rows


def _is_done(folder):
    found = cells.status(folder)
    return found is not None and found["state"] == cells.DONE


def _report(study, folders, workdir):
    rows = [
        results.read_row(cell, folder, study.reached)
        for folder, cell in folders.items()
    ]
    results.add_times(study, rows)
    return rows, write_report(study, rows, workdir)
