"""The root function of an evaluation: evaluators and a model to reports.

It knows nothing of gin: `cappa_tf.config` calls it with what the files bind.
"""

from cappa_tf.evaluation.evaluator import check_evaluators


def evaluate(predictor=None, evaluators: list | tuple = ()):
    """Measures a model by several evaluators.

    Args:
        predictor: The `Predictor`, which the caller gives, not a gin file.
        evaluators: `Evaluator`s. All are checked, against the model and then
            for their data, before the first one begins.

    Returns:
        An iterator of (evaluator, its `Report`).

    Raises:
        ValueError: The model lacks what an evaluator needs, or data is not
            there.
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
