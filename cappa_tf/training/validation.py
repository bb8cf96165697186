"""Likelihood of a whole split under the model, counted exactly.

B: batch (padded at the end of the split).
"""

import tensorflow as tf

from cappa_tf.training.distribution import evaluation_batches


class Validation:
    """Negative log-likelihood per token, left to right, over one split.

    Hold on to one object for a whole run: its graph is traced once per text
    length.

    Args:
        strategy: The run's strategy.
        model: Has `compute_losses(batch, training)`.
        data: Has `evaluate(batch_size)`, a data set of padded batches with
            `_mask` [B], 1 where an example is real.
        batch_size: Over all replicas.
    """

    def __init__(self, strategy, model, data, batch_size):
        self._strategy, self._model = strategy, model
        self._data, self._batch_size = data, batch_size
        self._sums = tf.function(
            self._batch_sums, autograph=False, reduce_retracing=True
        )

    def __call__(self):
        """Evaluates the split.

        Returns:
            Dict: `nll_per_token` in nats, summed over all tokens of all
            captions and divided by their number; `loss`, the mean over
            captions of each caption's mean; `examples`, how many were real.

        Raises:
            ValueError: If the split holds no example or no token.
        """
        data = self._data.evaluate(self._batch_size)
        totals = [0.0, 0.0, 0.0, 0.0]
        for batch in evaluation_batches(self._strategy, data):
            sums = self._sums(batch).numpy().tolist()
            totals = [a + b for a, b in zip(totals, sums)]
        nll, tokens, loss, examples = totals
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

    def _batch_sums(self, batch):
        per_replica = self._strategy.run(self._replica_sums, args=(batch,))
        return self._strategy.reduce("SUM", per_replica, axis=None)

    def _replica_sums(self, batch):
        mask = batch["_mask"]  # [B]
        losses = self._model.compute_losses(batch, training=False)
        # A padding example may hold anything, NaN included: where, not times.
        real = [
            tf.where(mask > 0, losses[name], 0.0)
            for name in ("nll", "tokens", "loss")
        ]
        return tf.stack([tf.reduce_sum(v) for v in (*real, mask)])
