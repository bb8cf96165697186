"""Base class of the optimizers: clipping, decoupled decay and schedule.

A step computes, in the order of the reference (big_vision/optax.py `make`):

    gradients  scaled to a global norm of at most `global_clip_norm`
    direction  the algorithm's transform of the gradient
    update     learning_rate * direction + weight_decay * w (kernels only)
    w          w - schedule(step) * update

So the decay does not depend on the base learning rate, unlike that of Keras'
`AdamW`, and one schedule scales both. Learning rate and decay may differ by
variable (`multipliers.py`).
"""

import contextlib
import functools

import keras
import tensorflow as tf
from keras import ops

from cappa_tf.training.optimizers.multipliers import Multipliers
from cappa_tf.training.optimizers.schedules import Schedule
from cappa_tf.utils.arguments import check_number


def dense_gradients(gradients):
    """Converts gradients to dense tensors; `None` stays `None`.

    The gradient of an embedding lookup arrives as slices in which a row may
    occur many times. Norms and second moments need the sum of the slices.
    """
    return [g if g is None else tf.convert_to_tensor(g) for g in gradients]


def global_norm(tensors):
    """L2 norm of all dense tensors together, float32; skips `None`."""
    return tf.linalg.global_norm(
        [tf.cast(x, tf.float32) for x in tensors if x is not None]
    )


def clip_scale(norm, max_norm):
    """The factor that scales gradients so that their norm is in bounds.

    Same as `optax.clip_by_global_norm`: below `max_norm` nothing changes, not
    even by rounding, and a gradient that is not finite remains so.

    Args:
        norm: float32 scalar, the global norm of the gradients.
        max_norm: Largest allowed norm, above 0.

    Returns:
        float32 scalar.
    """
    return ops.where(norm < max_norm, 1.0, max_norm / norm)


def moving_average(average, value, decay):
    """One step of a moving average that may be stored in bfloat16.

    Same as `optax.ema` with an `accumulator_dtype`: the stored average is
    scaled in its own type (so 0.9 becomes 0.8984375 in bfloat16, and the
    product is rounded); the sum is float32, and rounded when it is stored.

    Args:
        average: float32 or bfloat16 tensor, the average so far.
        value: float32 tensor of the same shape.
        decay: Weight of the past, in [0, 1).

    Returns:
        The new average as float32; the caller stores it.
    """
    return (1.0 - decay) * value + decayed(average, decay)


def decayed(stored, decay):
    """A stored average or trace, scaled in its own type.

    Args:
        stored: float32 or bfloat16 tensor.
        decay: Number in [0, 1); in bfloat16, 0.9 becomes 0.8984375.

    Returns:
        The product, rounded to that type, as float32.
    """
    past = tf.cast(stored, tf.float32)
    past *= float(stored.dtype.as_numpy_dtype(decay))
    return _round_to_bfloat16(past) if stored.dtype == tf.bfloat16 else past


def _round_to_bfloat16(x):
    """Rounds float32 to the nearest bfloat16, ties to even.

    Integer arithmetic is used because XLA elides a cast to bfloat16 and back.
    That was measured to change single updates by 0.4%, so a step would depend
    on `jit_compile`.
    """
    bits = tf.bitcast(x, tf.uint32)
    odd = tf.bitwise.bitwise_and(tf.bitwise.right_shift(bits, 16), 1)
    bits = tf.bitwise.bitwise_and(bits + odd + 0x7FFF, 0xFFFF0000)
    return tf.bitcast(bits, tf.float32)


def apply_summed(optimizer, gradients, variables, norm=None):
    """Applies gradients that have already been summed over the replicas.

    Keras' `Optimizer.apply` sums the gradients of all replicas itself. If the
    loop has already done so (for the norm, or over microbatches), they would
    become too large by a factor of the number of replicas.

    Args:
        optimizer: Any built Keras optimizer.
        gradients: List of tensors, the same on every replica.
        variables: List of variables, in the order of the gradients.
        norm: Their global norm, if it is known: a `ScheduledOptimizer` then
            does not compute it again.
    """
    with _summed(optimizer, norm):
        optimizer.apply(gradients, variables)


@contextlib.contextmanager
def _summed(optimizer, norm=None):
    """Makes an optimizer skip its own sum over replicas inside the block."""
    # An instance attribute hides the method. The replicas' threads enter and
    # leave the block in lockstep.
    optimizer._all_reduce_sum_gradients = list
    optimizer._known_norm = norm
    try:
        yield
    finally:
        optimizer.__dict__.pop("_all_reduce_sum_gradients", None)
        optimizer.__dict__.pop("_known_norm", None)


