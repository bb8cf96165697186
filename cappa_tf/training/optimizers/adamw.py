"""AdamW, a common alternative to the paper's Adafactor."""

import keras
from keras import ops

from cappa_tf.training.optimizers.base import (
    ScheduledOptimizer,
    check_momentum_dtype,
    moving_average,
)
from cappa_tf.training.optimizers.multipliers import Multipliers
from cappa_tf.training.optimizers.schedules import Schedule
from cappa_tf.utils.arguments import check_number


@keras.saving.register_keras_serializable("cappa_tf")
class AdamW(ScheduledOptimizer):
    """Adam with the clipping, decay and schedule of `ScheduledOptimizer`.

    A common choice for small runs; the paper trains with Adafactor. The
    direction is that of `optax.scale_by_adam`, with bias correction.

    Args:
        learning_rate: Base learning rate.
        schedule: A `schedules.Schedule`; `None` for a constant multiplier 1.
        weight_decay: Decoupled decay of kernels, independent of
            `learning_rate`: 1e-4 here equals 0.1 in the `AdamW` of Keras at a
            learning rate of 1e-3.
        global_clip_norm: Largest global gradient norm; `None` to not clip.
        beta_1: Decay of the average gradient.
        beta_2: Decay of the average squared gradient.
        epsilon: Added to the root of the second moment.
        momentum_dtype: Type of the stored first moment, "float32" or
            "bfloat16".
        use_ema: If `True`, keeps a moving average of the weights.
        ema_momentum: Weight of the past in that average.
        name: Name of the optimizer.
        multipliers: `multipliers.Multipliers`, or `None`.
    """

    def __init__(
        self,
        learning_rate=1e-3,
        schedule: Schedule | None = None,
        weight_decay=1e-4,
        global_clip_norm: float | None = 1.0,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-8,
        momentum_dtype="float32",
        use_ema=False,
        ema_momentum=0.999,
        name="adamw",
        multipliers: Multipliers | None = None,
    ):
        super().__init__(
            learning_rate=learning_rate,
            schedule=schedule,
            weight_decay=weight_decay,
            global_clip_norm=global_clip_norm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            name=name,
            multipliers=multipliers,
        )
        # At 1 the bias correction would divide by zero.
        self.beta_1 = check_number("beta_1", beta_1, 0.0, 1.0 - 1e-6)
        self.beta_2 = check_number("beta_2", beta_2, 0.0, 1.0 - 1e-6)
        self.epsilon = check_number("epsilon", epsilon)
        self.momentum_dtype = check_momentum_dtype(momentum_dtype)

    def build(self, variables):
        """Creates both moments of every variable."""
        if self.built:
            return
        super().build(variables)
        self._first_moments, self._second_moments = [], []
        for variable in variables:
            prefix = variable.path.replace("/", "_")
            self._first_moments.append(
                self.add_variable(
                    variable.shape,
                    dtype=self.momentum_dtype,
                    name=f"{prefix}_momentum",
                )
            )
            second = None
            if self.adapts(variable):
                second = self.add_variable(
                    variable.shape, dtype="float32", name=f"{prefix}_velocity"
                )
            self._second_moments.append(second)

    def adapts(self, variable):
        """Whether the rate of each number of a variable is adapted."""
        del variable
        return True

    def state_of(self, index):
        """The first and, if it has one, the second moment of a variable."""
        second = self._second_moments[index]
        return (self._first_moments[index], *([second] * (second is not None)))

    def direction(self, gradient, state, step):
        """Average gradient divided by the root of the average square."""
        first, second = state
        mean = first = moving_average(first, gradient, self.beta_1)
        square = second = moving_average(
            second, ops.square(gradient), self.beta_2
        )
        mean /= 1.0 - ops.power(self.beta_1, step)
        square /= 1.0 - ops.power(self.beta_2, step)
        return mean / (ops.sqrt(square) + self.epsilon), (first, second)

    def get_config(self):
        """Returns the arguments that rebuild this object."""
        return {
            **super().get_config(),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
            "momentum_dtype": self.momentum_dtype,
        }
