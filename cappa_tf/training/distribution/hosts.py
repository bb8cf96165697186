"""Communication between the hosts of a run.

Every host runs the same loop over its own examples, with its own copy of the
weights; TensorFlow sums gradients and metrics over the hosts in each step.
Apart from that they exchange only small Python values, at points that all of
them reach. The first host is the chief, the only one that writes.
"""

import contextlib
import pickle

import numpy as np
import tensorflow as tf

from cappa_tf.training.distribution.strategies import tf_config_workers

# Errors of collective operations after a process or a connection is lost:
# at once, or when TensorFlow's coordination service misses heartbeats.
_LOST = (
    tf.errors.UnavailableError,
    tf.errors.DeadlineExceededError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
)


class WorkerLostError(RuntimeError):
    """Another process of the run has ended or cannot be reached."""


class Hosts:
    """The hosts of a run, and this process's place among them.

    Args:
        strategy: The run's strategy. Every strategy other than
            `MultiWorkerMirroredStrategy` is driven by one process and counts
            as one host.

    Attributes:
        count: Number of hosts.
        index: Index of this host, from 0.
    """

    def __init__(self, strategy):
        self.count, self.index = 1, 0
        self._strategy = strategy
        if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
            workers, self.index = tf_config_workers()
            self.count = len(workers)
        self._local_replicas = strategy.num_replicas_in_sync // self.count
        self._gather = tf.function(
            self._gather_words,
            input_signature=[tf.TensorSpec([None], tf.int32)],
            autograph=False,
        )

    @property
    def is_chief(self):
        """Whether this is the host that writes."""
        return self.index == 0

    def gather(self, value):
        """Gathers a value from every host; every host must call it.

        Args:
            value: Anything that can be pickled.

        Returns:
            List of the values in order of the hosts, the same on all hosts.
        """
        if self.count == 1:
            return [value]
        pickled = pickle.dumps(value)
        padded = pickled + b"\0" * (-len(pickled) % 4)
        # Sent as int32, which all devices can exchange.
        words = np.frombuffer(padded, np.int32)
        message = np.concatenate([np.array([len(pickled)], np.int32), words])
        return list(_messages(self._gather(message).numpy()))

    def first(self, value):
        """The first value that is not None in order of the hosts."""
        given = (v for v in self.gather(value) if v is not None)
        return next(given, None)

    def wait(self):
        """Returns once all hosts have reached this point."""
        self.gather(None)

    def check_same(self, what, value):
        """Checks that all hosts have found the same value.

        Args:
            what: Description of the value, for the message.
            value: This host's value.

        Raises:
            ValueError: If the values differ; the message lists all of them.
        """
        values = self.gather(value)
        if any(other != values[0] for other in values):
            raise ValueError(
                f"All hosts must find {what}; the run's folder must be shared "
                "by all of them. Received, by host: "
                f"{dict(enumerate(values))}"
            )

    @contextlib.contextmanager
    def explain_loss(self):
        """Turns the errors of a lost process into one plain message.

        Raises:
            WorkerLostError: In place of TensorFlow's own error.
        """
        try:
            yield
        except _LOST as error:
            if self.count == 1:
                raise
            raise WorkerLostError(
                f"Another worker ended or cannot be reached (this is worker "
                f"{self.index} of {self.count}); its own output says why. "
                "The same command, started again on all hosts, resumes from "
                f"the last checkpoint. TensorFlow says: {_last_words(error)}"
            ) from error

    def _gather_words(self, words):
        """Concatenates the words of all hosts, int32 [any]."""

        def share():
            context = tf.distribute.get_replica_context()
            replica = context.replica_id_in_sync_group
            first = tf.equal(replica % self._local_replicas, 0)
            return words[: tf.where(first, tf.size(words), 0)]

        return self._strategy.gather(self._strategy.run(share), axis=0)


def _messages(words):
    """Yields the Python values pickled in a sequence of (length, words)."""
    while len(words):
        length = int(words[0])
        end = 1 + -(-length // 4)
        yield pickle.loads(words[1:end].tobytes()[:length])
        words = words[end:]


def _last_words(error):
    """The line of a TensorFlow error that names the cause."""
    lines = [line.strip() for line in str(error.message).splitlines()]
    about = [line for line in lines if "aborted by" in line]
    return (about or [line for line in lines if line] or [repr(error)])[0]
