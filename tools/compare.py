"""Compares methods: trains and evaluates each of them, and writes a report.

    python tools/compare.py --gin_file=gin/studies/scenes.gin
    python tools/compare.py --gin_file=gin/studies/flickr8k.gin --dry_run
    python tools/compare.py --gin_file=gin/studies/scenes.gin \
        --again=CapPa-seed1

A study has methods, seeds, sizes and lengths; each combination is a cell, a run
of tools/train.py with evaluations by tools/evaluate.py, in a process of its own
below WORKDIR/cells. Run again, the command resumes where it was interrupted. A
cell that failed is a row that says so, and is tried again; the command fails
then. WORKDIR/report.html is a page that needs nothing else; the same figures
are in report.json, cells.csv and figures/, and the table, which is printed,
too, is in table.md.

--runner says where cells run: on this machine one after the other (local; one
on each of --devices, or --processes at a time, each on its share of the CPU
cores), on a Ray cluster (ray, which needs pip install 'cappa-tf[ray]'), as an
array of Slurm jobs, whose script is written (slurm), or nowhere, to write the
report of what is there (none).
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app, flags

from cappa_tf import config
from cappa_tf.utils import console


def define_flags():
    """Defines the flags of this tool."""
    config.define_flags()
    flags.adopt_module_key_flags(config)
    flags.DEFINE_enum(
        "runner", "local", ["local", "ray", "slurm", "none"], "Where cells run."
    )
    flags.DEFINE_multi_string(
        "again", [], "Cell to run again from its start; repeatable."
    )
    flags.DEFINE_multi_string(
        "only", [], "Cell to run; repeatable. By default all."
    )
    flags.DEFINE_list(
        "devices", None, "local: numbers of the GPUs, a cell on each."
    )
    flags.DEFINE_integer(
        "processes",
        None,
        "local: cells at a time, each on its share of the CPU cores.",
    )
    flags.DEFINE_string(
        "ray_address", None, "ray: address of a cluster; by default a new one."
    )
    flags.DEFINE_float("cpus", 1.0, "ray: CPU cores of a cell.")
    flags.DEFINE_float("gpus", 0.0, "ray: GPUs of a cell.")
    flags.DEFINE_multi_string(
        "slurm_option",
        [],
        "slurm: option of sbatch, such as --gres=gpu:1; repeatable.",
    )


def compare(options):
    """Runs the study that the flags name; returns its rows."""
    config.parse(
        options.gin_file,
        options.gin_param,
        workdir=options.workdir,
        root=config.STUDY_ROOT,
    )
    bound = config.arguments(config.STUDY_ROOT)
    if options.dry_run:
        for cell in bound["study"].cells(flops_of):
            print(_summary(cell))
        return []
    from cappa_tf.studies import comparison

    # Flags win over what the files bind.
    given = {
        argument: options[flag].value
        for flag, argument in _ARGUMENTS.items()
        if options[flag].present
    }
    return comparison.compare(
        **{**bound, **given, "flops_of": flops_of, "log": print}
    )


# Flag -> argument of `comparison.compare`.
_ARGUMENTS = {
    "runner": "runner",
    "again": "again",
    "only": "only",
    "devices": "devices",
    "processes": "processes",
    "ray_address": "ray_address",
    "cpus": "cpus",
    "gpus": "gpus",
    "slurm_option": "slurm_options",
}


def _summary(cell):
    from cappa_tf.training import flops

    cost = "unknown" if cell.flops is None else flops.readable(cell.flops)
    return (
        f"{cell.name:40} {cell.steps:>8,} steps x {cell.batch_size} = "
        f"{cell.images:>11,} images, {cost}"
    )


_counted = {}


def flops_of(gin_files, gin_params):
    """FLOPs of training on one image, of a configuration of tools/train.py."""
    key = (tuple(gin_files), tuple(gin_params))
    if key not in _counted:
        _counted[key] = _count(gin_files, gin_params)
    return _counted[key]


def _count(gin_files, gin_params):
    config.parse(gin_files, [*gin_params, "WORKDIR = 'none'"])
    return sum(
        share * _count_stage(bound) for share, bound in config.stage_arguments()
    )


def _count_stage(bound):
    """FLOPs of training on one image, of one stage's arguments."""
    from cappa_tf.models.task import Task
    from cappa_tf.training import flops

    model, weights = bound["model"], bound["weights"]
    if not isinstance(model, Task):
        model = model()
    model.build()
    if weights.frozen_parts:
        model.freeze(weights.frozen_parts, weights.trained_parts)
    captions = getattr(bound["train_data"], "captions_per_image", 1)
    # "all" is as many as the data has, which is not read here.
    return flops.training_flops(model, captions if captions != "all" else 1)


def main(argv):
    """Runs a study; input errors are printed as one line."""
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are understood. Received: {argv[1:]}")
    with console.errors_as_lines("compare"):
        rows = compare(flags.FLAGS)
    failed = [row.cell.name for row in rows if row.state == "failed"]
    if failed:
        raise SystemExit(
            f"compare: {len(failed)} of {len(rows)} cells failed: "
            f"{', '.join(failed)}. Run it again to try them again."
        )


if __name__ == "__main__":
    console.run(main, define_flags)
