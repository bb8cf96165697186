"""SGD with momentum, which the reference fine-tunes with."""

import keras

from cappa_tf.training.optimizers.base import (
    ScheduledOptimizer,
    check_momentum_dtype,
    decayed,
)
from cappa_tf.training.optimizers.multipliers import Multipliers
from cappa_tf.training.optimizers.schedules import Schedule
from cappa_tf.utils.arguments import check_number


@keras.saving.register_keras_serializable("cappa_tf")
class SGD(ScheduledOptimizer):
    """SGD whose momentum is the trace m = g + momentum * m, in bfloat16.

    The sum is not an average (there is no factor 1 - momentum), and nothing is
    looked ahead (not Nesterov's). Clipping, decay and schedule are those of
    `ScheduledOptimizer`.

    Args:
        learning_rate: Base learning rate.
        schedule: A `schedules.Schedule`; `None` for a constant multiplier 1.
        weight_decay: Decoupled decay of kernels, independent of
            `learning_rate`; the reference fine-tunes without.
        global_clip_norm: Largest global gradient norm; `None` to not clip.
        momentum: Weight of the past in the trace; 0 keeps none and saves its
            memory.
        momentum_dtype: Type of the stored trace, "bfloat16" or "float32".
        use_ema: If `True`, keeps a moving average of the weights.
        ema_momentum: Weight of the past in that average.
        name: Name of the optimizer.
        multipliers: `multipliers.Multipliers`, or `None`.

    Reference: big_vision configs/transfer.py and optax.py (`optax.trace`).
    """

    def __init__(
        self,
        learning_rate=0.01,
        schedule: Schedule | None = None,
        weight_decay=0.0,
        global_clip_norm: float | None = 1.0,
        momentum=0.9,
        momentum_dtype="bfloat16",
        use_ema=False,
        ema_momentum=0.999,
        name="sgd",
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
        self.momentum = check_number("momentum", momentum, 0.0, 1.0 - 1e-6)
        self.momentum_dtype = check_momentum_dtype(momentum_dtype)

    def build(self, variables):
        """Creates the trace of every variable."""
        if self.built:
            return
        super().build(variables)
        self._traces = []
        for variable in variables if self.momentum else ():
            self._traces.append(
                self.add_variable(
                    variable.shape,
                    dtype=self.momentum_dtype,
                    name=f"{variable.path.replace('/', '_')}_momentum",
                )
            )

    def state_of(self, index):
        """The trace of a variable, if there is momentum."""
        return (self._traces[index],) if self.momentum else ()

    def direction(self, gradient, state, step):
        """The gradient plus the decayed trace, which becomes the new trace."""
        del step
        if not self.momentum:
            return gradient, ()
        update = gradient + decayed(state[0], self.momentum)
        return update, (update,)

    def get_config(self):
        """Returns the arguments that rebuild this object."""
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "momentum_dtype": self.momentum_dtype,
        }
