"""The entry point of an evaluation: from a model to its reports.

It knows nothing of gin: `cappa_tf.config` calls it with what the files bind.
"""

from cappa_tf.evaluation.evaluator import check_evaluators


def evaluate(predictor=None, evaluators: list | tuple = ()):
    """Evaluates a model with several evaluators.

    Args:
        predictor: The `Predictor`, given by the caller, not by a gin file.
        evaluators: List of `Evaluator`s. Before the first one starts, all are
            checked against the model and for their data.

    Returns:
        An iterator of (evaluator, its `Report`).

    Raises:
        ValueError: If the model lacks a capability that an evaluator needs, or
            data cannot be found.
    """
    check_evaluators(evaluators)
    if predictor is None or not evaluators:
        raise ValueError(
            "There must be a model and at least one evaluator. Received: "
            f"predictor={predictor!r}, evaluators={evaluators!r}"
        )
    for one in evaluators:
        one.check(predictor)
    for one in evaluators:
        one.open()
    return ((one, one.evaluate(predictor)) for one in evaluators)
