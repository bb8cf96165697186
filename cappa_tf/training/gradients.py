"""Gradients of a task on one replica's batch.

If the loss is a mean over examples, each microbatch contributes separately. A
task that compares the examples of the whole batch (`WholeBatchTask`) takes two
passes: the first computes the embeddings of all examples, which every replica
then compares; the second runs each microbatch again with the derivatives of the
loss with respect to its embeddings. The result is exactly the gradient of the
whole batch, with the memory of one microbatch (GradCache, arXiv 2101.06983). A
batch of one microbatch takes one pass.

B: examples of the global batch.  R: of one replica's.  A: microbatches.
C: width of the embeddings.
"""

import contextlib
import functools

import tensorflow as tf

from cappa_tf.training.reporting.metrics import Sums, SumsLayout

# AutoGraph has nothing to convert here or in the model, and finding that out
# takes it as long as the rest of the tracing.
function = functools.partial(tf.function, autograph=False)


class TaskGradients:
    """A replica's share of the gradients of the mean loss.

    Must be called in a replica's context; the SUM over the replicas is the
    gradient of the mean over the global batch.

    Args:
        model: A built `Task`.
        batch_size: B.
        accumulation_steps: A.
        jit_compile: Whether to compile forward and backward pass with XLA,
            without the exchange between replicas.

    Attributes:
        of_batch: Function of the replica's batch, a dict of tensors [R, ...],
            that returns (dense gradients, packed sums of the examples).
        layout: `SumsLayout` that unpacks these sums.
    """

    def __init__(
        self, model, batch_size, accumulation_steps=1, jit_compile=False
    ):
        self._model = model
        self._batch_size = batch_size
        self._accumulation_steps = accumulation_steps
        self.layout = SumsLayout()
        wrap = functools.partial(function, jit_compile=True)
        if not jit_compile:
            wrap = _unchanged
        if model.needs_whole_batch:
            self._forward = wrap(lambda batch: model.embed(batch, True))
            # Without the losses: nothing that only they need is computed.
            self._embed = wrap(lambda batch: model.embed(batch, True)[:2])
            self._backward = wrap(self._against_derivatives)
            self.of_batch = self._of_whole_batch
        elif accumulation_steps > 1:
            self.of_batch = wrap(self._of_microbatches)
        else:
            self.of_batch = wrap(self.of_microbatch)

    def _of_microbatches(self, batch):
        return self._accumulated(self.of_microbatch, batch)

    def of_microbatch(self, batch):
        """Gradients of a microbatch whose loss depends only on itself.

        Args:
            batch: Dict of tensors [R / A, ...].

        Returns:
            (dense gradients, packed sums).
        """
        with self._tape() as tape:
            losses = self._model.example_losses(batch, training=True)
            loss = tf.reduce_sum(losses.loss) / self._batch_size
        return self._dense(tape, loss), self.layout.packed(Sums.of(losses))

    def _of_whole_batch(self, batch):
        model = self._model
        if self._accumulation_steps == 1:
            with self._tape() as tape:
                images, texts, losses = self._forward(batch)
                loss = tf.reduce_sum(losses.loss) / self._batch_size
            derivatives, direct, whole = self._compare(images, texts)
            gradients = self._dense(
                tape, [images, texts, loss], [*derivatives, tf.ones([])]
            )
            sums = Sums.of(losses)
        else:
            parts = {
                key: _microbatches(x, self._accumulation_steps)
                for key, x in batch.items()
            }
            shape = [batch["index"].shape[0], model.embedding_width]
            spec = tf.TensorSpec([parts["index"].shape[1], shape[1]])
            embeddings = tf.map_fn(
                self._embed,
                parts,
                parallel_iterations=1,
                fn_output_signature=(spec, spec),
            )
            derivatives, direct, whole = self._compare(
                *(tf.reshape(x, shape) for x in embeddings)
            )
            gradients, sums = self._accumulated(
                self._backward,
                {**batch, _DERIVATIVES: tf.stack(derivatives, 1)},
            )
            sums = self.layout.unpacked(sums)
        # Gradients of the head's own variables, such as the temperature.
        gradients = [
            g if d is None else g + tf.convert_to_tensor(d)
            for g, d in zip(gradients, direct)
        ]
        return gradients, self.layout.packed(sums.of_both(whole))

    def _against_derivatives(self, batch):
        """Gradients of a microbatch, from the derivatives of its embeddings."""
        batch = dict(batch)
        derivatives = tf.unstack(batch.pop(_DERIVATIVES), axis=1)
        with self._tape() as tape:
            images, texts, losses = self._model.embed(batch, True)
            loss = tf.reduce_sum(losses.loss) / self._batch_size
        gradients = self._dense(
            tape, [images, texts, loss], [*derivatives, tf.ones([])]
        )
        return gradients, self.layout.packed(Sums.of(losses))

    def _compare(self, images, texts):
        """Compares this replica's pairs with those of all replicas.

        Args:
            images: float32 [R, C].
            texts: float32 [R, C].

        Returns:
            (derivatives of the global loss with respect to both, those with
            respect to the variables or None, `Sums` of this replica's pairs).
        """
        context = tf.distribute.get_replica_context()
        several = context.num_replicas_in_sync > 1
        own = (0, images.shape[0])
        pairs = (images, texts)
        if several:
            index = context.replica_id_in_sync_group
            own = (index * images.shape[0], images.shape[0])
            pairs = [context.all_gather(x, axis=0) for x in pairs]
            for x in pairs:
                x.set_shape([None, images.shape[1]])
        with self._tape() as tape:
            tape.watch(pairs)
            losses = self._model.batch_losses(*pairs, own)
            loss = tf.reduce_sum(losses.loss) / self._batch_size
        derivatives, direct = tape.gradient(loss, [list(pairs), self._values()])
        if several:
            # A pair contributes to the loss of every replica.
            derivatives = context.all_reduce(
                tf.distribute.ReduceOp.SUM, derivatives
            )
            start, size = [own[0], 0], [own[1], images.shape[1]]
            derivatives = [tf.slice(x, start, size) for x in derivatives]
        return derivatives, direct, Sums.of(losses)

    def _values(self):
        return [v.value for v in self._model.trainable_variables]

    @contextlib.contextmanager
    def _tape(self):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(self._values())
            yield tape

    def _dense(self, tape, target, upstream=None):
        """Gradients as dense tensors, zeros for variables without effect.

        Embedding lookups yield IndexedSlices; norms, sums over microbatches and
        factored moments all need the dense gradient.
        """
        values = self._values()
        gradients = tape.gradient(
            target, values, upstream, unconnected_gradients="zero"
        )
        gradients = [tf.convert_to_tensor(g) for g in gradients]
        for gradient, value in zip(gradients, values):
            # Texts of open length (`length_buckets`) leave it unknown.
            gradient.set_shape(value.shape)
        return gradients

    def _accumulated(self, function, batch):
        """Sums the results of `function` over the microbatches."""
        count = self._accumulation_steps
        parts = {key: _microbatches(x, count) for key, x in batch.items()}

        def add_one(i, gradients, sums):
            more, more_sums = function({k: x[i] for k, x in parts.items()})
            added = [a + b for a, b in zip(gradients, more)]
            return i + 1, added, sums + more_sums

        variables = self._model.trainable_variables
        zeros = [tf.zeros(v.shape, v.dtype) for v in variables]
        return tf.while_loop(
            lambda i, *_: i < count,
            add_one,
            (tf.constant(0), zeros, SumsLayout.zeros()),
            maximum_iterations=count,
        )[1:]


# Key of the derivatives of the embeddings in a batch, [R, 2, C].
_DERIVATIVES = "_derivatives"


def _microbatches(value, count):
    """Reshapes [R, ...] to [A, R / A, ...]; the text length may be unknown."""
    shape = tf.concat([[count, -1], tf.shape(value)[1:]], axis=0)
    parts = tf.reshape(value, shape)
    parts.set_shape([count, value.shape[0] // count, *value.shape[1:]])
    return parts


def _unchanged(function):
    return function
