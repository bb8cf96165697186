"""Evaluators (`evaluation/evaluator.py`) run during training."""

from cappa_tf.inference.predictor import Predictor


class Evaluators:
    """Runs evaluators on the model's current weights.

    The chief runs them for all hosts, as they only read weights, of which
    every host has a copy. Evaluators with `on_all_hosts` set share the work.

    Args:
        evaluators: A list of evaluators; may be empty.
        model: The `Task`.
        data: Data set whose tokenizer and preprocessing the model uses.
        batch_size: Number of images per batch.
        hosts: The run's `Hosts`.
    """

    def __init__(self, evaluators, model, data, batch_size, hosts):
        self._evaluators = evaluators
        self._model, self._data = model, data
        self._batch_size, self._hosts = batch_size, hosts
        self._predictor = None

    def open(self):
        """Checks the evaluators and opens their data.

        Raises:
            ValueError: If the model lacks what an evaluator needs, or its data
                cannot be found.
        """
        if not self._evaluators:
            return
        # One for the whole run, so that its functions are traced once.
        self._predictor = Predictor(
            self._model,
            self._data.tokenizer,
            self._data.preprocessing,
            self._batch_size,
            self._hosts,
        )
        for one in self._evaluators:
            if hasattr(one, "check"):
                one.check(self._predictor)
        if self._hosts.is_chief:
            for one in self._evaluators:
                one.open()

    def __call__(self):
        """Runs all evaluators.

        Returns:
            Dict "evaluation/<evaluator's name>/<metric>" -> number, the same
            on all hosts.
        """
        figures = {}
        for one in self._evaluators:
            shared = getattr(one, "on_all_hosts", False)
            if shared or self._hosts.is_chief:
                for metric, value in one.run(self._predictor):
                    figures[f"evaluation/{one.name}/{metric}"] = value
        # The other hosts wait until the chief has finished reading weights.
        return self._hosts.first(figures) if self._evaluators else figures
