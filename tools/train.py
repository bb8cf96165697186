"""Trains a model as configured by gin files; run again, it resumes.

    python tools/train.py --gin_file=gin/quickstart.gin
    python tools/train.py --gin_file=gin/cappa_l16.gin --workdir=runs/l16 \
        --gin_param="DATA='data/mine'"

Ctrl-C and SIGTERM write a checkpoint and end the program with exit code 0; the
same command then resumes with the next batch. Errors (an invalid configuration,
data that does not fit, a loss that is not finite) end it with a message and
exit code 1.
"""

import os
import pathlib
import sys

# Keeps the memory of a step for the next one. By default large blocks are
# returned to the system after every use, and of 70 s of CPU time 10 s were page
# faults.
os.environ.setdefault("TF_CPU_ALLOCATOR_USE_BFC", "true")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app, flags

from cappa_tf import config
from cappa_tf.utils import console


def main(argv):
    """Parses and checks the configuration, then runs it."""
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are understood. Received: {argv[1:]}")
    # TensorFlow takes seconds to load, and --help does not need it.
    from cappa_tf.data.stream import caching
    from cappa_tf.training.distribution.hosts import WorkerLostError

    caching.keep_freed_memory()
    config.parse_flags(STRATEGY=flags.FLAGS.strategy)
    with console.errors_as_lines("train", FloatingPointError, WorkerLostError):
        config.run(
            dry_run=flags.FLAGS.dry_run,
            on_start=config.save_config,
            on_first_step=config.save_operative_config,
        )


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


if __name__ == "__main__":
    console.run(main, define_flags)
