"""Trains a model as configured by gin files; run again, it resumes.

    python tools/train.py --gin_file=gin/quickstart.gin
    python tools/train.py --gin_file=gin/cappa_l16.gin --workdir=runs/l16 \
        --gin_param="DATA='data/mine'" --profile=101,105

Ctrl-C and SIGTERM write a checkpoint and end the program with exit code 0; the
same command then resumes with the next batch. Errors (an invalid configuration,
data that does not fit, a loss that is not finite) end it with a message and
exit code 1.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app, flags

from cappa_tf import config
from cappa_tf.utils import console


def main(argv):
    """Parses and checks the configuration, then runs it."""
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are understood. Received: {argv[1:]}")
    with console.errors_as_lines("train"):
        profile = parse_profile(flags.FLAGS.profile)
    # TensorFlow takes seconds to load, and --help does not need it.
    from cappa_tf.training.distribution.hosts import WorkerLostError

    config.parse_flags(STRATEGY=flags.FLAGS.strategy)
    if profile is not None and config.bound_root() != config.ROOT:
        raise SystemExit(
            "train: --profile is for training steps, which a linear probe does "
            f"not have. Received: --profile={','.join(flags.FLAGS.profile)}"
        )
    with console.errors_as_lines("train", FloatingPointError, WorkerLostError):
        config.run(
            dry_run=flags.FLAGS.dry_run,
            # A probe has no such argument.
            **({} if profile is None else {"profile": profile}),
            on_start=config.save_config,
            on_first_step=config.save_operative_config,
        )


def parse_profile(values):
    """(first, last) of --profile=FIRST,LAST; None for None.

    Raises:
        ValueError: If they are not two steps.
    """
    if values is None:
        return None
    steps = tuple(int(x) for x in values if x.strip().isdecimal())
    if (
        len(steps) != len(values)
        or len(steps) != 2
        or not (1 <= steps[0] <= steps[1])
    ):
        raise ValueError(
            "--profile must be FIRST,LAST with 1 <= FIRST <= LAST. "
            f"Received: --profile={','.join(values)}"
        )
    return steps


def define_flags():
    """Defines the flags of this tool."""
    config.define_flags()
    flags.adopt_module_key_flags(config)  # So that --help shows them.
    flags.DEFINE_string(
        "strategy",
        None,
        "Devices of the run (STRATEGY): auto, one, mirrored, multi_worker or "
        "tpu.",
    )
    flags.DEFINE_list(
        "profile",
        None,
        "FIRST,LAST: steps of which a profile for TensorBoard is written to "
        "`tensorboard` in the workdir.",
    )


if __name__ == "__main__":
    console.run(main, define_flags)
