"""Evaluators (`evaluation/evaluator.py`) while a model is trained."""

from cappa_tf.inference.predictor import Predictor


class Evaluators:
    """Runs evaluators on the model as it stands.

    The chief runs them for all hosts: they only read weights, of which every
    host has a copy. Those that say `on_all_hosts` share the work.

    Args:
        evaluators: A list of evaluators; may be empty.
        model: The `Task`.
        data: Data set whose tokenizer and preprocessing the model has.
        batch_size: Pictures at once.
        hosts: The run's `Hosts`.

    Raises:
        ValueError: The model lacks what an evaluator needs, or what it
            measures on is not there.
    """

    def __init__(self, evaluators, model, data, batch_size, hosts):
        self._evaluators = evaluators
        self._hosts = hosts
        # One for the whole run: it keeps what was traced.
        self._predictor = Predictor(
            model,
            data.tokenizer,
            data.preprocessing,
            batch_size,
            hosts,
        )
        for one in evaluators:
            if hasattr(one, "check"):
                one.check(self._predictor)
        if hosts.is_chief:
            for one in evaluators:
                one.open()

    def __call__(self):
        """Runs all.

        Returns:
            Dict "evaluation/<name of the evaluator>/<metric>" -> number; the
            same on all hosts.
        """
        figures = {}
        for one in self._evaluators:
            shared = getattr(one, "on_all_hosts", False)
            if shared or self._hosts.is_chief:
                for metric, value in one.run(self._predictor):
                    figures[f"evaluation/{one.name}/{metric}"] = value
        # None goes on while the chief still reads its weights.
        return self._hosts.first(figures) if self._evaluators else figures
