"""The training step, and the compiled loop that runs many of them.

M: room for the sums that are kept of a step.
"""

import tensorflow as tf

from cappa_tf.training.distribution.strategies import has_accelerator
from cappa_tf.training.gradients import TaskGradients, function
from cappa_tf.training.optimizers.base import (
    ScheduledOptimizer,
    apply_summed,
    global_norm,
)
from cappa_tf.training.reporting.metrics import SumsLayout

# Number of trained parameters from which an update is worth compiling.
_SIZE_TO_FUSE = 1_000_000


class TrainLoop:
    """Runs training steps on the device; returns metrics once per call.

    A step does what Keras' own TensorFlow trainer does, spelled out for
    several replicas: the per-example losses are summed and divided by the
    GLOBAL batch size, so that the SUM of the replicas' gradients (and of the
    microbatches') is the gradient of the mean; the optimizer then applies it.

    Args:
        strategy: The strategy under whose scope model and optimizer were built.
        model: A `Task`.
        optimizer: A built Keras optimizer.
        batch_size: Global batch size (all replicas, all microbatches).
        accumulation_steps: Microbatches per step, processed in sequence.
        jit_compile: Whether to compile with XLA. With several replicas only
            the forward and backward pass are compiled, as XLA cannot read
            another device's variables. On a CPU the optimizer's update of a
            model that is not tiny is compiled in any case.
        stop: Optional boolean `tf.Variable`. Once it is true on any host, the
            loops of all hosts end at the same step boundary.
        measure_wait: Whether to time the wait for data; TensorFlow allows no
            clock in its deterministic mode.
        num_hosts: Number of processes that run this loop in parallel.
    """

    def __init__(
        self,
        strategy,
        model,
        optimizer,
        batch_size,
        accumulation_steps=1,
        jit_compile=False,
        stop=None,
        measure_wait=True,
        num_hosts=1,
    ):
        self._strategy = strategy
        self._model = model
        self._optimizer = optimizer
        self._replicas = strategy.num_replicas_in_sync
        self._stop = tf.constant(False) if stop is None else stop
        self._num_hosts = num_hosts
        self._measure_wait = measure_wait
        # With several replicas only forward and backward pass are compiled.
        alone = self._replicas == 1
        self._gradients = TaskGradients(
            model, batch_size, accumulation_steps, jit_compile and not alone
        )
        if jit_compile and alone:
            self._update = function(self._update, jit_compile=True)
        elif alone and _fusing_pays(model, optimizer):
            optimizer.fuse_updates()
        self._loop = function(self._run_steps)
        self._layout = SumsLayout()

    def __call__(self, iterator, steps):
        """Runs up to `steps` steps.

        Args:
            iterator: Yields batches (distributed, with several replicas).
            steps: Python integer.

        Returns:
            (sums, steps, waited, weight_norm, stopped): `metrics.Sums` of the
            steps, the number of steps run, seconds spent waiting for batches
            (None if not measured), global norm of the weights afterwards, and
            whether any host asked to stop.
        """
        sums, done, waited, norm, stopped = self._loop(
            iterator, tf.constant(steps)
        )
        sums = self._layout.unpacked(sums.numpy().tolist())
        waited = float(waited) if self._measure_wait else None
        return sums, int(done), waited, float(norm), bool(stopped)

    def count_nodes(self, iterator):
        """Nodes of the graph of the loop, with those of all functions in it.

        Args:
            iterator: As in a call.
        """
        traced = self._loop.get_concrete_function(iterator, tf.constant(1))
        graph = traced.graph.as_graph_def()
        functions = graph.library.function
        return len(graph.node) + sum(len(f.node_def) for f in functions)

    def _run_steps(self, iterator, steps):
        def unfinished(done, stopping, totals, waited):
            return tf.logical_and(done < steps, tf.logical_not(stopping))

        def step(done, stopping, totals, waited):
            batch, seconds = self._timed_next(iterator, after=totals)
            sums = self._strategy.run(self._replica_step, args=(batch,))
            sums = self._strategy.reduce("SUM", sums, axis=None)
            return (
                done + 1,
                sums[-1] > 0.0,
                totals + tf.cast(sums[:-1], tf.float64),
                waited + seconds,
            )

        # Sums over a loop can pass 2^24 tokens, where float32 stops counting.
        totals = tf.cast(SumsLayout.zeros(), tf.float64)
        done, stopping, totals, waited = tf.while_loop(
            unfinished,
            step,
            (
                tf.constant(0),
                # Several hosts must first agree to stop, within a step.
                tf.logical_and(self._stop, self._num_hosts == 1),
                totals,
                tf.zeros([], tf.float64),
            ),
            parallel_iterations=1,
        )
        with tf.control_dependencies([totals]):
            norm = global_norm(_values(self._model))
        return totals, done, waited, norm, stopping

    def _timed_next(self, iterator, after):
        """The next batch and the time the step waited for it, in seconds.

        On an accelerator the host runs ahead of the device, so the time is an
        upper bound on how long the device was idle.
        """
        if not self._measure_wait:
            return iterator.get_next(), tf.zeros([], tf.float64)
        with tf.control_dependencies([after]):
            asked = tf.timestamp()
        with tf.control_dependencies([asked]):
            batch = iterator.get_next()
        parts = tf.nest.flatten(batch, expand_composites=True)
        with tf.control_dependencies(parts):
            got = tf.timestamp()
        # Make the step wait for the clock: otherwise the executor may read it
        # after the step (and does so with one thread).
        with tf.control_dependencies([got]):
            parts = [_identity(x) for x in parts]
        batch = tf.nest.pack_sequence_as(batch, parts, expand_composites=True)
        return batch, got - asked

    def _replica_step(self, batch):
        """One replica's part of a step.

        Returns:
            float32 [M + 1]: its packed sums, and 1 if this host asks to stop.
            They are reduced together, so that all hosts agree.
        """
        sums = self._update(batch)
        with tf.control_dependencies([sums]):  # As late as possible.
            stop = tf.cast(self._stop, tf.float32)
        return tf.concat([sums, [stop]], axis=0)

    def _update(self, batch):
        """Applies the gradients of a batch; returns its packed sums [M]."""
        gradients, sums = self._gradients.of_batch(batch)
        sums = self._gradients.layout.unpacked(sums)
        if self._replicas > 1:
            context = tf.distribute.get_replica_context()
            gradients = context.all_reduce(
                tf.distribute.ReduceOp.SUM, gradients
            )
        norm = global_norm(gradients)
        variables = self._model.trainable_variables
        apply_summed(self._optimizer, gradients, variables, norm)
        # Every replica has the same norm, and all replicas' sums are added.
        share = tf.constant(1.0 / self._replicas)
        sums.figures["gradient_norm"] = (norm * share, share)
        return self._layout.packed(sums)


def _fusing_pays(model, optimizer):
    """Whether to compile the optimizer's update but not the step.

    On a CPU products are faster without XLA, in contrast to what an optimizer
    does. Of a tiny model (as in tests) compiling takes longer than it saves.
    """
    size = sum(v.shape.num_elements() for v in _values(model))
    return (
        isinstance(optimizer, ScheduledOptimizer)
        and size >= _SIZE_TO_FUSE
        and not has_accelerator()
    )


def _values(model):
    return [variable.value for variable in model.trainable_variables]


def _identity(tensor):
    """Identity on the tensor's own device."""
    with tf.device(tensor.device):
        return tf.identity(tensor)
