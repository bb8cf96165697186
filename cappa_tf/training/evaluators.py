"""Evaluators (`evaluation/evaluator.py`) while a model is trained."""

import collections

from cappa_tf.evaluation.scorer import Scorer
from cappa_tf.saving.run_folder import PICTURE


def check_evaluators(evaluators):
    """Refuses what is no list of evaluators with names of their own."""
    for one in evaluators:
        if not (callable(getattr(one, "run", None)) and hasattr(one, "name")):
            raise ValueError(
                "`evaluators` must have a `name`, `open()` and `run(scorer)`, "
                f"as evaluation.evaluator.Evaluator has. Received: {one!r}"
            )
    names = collections.Counter(one.name for one in evaluators)
    if any(count > 1 for count in names.values()):
        raise ValueError(
            "Each evaluator must have its own `name`. Received: "
            f"{[*names.elements()]}"
        )


class Evaluators:
    """Runs evaluators on the model as it stands.

    The chief runs them for all hosts: they only read weights, of which every
    host has a copy. Those that say `on_all_hosts` share the work.

    Args:
        evaluators: A list of evaluators; may be empty.
        model: The model that is trained.
        data: Data set whose tokenizer and preprocessing the model has.
        batch_size: Images at once.
        hosts: The run's `Hosts`.
    """

    def __init__(self, evaluators, model, data, batch_size, hosts):
        self._evaluators = evaluators
        self._model, self._data = model, data
        self._batch_size, self._hosts = batch_size, hosts
        self._scorer = None

    def open(self):
        """Opens what the evaluators measure on, if there are any.

        Raises:
            ValueError: It is not there.
        """
        if not self._evaluators:
            return
        # One for the whole run: it keeps what was traced.
        self._scorer = Scorer(
            self._model,
            self._data.tokenizer,
            {name: getattr(self._data, name) for name in PICTURE},
            self._batch_size,
            self._hosts,
        )
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
                for metric, value in one.run(self._scorer):
                    figures[f"evaluation/{one.name}/{metric}"] = value
        # None goes on while the chief still reads its weights.
        return self._hosts.first(figures) if self._evaluators else figures
