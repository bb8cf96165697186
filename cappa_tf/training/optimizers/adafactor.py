"""Adafactor, in the memory-saving variant that the paper trains with.

"Scaling Vision Transformers" (arXiv 2106.04560, section 3.4) took Adafactor
(arXiv 1804.04235), added momentum in half precision and left out its relative
step, parameter scaling and update clipping. Reference code:
big_vision/optax.py `scale_by_adafactor`.
"""

import keras
import numpy as np
from keras import ops

from cappa_tf.training.optimizers.base import (
    ScheduledOptimizer,
    check_momentum_dtype,
    moving_average,
)
from cappa_tf.training.optimizers.multipliers import Multipliers
from cappa_tf.training.optimizers.schedules import Schedule
from cappa_tf.utils.arguments import check_integer, check_number


def factored_axes(shape, min_dim_size_to_factor):
    """The two largest axes of a shape, if both are large enough.

    Examples, with a minimum of 32:
        (768, 3072)        -> (0, 1)
        (768, 12, 64)      -> (2, 0), statistics for each head
        (16, 16, 3, 768)   -> None, the second largest axis has size 16
        (768,)             -> None

    Args:
        shape: Shape of a variable.
        min_dim_size_to_factor: Smallest size of the second largest axis.

    Returns:
        `(second largest, largest)`, the last of equal axes, or `None`.
    """
    if len(shape) < 2:
        return None
    second, largest = np.argsort(shape, kind="stable")[-2:]
    if shape[second] < min_dim_size_to_factor:
        return None
    return int(second), int(largest)


@keras.saving.register_keras_serializable("cappa_tf")
class Adafactor(ScheduledOptimizer):
    """Adafactor with bfloat16 momentum and a capped decay.

    The second moment of a variable with two large axes is stored as its means
    over each of them: n + m numbers in place of n * m. Its decay at step t
    (from 1) is `min(beta2_cap, 1 - t ** -decay_exponent)`. The momentum is an
    average of the scaled gradients without bias correction. Clipping, weight
    decay and schedule are those of `ScheduledOptimizer`.

    Args:
        learning_rate: Base learning rate.
        schedule: A `schedules.Schedule`; `None` for a constant multiplier 1.
        weight_decay: Decoupled decay of kernels, independent of
            `learning_rate`.
        global_clip_norm: Largest global gradient norm; `None` to not clip.
        beta2_cap: Largest decay of the second moment.
        decay_exponent: Exponent that sets how fast that decay approaches 1.
        momentum: Weight of the past in the average; 0 keeps none and saves
            its memory.
        momentum_dtype: Type of the stored average, "bfloat16" or "float32".
        min_dim_size_to_factor: Smallest size of the second largest axis for
            which the second moment is factored.
        epsilon: Added to squared gradients.
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
        beta2_cap=0.999,
        decay_exponent=0.8,
        momentum=0.9,
        momentum_dtype="bfloat16",
        min_dim_size_to_factor=32,
        epsilon=1e-30,
        use_ema=False,
        ema_momentum=0.999,
        name="adafactor",
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
        self.beta2_cap = check_number("beta2_cap", beta2_cap, 0.0, 1.0)
        self.decay_exponent = check_number(
            "decay_exponent", decay_exponent, exclusive=True
        )
        self.momentum = check_number("momentum", momentum, 0.0, 1.0 - 1e-6)
        self.momentum_dtype = check_momentum_dtype(momentum_dtype)
        self.min_dim_size_to_factor = check_integer(
            "min_dim_size_to_factor", min_dim_size_to_factor, 1
        )
        self.epsilon = check_number("epsilon", epsilon, exclusive=True)

    def build(self, variables):
        """Creates the second moments, factored if possible, and momentum."""
        if self.built:
            return
        super().build(variables)
        self._second_moments, self._averages = [], []
        for variable in variables:
            prefix = variable.path.replace("/", "_")
            self._second_moments.append(
                self._add_second_moment(tuple(variable.shape), prefix)
            )
            if self.momentum:
                self._averages.append(
                    self.add_variable(
                        variable.shape,
                        dtype=self.momentum_dtype,
                        name=f"{prefix}_momentum",
                    )
                )

    def _add_second_moment(self, shape, prefix):
        """Variables of one second moment: (means, means) or (full,)."""
        axes = factored_axes(shape, self.min_dim_size_to_factor)
        if axes is None:
            shapes = {"velocity": shape}
        else:
            second, largest = axes
            shapes = {
                "velocity_row": np.delete(shape, largest),
                "velocity_column": np.delete(shape, second),
            }
        return tuple(
            self.add_variable(
                tuple(int(size) for size in moment_shape),
                dtype="float32",
                name=f"{prefix}_{name}",
            )
            for name, moment_shape in shapes.items()
        )

    def state_of(self, index):
        """The second moment of a variable, and its momentum if there is one."""
        averages = [self._averages[index]] if self.momentum else []
        return (*self._second_moments[index], *averages)

    def direction(self, gradient, state, step):
        """Gradient divided by the root of its second moment, averaged."""
        moments = state[:-1] if self.momentum else state
        update, moments = self._scaled(gradient, moments, step)
        if not self.momentum:
            return update, moments
        update = moving_average(state[-1], update, self.momentum)
        return update, (*moments, update)

    def _scaled(self, gradient, moments, step):
        """The gradient over the root of its second moment, and the latter."""
        beta2 = ops.minimum(
            self.beta2_cap, 1.0 - ops.power(step, -self.decay_exponent)
        )

        def moved(moment, square):
            return beta2 * moment + (1.0 - beta2) * square

        square = ops.square(gradient) + self.epsilon
        if len(moments) == 1:
            moment = moved(moments[0], square)
            return gradient * ops.rsqrt(moment), (moment,)
        second, largest = factored_axes(
            gradient.shape, self.min_dim_size_to_factor
        )
        moments = tuple(
            moved(moment, ops.mean(square, axis))
            for moment, axis in zip(moments, (largest, second), strict=True)
        )
        # Means get their axis back (size 1) to broadcast with the gradient.
        row = ops.expand_dims(moments[0], largest)
        column = ops.expand_dims(moments[1], second)
        row /= ops.mean(row, second, keepdims=True)
        return gradient * ops.rsqrt(row) * ops.rsqrt(column), moments

    def get_config(self):
        """Returns the arguments that rebuild this object."""
        return {
            **super().get_config(),
            "beta2_cap": self.beta2_cap,
            "decay_exponent": self.decay_exponent,
            "momentum": self.momentum,
            "momentum_dtype": self.momentum_dtype,
            "min_dim_size_to_factor": self.min_dim_size_to_factor,
            "epsilon": self.epsilon,
        }
