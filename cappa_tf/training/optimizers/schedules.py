"""Multipliers of the learning rate as functions of the step.

A schedule maps the number of finished steps to a multiplier in [0, 1]. It
scales the whole update, decoupled weight decay included, and knows nothing of
the base learning rate. The first update is made at step 0, so with a warm-up
it changes nothing.

Source: big_vision/utils.py `create_learning_rate_schedule` (cosine, rsqrt,
linear). Deviation: past `total_steps` the multiplier of a cooldown stays 0,
where the reference turns negative.
"""

import keras
from keras import ops

from cappa_tf.utils.arguments import check_integer, check_number


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up times a decay that the subclass defines.

    Args:
        total_steps: Length of the run in optimizer steps.
        warmup_steps: Steps of linear growth from 0 to 1; 0 for none.

    Call arguments:
        step: Finished optimizer steps, a number or a scalar tensor.

    Returns:
        The multiplier, a float32 scalar.

    Raises:
        ValueError: If the steps are not integers, or the warm-up would not end
            before the run.
    """

    def __init__(self, total_steps, warmup_steps=0):
        super().__init__()
        self.total_steps = check_integer("total_steps", total_steps, 1)
        self.warmup_steps = check_integer("warmup_steps", warmup_steps)
        if self.warmup_steps >= self.total_steps:
            raise ValueError(
                "`warmup_steps` must be smaller than `total_steps`. Received: "
                f"warmup_steps={warmup_steps}, total_steps={total_steps}"
            )

    def __call__(self, step):
        """Multiplier after `step` finished steps."""
        step = ops.cast(step, "float32")
        multiplier = self.decay(step)
        if self.warmup_steps:
            multiplier *= ops.minimum(1.0, step / self.warmup_steps)
        return multiplier

    def decay(self, step):
        """Multiplier at `step` (float32 scalar) without the warm-up."""
        raise NotImplementedError

    def progress(self, step):
        """Finished fraction of the steps after the warm-up, in [0, 1]."""
        steps_after_warmup = self.total_steps - self.warmup_steps
        return ops.clip((step - self.warmup_steps) / steps_after_warmup, 0, 1)

    def get_config(self):
        """Returns the arguments that rebuild this object."""
        return {
            "total_steps": self.total_steps,
            "warmup_steps": self.warmup_steps,
        }


@keras.saving.register_keras_serializable("cappa_tf")
class Cosine(Schedule):
    """Half a cosine wave from 1 down to 0, the paper's schedule.

    Args:
        total_steps: Length of the run; the multiplier is 0 from there on.
        warmup_steps: Steps of linear growth from 0 to 1 (paper: 10,000).
    """

    def decay(self, step):
        """Multiplier at `step` (float32 scalar) without the warm-up."""
        return 0.5 * (1.0 + ops.cos(3.141592653589793 * self.progress(step)))


@keras.saving.register_keras_serializable("cappa_tf")
class Linear(Schedule):
    """A straight line from 1 at the end of the warm-up down to `end`.

    Args:
        total_steps: Length of the run; the multiplier is `end` from there on.
        warmup_steps: Steps of linear growth from 0 to 1.
        end: Multiplier at the end of the run, in [0, 1].
    """

    def __init__(self, total_steps, warmup_steps=0, end=0.0):
        super().__init__(total_steps, warmup_steps)
        self.end = check_number("end", end, 0.0, 1.0)

    def decay(self, step):
        """Multiplier at `step` (float32 scalar) without the warm-up."""
        return self.end + (1.0 - self.end) * (1.0 - self.progress(step))

    def get_config(self):
        """Returns the arguments that rebuild this object."""
        return {**super().get_config(), "end": self.end}


@keras.saving.register_keras_serializable("cappa_tf")
class Rsqrt(Schedule):
    """Inverse square root, for runs whose length is not fixed in advance.

    The decay is `1 / sqrt(1 + (step - warmup_steps) / timescale)` after the
    warm-up and 1 during it. The optional cooldown goes linearly to 0.

    Args:
        total_steps: Length of the run; only the cooldown depends on it.
        warmup_steps: Steps of linear growth from 0 to 1.
        cooldown_steps: Steps of linear decay at the end; 0 for none.
        timescale: Steps after the warm-up until the multiplier is
            `1 / sqrt(2)`.
    """

    def __init__(
        self,
        total_steps,
        warmup_steps=0,
        cooldown_steps=0,
        timescale: float = 10_000,
    ):
        super().__init__(total_steps, warmup_steps)
        self.cooldown_steps = check_integer("cooldown_steps", cooldown_steps)
        self.timescale = check_number("timescale", timescale, exclusive=True)
        if self.cooldown_steps > self.total_steps:
            raise ValueError(
                "`cooldown_steps` must not exceed `total_steps`. Received: "
                f"cooldown_steps={cooldown_steps}, total_steps={total_steps}"
            )

    def decay(self, step):
        """Multiplier at `step` (float32 scalar) without the warm-up."""
        since_warmup = ops.maximum(step - self.warmup_steps, 0.0)
        multiplier = ops.rsqrt(1.0 + since_warmup / self.timescale)
        if self.cooldown_steps:
            remaining = (self.total_steps - step) / self.cooldown_steps
            multiplier *= ops.clip(remaining, 0.0, 1.0)
        return multiplier

    def get_config(self):
        """Returns the arguments that rebuild this object."""
        return {
            **super().get_config(),
            "cooldown_steps": self.cooldown_steps,
            "timescale": self.timescale,
        }
