"""Makes the preset scenes_mini that comes with the package, in one command.

    python tools/make_scenes_mini.py    # 6 minutes on two idle CPU cores

Trains gin/quickstart.gin (or resumes it, or takes its finished run), writes the
weights as float16 and captions held-out images with both: nothing is written if
more than 1 % of the captions differ. A tool for developers of this package.
"""

import os
import pathlib
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import app, flags

from cappa_tf.utils import console, files

FLAGS = flags.FLAGS
NAME = "scenes_mini"
_ROOT = pathlib.Path(__file__).resolve().parents[1]
_MOST_DIFFERENT = 0.01


def define_flags():
    """Defines the flags of this tool."""
    flags.DEFINE_string(
        "workdir", str(_ROOT / "runs" / "quickstart"), "The run's folder."
    )
    flags.DEFINE_multi_string(
        "gin_param", [], "Bindings of the training, such as TOTAL_STEPS=10."
    )
    flags.DEFINE_string(
        "output",
        None,
        "Folder to write; that of this package by default.",
    )
    flags.DEFINE_integer(
        "images", 500, "Held-out images to compare captions of.", 1
    )


def train(workdir, gin_params):
    """Trains the quickstart in a process of its own, unless it is done."""
    if files.exists(os.path.join(workdir, "results.json")):
        return
    command = [sys.executable, str(_ROOT / "tools" / "train.py")]
    command += ["--gin_file=gin/quickstart.gin", f"--workdir={workdir}"]
    command += [f"--gin_param={param}" for param in gin_params]
    subprocess.run(command, check=True, cwd=_ROOT)


def make(workdir, output, images):
    """Writes the preset of a run and compares it with the run.

    Args:
        workdir: Folder of a finished run.
        output: Folder to write; an existing preset is replaced.
        images: Number of images.

    Returns:
        A line that says what was written.

    Raises:
        ValueError: If captions differ more than by rounding.
    """
    from cappa_tf import presets
    from cappa_tf.data.scenes import world

    original = presets.from_preset(workdir)
    size = max(32, *original.predictor.image_size)
    scenes = [*world.examples("heldout", images, size)]
    pictures = [example.image for example in scenes]
    wanted = original.caption(pictures)
    original.facts |= {
        "name": NAME,
        "command": f"python tools/{pathlib.Path(__file__).name}",
    }
    unchecked = files.temporary_name(output)
    try:
        original.save_to_preset(
            unchecked, dtype="float16", license="apache-2.0"
        )
        found = presets.from_preset(unchecked).caption(pictures)
    finally:
        if files.exists(unchecked):
            files.rmtree(unchecked)
    different = sum(a != b for a, b in zip(wanted, found))
    if different > _MOST_DIFFERENT * images:
        raise ValueError(
            f"float16 must change at most {_MOST_DIFFERENT:.0%} of the "
            f"captions. Received: {different} of {images}"
        )
    right = sum(a == b.captions[0] for a, b in zip(found, scenes))
    original.facts["figures"] = {
        **original.facts.get("figures", {}),
        f"exact match of {images} held-out captions in float16": right / images,
        "of those captions changed by float16": different / images,
    }
    original.save_to_preset(
        output,
        dtype="float16",
        license="apache-2.0",
        overwrite=files.exists(output),
    )
    return (
        f"{output}: {right} of {images} held-out captions right, {different} "
        "changed by float16"
    )


def main(argv):
    """Trains, writes and checks the preset."""
    if len(argv) > 1:
        raise app.UsageError(f"Only flags are understood. Received: {argv[1:]}")
    with console.errors_as_lines(
        "make_scenes_mini", subprocess.CalledProcessError
    ):
        from cappa_tf.saving import preset_folder

        output = FLAGS.output or str(preset_folder.SHIPPED / NAME)
        workdir = os.path.abspath(FLAGS.workdir)
        train(workdir, FLAGS.gin_param)
        print(make(workdir, output, FLAGS.images))


if __name__ == "__main__":
    console.run(main, define_flags)
