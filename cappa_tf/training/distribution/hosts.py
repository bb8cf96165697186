"""What the processes of a run on several hosts tell each other.

Every host runs the same loop over its own examples, with its own copy of the
weights; TensorFlow sums gradients and figures over them in each step. Beside
that they only exchange small Python values, at points that all of them reach.
The first host is the chief: the only one that writes.
"""

import contextlib
import pickle

import numpy as np
import tensorflow as tf

from cappa_tf.training.distribution.strategies import tf_config_workers

# What the operations between hosts end with when a process or a connection is
# gone: at once, or when TensorFlow's coordination service misses heartbeats.
_LOST = (
    tf.errors.UnavailableError,
    tf.errors.DeadlineExceededError,
    tf.errors.AbortedError,
    tf.errors.CancelledError,
)


class WorkerLostError(RuntimeError):
    """Another process of the run has ended or cannot be reached."""


class Hosts:
    """The hosts of a run, as this one sees them.

    Args:
        strategy: The run's strategy. All but `MultiWorkerMirroredStrategy`
            are driven by one process: one host here.

    Attributes:
        count: Number of hosts.
        index: Which of them this is, from 0.
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
        """Values of all hosts; every host must call it.

        Args:
            value: Anything that can be pickled.

        Returns:
            A list by host, the same on all of them.
        """
        if self.count == 1:
            return [value]
        pickled = pickle.dumps(value)
        padded = pickled + b"\0" * (-len(pickled) % 4)
        # As int32, which all devices can exchange.
        words = np.frombuffer(padded, np.int32)
        message = np.concatenate([np.array([len(pickled)], np.int32), words])
        return list(_messages(self._gather(message).numpy()))

    def first(self, value):
        """The first host's value that is not None, on all hosts."""
        given = (v for v in self.gather(value) if v is not None)
        return next(given, None)

    def wait(self):
        """Returns once all hosts have come to this point."""
        self.gather(None)

    def check_same(self, what, value):
        """Refuses to continue where hosts differ in what they found.

        Args:
            what: What the value is, for the message.
            value: This host's.

        Raises:
            ValueError: With the values of all hosts.
        """
        values = self.gather(value)
        if any(other != values[0] for other in values):
            raise ValueError(
                f"All hosts must find {what}: the folder of the run must be "
                "one that they share. Received, by host: "
                f"{dict(enumerate(values))}"
            )

    @contextlib.contextmanager
    def explain_loss(self):
        """Says in plain words that another process has ended.

        Raises:
            WorkerLostError: In place of what TensorFlow makes of it.
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
        """int32 [words of all hosts], one host's after the other's."""

        def share():
            context = tf.distribute.get_replica_context()
            replica = context.replica_id_in_sync_group
            first = tf.equal(replica % self._local_replicas, 0)
            return words[: tf.where(first, tf.size(words), 0)]

        return self._strategy.gather(self._strategy.run(share), axis=0)


def _messages(words):
    """The Python values that a row of (length, words) holds."""
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
