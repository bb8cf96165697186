"""Stages of a run: cheaper ones first, each continued by the next.

    WORKDIR/stage_1    the run of the first stage, with a model of its own
    WORKDIR            the last stage, the log and TensorBoard of all

A stage is a run like any other that `train.train` makes with `continue_from`.
The steps are counted through, so that one schedule spans all stages, and what
a stage has finished is never repeated when the command is run again.
"""

import dataclasses
import json
import os

from cappa_tf.saving.checkpoints import latest_checkpoint
from cappa_tf.utils import arguments, files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a run, and what is configured otherwise in it.

    Raises:
        ValueError: If a field is of the wrong type; names it.
    """

    share: float
    """Share of the run's steps, in (0, 1)."""

    bindings: dict
    """Dict from a macro, or any other binding of a gin file, to its value in
    this stage, such as {"IMAGE_SIZE": 112}."""

    def __post_init__(self):
        arguments.check_number("share", self.share, 0.0, 1.0, exclusive=True)
        if not isinstance(self.bindings, dict) or not all(
            isinstance(name, str) and _is_literal(value)
            for name, value in self.bindings.items()
        ):
            raise ValueError(
                "`bindings` of a stage must be a dict from names to numbers, "
                "strings, booleans, None or lists of them. Received: "
                f"bindings={self.bindings!r}"
            )

    def lines(self):
        """The bindings as "NAME = VALUE"."""
        return [f"{name} = {value!r}" for name, value in self.bindings.items()]


def earlier_stages(stages: list | tuple = ()):
    """The stages of a run before its last, which is the run as configured.

    Args:
        stages: `Stage`s in their order; their shares leave a rest for the last.

    Returns:
        Tuple of `Stage`.

    Raises:
        ValueError: If one of them is none, or nothing is left.
    """
    if not all(isinstance(stage, Stage) for stage in stages):
        raise ValueError(
            f"`stages` must be Stages. Received: stages={list(stages)!r}"
        )
    shares = [stage.share for stage in stages]
    if sum(shares) >= 1.0:
        raise ValueError(
            "The shares of the earlier stages must leave steps to the last "
            f"one. Received: share={shares}"
        )
    return tuple(stages)


@dataclasses.dataclass(frozen=True)
class Part:
    """The run of one earlier stage.

    Attributes:
        stage: Its `Stage`.
        folder: Its folder.
        first_step: Steps that earlier stages have made.
        last_step: Steps that are made at its end.
        before: Folder of the stage that it continues, or None.
        after: Folder of the stage that continues it.
    """

    stage: Stage
    folder: str
    first_step: int
    last_step: int
    before: str | None
    after: str

    def is_over(self):
        """Whether the next stage can start, or has started."""
        if latest_checkpoint(self.after):
            return True
        path = os.path.join(self.folder, "results.json")
        if not files.exists(path):
            return False
        return json.loads(files.read_text(path))["step"] == self.last_step


def parts(stages, total_steps, workdir):
    """The runs of the earlier stages.

    Args:
        stages: Tuple of `Stage`.
        total_steps: Steps of the run with all its stages.
        workdir: The run's folder.

    Returns:
        List of `Part`.

    Raises:
        ValueError: If there are more stages than steps.
    """
    if total_steps <= len(stages):
        raise ValueError(
            "TOTAL_STEPS must leave a step to each stage of the run. Received: "
            f"TOTAL_STEPS={total_steps} for {len(stages) + 1} stages"
        )
    folders = [
        os.path.join(workdir, f"stage_{i + 1}") for i in range(len(stages))
    ]
    found, share, step = [], 0.0, 0
    for i, stage in enumerate(stages):
        share += stage.share
        last = max(step + 1, round(share * total_steps))
        last = min(last, total_steps - (len(stages) - i))
        found.append(
            Part(
                stage,
                folders[i],
                step,
                last,
                folders[i - 1] if i else None,
                [*folders, workdir][i + 1],
            )
        )
        step = last
    return found


def _is_literal(value):
    if isinstance(value, list | tuple):
        return all(map(_is_literal, value))
    return value is None or isinstance(value, bool | int | float | str)
