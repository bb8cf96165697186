"""Likelihood of a whole split under the model, counted exactly.

B: batch (padded at the end of the split).
"""

import numpy as np
import tensorflow as tf

from cappa_tf.training.distribution import on_replicas


class Validation:
    """Negative log-likelihood per token, left to right, over one split.

    Hold on to one object for a whole run: its graph is traced once per text
    length.

    Args:
        strategy: The run's strategy.
        hosts: The run's `Hosts`; each evaluates its part of the split.
        model: Has `compute_losses(batch, training)`.
        data: Has `evaluate(batch_size, host, num_hosts)`, a host's part of
            the split in padded batches with `_mask` [B], 1 where an example
            is real.
        batch_size: Over all devices of all hosts.
    """

    def __init__(self, strategy, hosts, model, data, batch_size):
        self._hosts, self._model = hosts, model
        self._data, self._batch_size = data, batch_size
        self._sums = on_replicas(strategy, self._example_sums, hosts.count)

    def __call__(self):
        """Evaluates the split.

        Returns:
            Dict: `nll_per_token` in nats, summed over all tokens of all
            captions and divided by their number; `loss`, the mean over
            captions of each caption's mean; `examples`, how many were real.

        Raises:
            ValueError: If the split holds no example or no token.
        """
        totals = np.zeros([4])
        for batch in self._batches():
            totals += self._sums(batch).numpy().sum(0, dtype=np.float64)
        totals = np.sum(self._hosts.gather(totals), axis=0)
        nll, tokens, loss, examples = totals.tolist()
        if not tokens:
            raise ValueError(
                "The evaluation split must hold at least one caption. "
                f"Received: {int(examples)} examples without any"
            )
        return {
            "nll_per_token": nll / tokens,
            "loss": loss / examples,
            "examples": int(round(examples)),
        }

    def _batches(self):
        """This host's part of the split."""
        hosts = self._hosts
        return self._data.evaluate(
            self._batch_size // hosts.count, hosts.index, hosts.count
        )

    def _example_sums(self, batch):
        """Float32 [B, 4]: nll, tokens, loss and 1, or zeros for padding."""
        mask = batch["_mask"]  # [B]
        losses = self._model.compute_losses(batch, training=False)
        # A padding example may hold anything, NaN included: where, not times.
        real = [
            tf.where(mask > 0, losses[name], 0.0)
            for name in ("nll", "tokens", "loss")
        ]
        return tf.stack([*real, mask], axis=1)
