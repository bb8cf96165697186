"""Evaluation with the moving average of the weights."""

import contextlib


@contextlib.contextmanager
def averaged_weights(model, optimizer):
    """Gives the model its averaged weights inside a `with` block.

    Does nothing for an optimizer without an average (`use_ema=False`), or
    before the first step, when there is no average yet.

    Args:
        model: The model that `optimizer` trains.
        optimizer: A Keras optimizer, built on its trainable variables.
    """
    if not optimizer.use_ema or int(optimizer.iterations.numpy()) == 0:
        yield
        return
    variables = model.trainable_variables
    trained = [variable.numpy() for variable in variables]
    optimizer.finalize_variable_values(variables)
    try:
        yield
    finally:
        for variable, value in zip(variables, trained, strict=True):
            variable.assign(value)
