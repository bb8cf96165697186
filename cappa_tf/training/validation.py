"""Figures of a whole split, each example counted once.

B: batch (padded at the end of the split).
"""

import numpy as np
import tensorflow as tf

from cappa_tf.training.distribution.strategies import on_replicas


class Validation:
    """What a task reports in evaluation, over one split.

    Hold on to one object for a whole run: its graph is traced once per text
    length.

    Args:
        strategy: The run's strategy.
        hosts: The run's `Hosts`; each evaluates its part of the split.
        model: A `Task`.
        data: Has `evaluate(batch_size, host, num_hosts)`, a host's part of
            the split in padded batches with `_mask` [B], 1 where an example
            is real.
        batch_size: Over all devices of all hosts.
    """

    def __init__(self, strategy, hosts, model, data, batch_size):
        self._hosts, self._model = hosts, model
        self._data, self._batch_size = data, batch_size
        self._names = None  # of the sums, once a batch has been traced
        self._sums = on_replicas(strategy, self._example_sums, hosts.count)

    def __call__(self):
        """Evaluates the split.

        Returns:
            Dict: each metric of the task; `loss`, its mean over the examples;
            `examples`, how many there were.

        Raises:
            ValueError: If the split holds nothing that can be measured.
        """
        totals = 0.0
        for batch in self._batches():
            totals += self._sums(batch).numpy().sum(0, dtype=np.float64)
        totals = np.sum(self._hosts.gather(totals), axis=0)
        pairs = dict(zip(self._names, totals.reshape(-1, 2).tolist()))
        examples = int(round(pairs["loss"][1]))
        if not all(weight for _, weight in pairs.values()):
            raise ValueError(
                "The evaluation split must hold at least one caption. "
                f"Received: {examples} examples without any"
            )
        # The loss last: it is what the others explain.
        pairs["loss"] = pairs.pop("loss")
        figures = {
            name: total / weight for name, (total, weight) in pairs.items()
        }
        return {**figures, "examples": examples}

    def _batches(self):
        """This host's part of the split."""
        hosts = self._hosts
        return self._data.evaluate(
            self._batch_size // hosts.count, hosts.index, hosts.count
        )

    def _example_sums(self, batch):
        """Float32 [B, 2 * figures]: totals and weights, zeros for padding."""
        mask = batch["_mask"]  # [B]
        losses = self._model.example_losses(batch, training=False)
        figures = {"loss": (losses.loss, mask), **losses.metrics}
        self._names = list(figures)
        # A padding example may hold anything, NaN included: where, not times.
        real = [
            tf.where(mask > 0, value, 0.0)
            for pair in figures.values()
            for value in pair
        ]
        return tf.stack(real, axis=1)
