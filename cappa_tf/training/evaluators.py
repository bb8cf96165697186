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
        batch_size: Images at once.
        hosts: The run's `Hosts`.

    Raises:
        ValueError: The model lacks what an evaluator needs.
    """

    def __init__(self, evaluators, model, data, batch_size, hosts):
        self._evaluators = evaluators
        self._model, self._data = model, data
        self._batch_size, self._hosts = batch_size, hosts
        self._predictor = None

    def open(self):
        """Opens what the evaluators measure on, if there are any.

        Raises:
            ValueError: It is not there.
        """
        if not self._evaluators:
            return
        # One for the whole run: it keeps what was traced.
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
        # No host continues while the chief still reads its weights.
        return self._hosts.first(figures) if self._evaluators else figures
