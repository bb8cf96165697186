"""Where the cells of a study run: this machine, a Ray cluster, Slurm."""

import concurrent.futures
import itertools
import os
import shlex
import subprocess
import sys

from cappa_tf.studies import cell
from cappa_tf.utils import arguments, files

_RETRIES = 3


def run_local(folders, report, devices=None, processes=None):
    """Runs cells on this machine, one at a time or several.

    Args:
        folders: Folders of the cells.
        report: Function (folder, status), called when a cell has ended.
        devices: Numbers of the GPUs to use, one cell each; None for one cell
            at a time on all devices.
        processes: Number of cells at a time, each on its share of the CPU
            cores. Small models train faster so, as they keep one core busy
            and not several.

    Raises:
        ValueError: If there are both, or fewer cores than processes.
    """
    if devices and processes is not None:
        raise ValueError(
            "--devices runs a cell on each device, --processes one on each "
            "share of the CPU cores: give one of them. Received: "
            f"devices={devices!r}, processes={processes!r}"
        )
    if processes is not None:
        free = [_core_options(cores) for cores in _share_cores(processes)]
    elif devices:
        free = [_device_options(device) for device in devices]
    else:
        free = [{}]

    def run(folder):
        options = free.pop()
        try:
            return _run(folder, **options)
        finally:
            free.append(options)

    with concurrent.futures.ThreadPoolExecutor(len(free)) as pool:
        waiting = {pool.submit(run, folder): folder for folder in folders}
        try:
            for done in concurrent.futures.as_completed(waiting):
                report(waiting[done], done.result())
        except KeyboardInterrupt:
            # The running cells got the same signal and save a checkpoint.
            pool.shutdown(cancel_futures=True)
            raise


def _device_options(device):
    return {"environment": {"CUDA_VISIBLE_DEVICES": str(device)}}


def _core_options(cores):
    return {"options": [f"--cores={','.join(map(str, cores))}"]}


def _share_cores(processes):
    """Lists of the cores that this process may use, one a cell."""
    arguments.check_counts(processes=processes)
    if not hasattr(os, "sched_getaffinity"):
        raise ValueError(
            "--processes needs an operating system that binds processes to "
            f"CPU cores, such as Linux. Received: processes={processes}"
        )
    cores = sorted(os.sched_getaffinity(0))
    if processes > len(cores):
        raise ValueError(
            f"--processes must be at most the {len(cores)} CPU cores that this "
            f"program may use. Received: processes={processes}"
        )
    bounds = [len(cores) * i // processes for i in range(processes + 1)]
    return [cores[a:b] for a, b in itertools.pairwise(bounds)]


def _run(folder, environment=None, options=()):
    """Runs a cell in a process of its own; returns its status."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cappa_tf.studies.cell", *options, folder],
        stdout=subprocess.DEVNULL,
        env={**os.environ, **(environment or {})},
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
