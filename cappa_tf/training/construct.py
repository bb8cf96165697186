"""Construction of the model and the optimizer of a run."""

import contextlib
import random

import keras
import tensorflow as tf


def build_model(
    model,
    optimizer,
    strategy,
    seed=0,
    precision=None,
    frozen_parts=(),
    trained_parts=(),
):
    """Creates all weights and optimizer state under the strategy's scope.

    Variables created inside the traced step fail under `MirroredStrategy`, so
    everything is built here.

    Args:
        model: A `Task`, or a constructor of one.
        optimizer: A Keras optimizer, or a constructor of one.
        strategy: The run's strategy.
        seed: Seed of the initial weights, if the model is constructed here.
        precision: Dtype policy such as "mixed_bfloat16"; None keeps the
            current policy.
        frozen_parts: Names of the parts to exclude from training.
        trained_parts: Names of layers inside them to train all the same.

    Returns:
        (model, optimizer), both built.

    Raises:
        ValueError: If the model or the optimizer was built for other devices
            or another precision.
    """
    with seeded(seed), dtype_policy(precision), strategy.scope():
        model = constructed(model, "model", "example_losses", "weights")
        if not model.built:
            model.build()
        model.freeze(frozen_parts, trained_parts)
        several = strategy.num_replicas_in_sync > 1
        if several and isinstance(optimizer, keras.optimizers.Optimizer):
            raise ValueError(
                "With several devices `optimizer` must be a constructor (in a "
                "gin file @Adafactor without parentheses), to be called where "
                f"they are known. Received: optimizer={optimizer!r}"
            )
        optimizer = constructed(optimizer, "optimizer", "apply", "build")
        optimizer.build(model.trainable_variables)
    _check_built(model, strategy, precision)
    return model, optimizer


def _check_built(model, strategy, precision):
    mirrored = isinstance(
        model.trainable_variables[0].value, tf.distribute.DistributedValues
    )
    if strategy.num_replicas_in_sync > 1 and not mirrored:
        raise ValueError(
            "With several devices `model` must be a constructor (in a gin file "
            "@Captioner without parentheses) or not yet built. Received: a "
            "model whose weights live on one device"
        )
    if precision is not None and model.dtype_policy.name != precision:
        raise ValueError(
            "`precision` must be the dtype policy the model was made with, or "
            f"`model` a constructor. Received: precision={precision!r}, "
            f"model.dtype_policy={model.dtype_policy.name!r}"
        )


@contextlib.contextmanager
def seeded(seed):
    """Seeds Keras' initializers, which use Python's generator, for a while.

    `keras.utils.set_random_seed` would also clear TensorFlow's kernel cache,
    and with it every vocabulary that a tokenizer has opened.
    """
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


@contextlib.contextmanager
def dtype_policy(precision):
    """Sets Keras' dtype policy for a while; None keeps it."""
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision or previous)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(previous)


def parameter_counts(model):
    """Dict of the number of parameters: `total`, and by part of a `Task`."""
    return {
        name: sum(v.value.shape.num_elements() for v in part.trainable_weights)
        for name, part in {"total": model, **model.parts}.items()
    }


def constructed(value, name, *attributes):
    """Returns an object, calling its constructor if that is what was given.

    A constructor (in a gin file `@Captioner`, without parentheses) lets the
    trainer set seed, precision and devices before any weight exists.

    Args:
        value: An object, or a function without arguments that returns one.
        name: The argument's name, for error messages.
        *attributes: Names of attributes that the object must have.

    Raises:
        ValueError: If the object lacks one of them.
    """
    if not all(hasattr(value, a) for a in attributes) or isinstance(
        value, type
    ):
        if not callable(value):
            raise ValueError(
                f"`{name}` must be an object with {', '.join(attributes)}, "
                f"or a constructor of one. Received: {name}={value!r}"
            )
        value = value()
    missing = [a for a in attributes if not hasattr(value, a)]
    if missing:
        raise ValueError(
            f"`{name}` lacks {', '.join(missing)}. Received: {name}={value!r}"
        )
    return value
