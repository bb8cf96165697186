"""Metrics over a whole split, each example counted once.

B: batch (padded at the end of the split).
"""

import functools

import numpy as np
import tensorflow as tf

from cappa_tf.training.distribution.strategies import on_replicas
from cappa_tf.training.gradients import function


class Validation:
    """Computes the loss and the metrics of a task over one split.

    Reuse one object for a whole run, as its graph is traced once per text
    length.

    Args:
        strategy: The run's strategy.
        hosts: The run's `Hosts`; each evaluates its part of the split.
        model: A `Task`.
        data: Data set whose `evaluate(batch_size, host, num_hosts)` returns a
            host's part of the split in padded batches with `_mask` [B], 1 for
            real examples.
        batch_size: Batch size over all devices of all hosts. The examples of a
            task that compares them (`WholeBatchTask`) are compared within a
            host's part of such a batch.
    """

    def __init__(self, strategy, hosts, model, data, batch_size):
        self._hosts, self._model = hosts, model
        self._data, self._batch_size = data, batch_size
        self._names = None  # of the sums, once a batch has been traced
        shared = functools.partial(on_replicas, strategy, num_hosts=hosts.count)
        if model.needs_whole_batch:
            # However many devices embed a batch, it is compared as one.
            self._embed = shared(
                lambda batch: model.embed(batch, training=False)
            )
            self._sums = function(self._batch_sums)
        else:
            self._sums = shared(
                lambda batch: self._example_sums(
                    batch, model.example_losses(batch, training=False)
                )
            )

    def __call__(self):
        """Evaluates the split.

        Returns:
            Dict of each metric of the task; `loss`, its mean over the
            examples; and `examples`, their number.

        Raises:
            ValueError: If the split has no example with a caption.
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
        # The loss goes last, after the metrics that explain it.
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

    def _batch_sums(self, batch):
        embedded = self._embed(batch)
        losses = self._model.complete(*embedded, batch["_mask"])
        return self._example_sums(batch, losses)

    def _example_sums(self, batch, losses):
        """Totals and weights, float32 [B, 2 * metrics], zeros for padding."""
        mask = batch["_mask"]  # [B]
        figures = {"loss": (losses.loss, mask), **losses.metrics}
        self._names = list(figures)
        # A padding example may yield NaN, so it is masked with `where`.
        real = [
            tf.where(mask > 0, value, 0.0)
            for pair in figures.values()
            for value in pair
        ]
        return tf.stack(real, axis=1)