class ScheduledOptimizer(keras.optimizers.Optimizer):
    """Optimizer with clipping, decoupled decay and a schedule.

    A subclass creates its state in `build` and implements `state_of` and
    `direction`. An update is a function that is traced once for all variables
    of one shape: a model of equal layers would otherwise spend most of its
    start on it. `fuse_updates` has XLA compile it, too.

    `apply` and `apply_gradients` sum the gradients over the replicas as in
    Keras, but before clipping. Code that has already summed them calls
    `apply_summed`.

    Args:
        learning_rate: Base learning rate.
        schedule: A `schedules.Schedule`; `None` for a constant multiplier 1.
        weight_decay: Fraction of a kernel subtracted per step at multiplier 1.
            Applies to variables named `kernel`; embeddings, positions, biases
            and scales are never decayed.
        global_clip_norm: Largest global gradient norm; `None` to not clip.
        use_ema: If `True`, keeps a moving average of the weights;
            `finalize_variable_values` writes it into the model.
        ema_momentum: Weight of the past in that average.
        name: Name of the optimizer.
        multipliers: A `multipliers.Multipliers`, such as layer-wise decay;
            `None` for one learning rate for all variables.

    Raises:
        ValueError: If an argument is not a number or is out of range.
    """

    def __init__(
        self,
        learning_rate,
        schedule,
        weight_decay,
        global_clip_norm,
        use_ema,
        ema_momentum,
        name,
        multipliers=None,
    ):
        rate = check_number("learning_rate", learning_rate)
        if schedule is not None and not isinstance(schedule, Schedule):
            raise ValueError(
                "`schedule` must be None or a schedule such as "
                f"schedules.Cosine(...). Received: schedule={schedule!r}"
            )
        if multipliers is not None and not isinstance(multipliers, Multipliers):
            raise ValueError(
                "`multipliers` must be None or multipliers such as "
                "multipliers.ByDepth(...). Received: "
                f"multipliers={multipliers!r}"
            )
        if not isinstance(use_ema, bool):
            raise ValueError(
                f"`use_ema` must be a bool. Received: use_ema={use_ema!r}"
            )
        # Keras evaluates a callable rate at every step, also for callbacks.
        super().__init__(
            learning_rate=lambda: self.learning_rate_at(self.iterations),
            weight_decay=check_number("weight_decay", weight_decay),
            use_ema=use_ema,
            ema_momentum=check_number("ema_momentum", ema_momentum, 0.0, 1.0),
            name=name,
        )
        if global_clip_norm is not None:
            global_clip_norm = check_number(
                "global_clip_norm", global_clip_norm, exclusive=True
            )
        self.base_learning_rate = rate
        self.schedule = schedule
        self.multipliers = multipliers
        self.global_clip_norm = global_clip_norm

    def multiplier_at(self, step):
        """Multiplier of the schedule after `step` finished steps, in [0, 1]."""
        if self.schedule is None:
            return ops.ones((), "float32")
        return self.schedule(step)

    def learning_rate_at(self, step):
        """Effective learning rate after `step` finished steps."""
        return self.base_learning_rate * self.multiplier_at(step)

    def build(self, variables):
        """Creates the state; subclasses call this before they add theirs."""
        if self.built:
            return
        super().build(variables)
        of_rate = of_decay = [1.0] * len(variables)
        if self.multipliers is not None:
            of_rate, of_decay = self.multipliers.factors(variables)
        self._rates = [self.base_learning_rate * factor for factor in of_rate]
        self._decays = [
            self.weight_decay * factor * (v.name.split(":")[0] == "kernel")
            for v, factor in zip(variables, of_decay)
        ]
        # Not inlined: optimizing a copy for each variable would cost as much as
        # tracing it did.
        self._trace_updates(experimental_attributes={"_noinline": True})

    def _trace_updates(self, **options):
        # Wrapped, as Keras would track and save a function.
        self._traced, self._traced_in_place = (
            functools.partial(tf.function(f, autograph=False, **options))
            for f in (self._new_values, self._update_in_place)
        )

    def fuse_updates(self):
        """Has XLA compile the updates, for a step that it does not compile.

        It makes one pass over the memory of each variable and its state, where
        TensorFlow makes one for each operation. To be called once the optimizer
        is built and before it is traced. Only for a single device: XLA fails to
        compile for the second of several.
        """
        self._trace_updates(jit_compile=True)

    def state_of(self, index):
        """The state of a variable.

        Args:
            index: Position of the variable in the list given to `build`.

        Returns:
            Tuple of variables.
        """
        raise NotImplementedError

    def direction(self, gradient, state, step):
        """Turns a gradient into the update at a learning rate of 1.

        Args:
            gradient: float32 tensor of the variable's shape.
            state: Tuple of tensors, the values of `state_of`.
            step: float32 scalar, number of this step from 1.

        Returns:
            (float32 tensor of the gradient's shape, tuple of the new state).
        """
        raise NotImplementedError

    def apply(self, grads, trainable_variables=None):
        """Applies one step with each replica's own gradients."""
        super().apply(dense_gradients(grads), trainable_variables)

    def update_step(self, gradient, variable, learning_rate):
        """Updates one variable; called by Keras on each replica.

        Args:
            gradient: Dense tensor.
            variable: The variable.
            learning_rate: (multiplier of the schedule, number of this step
                from 1, factor that clips the gradient), which every replica has
                computed once for all variables; with them the rate is more than
                one number.
        """
        index = self._get_variable_index(variable)
        variables = [variable, *(v.value for v in self.state_of(index))]
        if self.use_ema:
            variables.append(self._model_variables_moving_average[index].value)
        # Numbers are traced one by one, so with many they must be tensors.
        number = tf.constant if self.multipliers else float
        rate, decay = self._rates[index], self._decays[index]
        numbers = number(rate), number(decay) if decay else None
        if any(
            isinstance(v, tf.distribute.DistributedValues) for v in variables
        ):
            values = self._traced(
                gradient,
                [tf.convert_to_tensor(v) for v in variables],
                *learning_rate,
                *numbers,
            )
            for one, value in zip(variables, values, strict=True):
                self.assign(one, value)
        else:
            # Reading and writing inside leaves one node of the graph a
            # variable.
            self._traced_in_place(gradient, variables, *learning_rate, *numbers)

    def _update_in_place(self, gradient, variables, *numbers):
        """Updates a variable, its state and its average."""
        values = [tf.convert_to_tensor(v) for v in variables]
        values = self._new_values(gradient, values, *numbers)
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)

    def _new_values(
        self, gradient, values, multiplier, step, scale, rate, decay
    ):
        """New values of a variable, of its state and of its average."""
        value, *state = values
        average = state.pop() if self.use_ema else None
        weight = tf.cast(value, tf.float32)
        gradient = tf.cast(gradient, tf.float32)
        if scale is not None:
            gradient *= scale
        direction, new_state = self.direction(gradient, tuple(state), step)
        update = rate * direction
        if decay is not None:
            update += decay * weight
        weight -= multiplier * update
        new_values = [weight, *new_state]
        if self.use_ema:
            # The first step initializes the average.
            momentum = self.ema_momentum * tf.cast(step > 1.0, tf.float32)
            past = momentum * tf.cast(average, tf.float32)
            new_values.append(past + (1.0 - momentum) * weight)
        return [tf.cast(new, old.dtype) for new, old in zip(new_values, values)]

    def _backend_apply_gradients(self, grads, trainable_variables):
        # Replaces Keras' clipping, coupled decay, accumulation and averages,
        # none of which follow the order of this module.
        norm = self.__dict__.get("_known_norm")
        pairs = self._all_reduce_sum_gradients(zip(grads, trainable_variables))
        grads, trainable_variables = zip(*pairs)
        scale = None
        if self.global_clip_norm is not None:
            norm = global_norm(grads) if norm is None else norm
            scale = clip_scale(norm, self.global_clip_norm)
        rate = (
            tf.cast(self.multiplier_at(self.iterations), tf.float32),
            tf.cast(self.iterations + 1, tf.float32),
            scale,
        )
        with _summed(self):
            self._backend_update_step(grads, trainable_variables, rate)

    def get_config(self):
        """Returns the arguments that rebuild this object."""
        schedule, multipliers = (
            x and keras.saving.serialize_keras_object(x)
            for x in (self.schedule, self.multipliers)
        )
        return {
            "learning_rate": self.base_learning_rate,
            "schedule": schedule,
            "weight_decay": self.weight_decay,
            "global_clip_norm": self.global_clip_norm,
            "use_ema": self.use_ema,
            "ema_momentum": self.ema_momentum,
            "name": self.name,
            "multipliers": multipliers,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Rebuilds an optimizer with its parts from `get_config()`."""
        config = dict(config)
        for name in ("schedule", "multipliers"):
            if isinstance(config.get(name), dict):
                config[name] = keras.saving.deserialize_keras_object(
                    config[name], custom_objects=custom_objects
                )
        return cls(**config)


def check_momentum_dtype(momentum_dtype):
    """Returns the dtype of stored momentum after checking that it is known."""
    if momentum_dtype not in ("bfloat16", "float32"):
        raise ValueError(
            "`momentum_dtype` must be 'bfloat16' or 'float32'. "
            f"Received: momentum_dtype={momentum_dtype!r}"
        )
    return momentum_dtype
