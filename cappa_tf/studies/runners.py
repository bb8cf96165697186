"""Where the cells of a study run: this machine, a Ray cluster, Slurm."""

import concurrent.futures
import os
import shlex
import subprocess
import sys

from cappa_tf.studies import cell
from cappa_tf.utils import arguments, files

_RETRIES = 3


def run_local(folders, report, devices=None):
    """Runs cells on this machine, one at a time or one a device.

    Args:
        folders: Folders of the cells.
        report: Function (folder, status), called when a cell has ended.
        devices: Numbers of the GPUs to use, one cell each; None for one cell
            at a time on all devices.
    """
    free = list(devices or [None])

    def run(folder):
        device = free.pop()
        environment = dict(os.environ)
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(device)
        try:
            return _run(folder, environment)
        finally:
            free.append(device)

    with concurrent.futures.ThreadPoolExecutor(len(free)) as pool:
        waiting = {pool.submit(run, folder): folder for folder in folders}
        try:
            for done in concurrent.futures.as_completed(waiting):
                report(waiting[done], done.result())
        except KeyboardInterrupt:
            # The running cells got the same signal and save a checkpoint.
            pool.shutdown(cancel_futures=True)
            raise


def _run(folder, environment=None):
    """Runs a cell in a process of its own; returns its status."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cappa_tf.studies.cell", folder],
        stdout=subprocess.DEVNULL,
        env=environment,
    )
    code = process.wait()
    found = cell.status(folder)
    if code < 0 or found is None:
        message = f"its process ended with code {code}"
        return {"state": cell.FAILED, "message": message, "seconds": {}}
    return found


def run_ray(folders, report, address=None, cpus=1.0, gpus=0.0, run=_run):
    """Runs cells on a Ray cluster; a cell whose machine is lost runs again.

    All machines must see the study's folder under the same path.

    Args:
        folders: Folders of the cells.
        report: Function (folder, status), called when a cell has ended.
        address: Address of the cluster; None starts one on this machine.
        cpus: CPU cores of a cell.
        gpus: GPUs of a cell.
        run: Function folder -> status that runs a cell.
    """
    arguments.check_extra("--runner=ray", "ray", "ray")
    import ray

    ray.init(address=address, log_to_driver=False)
    try:
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=_RETRIES)(
            run
        )
        waiting = {remote.remote(folder): folder for folder in folders}
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            folder = waiting.pop(done)
            try:
                found = ray.get(done)
            except ray.exceptions.RayError as error:
                # Its end is the error, after the trace of the worker.
                message = str(error).strip().rpartition("\n")[2]
                found = {
                    "state": cell.FAILED,
                    "message": message,
                    "seconds": {},
                }
            report(folder, found)
    finally:
        ray.shutdown()


def write_slurm(folders, workdir, options=()):
    """Writes a job array of Slurm for the cells.

    Args:
        folders: Folders of the cells.
        workdir: Folder of the study, which all machines must see.
        options: Options of sbatch, such as "--gres=gpu:1".

    Returns:
        Path of the script, for sbatch.
    """
    workdir = files.absolute(workdir)
    listing = os.path.join(workdir, "cells.txt")
    paths = [files.absolute(folder) for folder in folders]
    files.write_text(listing, "".join(f"{path}\n" for path in paths))
    script = os.path.join(workdir, "slurm.sh")
    lines = [
        "#!/bin/bash",
        "#SBATCH --job-name=cappa-study",
        f"#SBATCH --array=1-{len(folders)}",
        f"#SBATCH --output={workdir}/slurm-%A_%a.txt",
        # A checkpoint is saved before the time limit, and the job starts again.
        "#SBATCH --signal=TERM@120",
        "#SBATCH --requeue",
        *(f"#SBATCH {option}" for option in options),
        f"listing={shlex.quote(listing)}",
        'folder="$(sed -n "${SLURM_ARRAY_TASK_ID}p" "${listing}")"',
        f"cd {shlex.quote(os.getcwd())}",
        f"exec srun {shlex.quote(sys.executable)} -m cappa_tf.studies.cell "
        '"${folder}"',
    ]
    files.write_text(script, "".join(f"{line}\n" for line in lines))
    return script
