"""Bad records: counting them, naming them in the log, and their limit.

Dimensions:
    B: batch size.
"""

import collections
import math
import threading

import tensorflow as tf
from absl import logging


class SkipCounter:
    """Counts skipped records by reason.

    Args:
        max_fraction: Maximum fraction of all examples (at the start, of those
            of one epoch) that may be skipped. One is always tolerated, unless
            this is 0.
        num_examples: Number of examples per epoch.
        name: Name of the data in messages.

    Attributes:
        max_fraction: The argument of this name.
        failure: The error that stopped reading, or None. TensorFlow wraps it
            in one of its own, in the middle of a long trace.
    """

    # Maximum number of names to log for each reason.
    MOST_NAMES = 20

    def __init__(self, max_fraction, num_examples, name):
        self.max_fraction = max_fraction
        self._num_examples = num_examples
        self._name = name
        self._counts = collections.Counter()
        self._noted = collections.Counter()
        self._left_out = collections.Counter()
        self._calls = collections.Counter()
        self._positions = set()
        self._seen = 0
        self.failure = None
        self._lock = threading.Lock()

    @property
    def counts(self):
        """Dict reason -> number of skipped records."""
        with self._lock:
            return dict(self._counts + self._noted + self._left_out)

    @property
    def noted(self):
        """The part of `counts` that came from `note`."""
        return dict(self._noted)

    @property
    def total(self):
        """Total number of skipped records."""
        return sum(self.counts.values())

    def note(self, reason, name):
        """Counts an item other than a record: a malformed row, a caption.

        Args:
            reason: Reason to count by.
            name: Place of the item.
        """
        with self._lock:
            self._noted[reason] += 1
        self._log(reason, name)

    def leave_out(self, reason, name):
        """Counts a part of a record that is used without it: a caption.

        Args:
            reason: Reason to count by.
            name: Key of the record.
        """
        with self._lock:
            self._left_out[reason] += 1
        self._log(reason, name)

    def add(self, reason, name, seen=0, count=1):
        """Counts one record, or several that are lost together.

        Args:
            reason: Reason to count by.
            name: Key or file of the record, the first of several.
            seen: Number of examples this process has read so far, good or bad.
            count: Number of records.

        Raises:
            ValueError: If more were skipped than allowed.
        """
        with self._lock:
            self._counts[reason] += count
            total = sum(self._counts.values())
            # Batches are decoded in parallel and may report out of order.
            self._seen = max(self._seen, seen)
            allowed = self.allowed(self._seen)
        self._log(reason, name, count)
        if total > allowed:
            self.failure = ValueError(
                f"{self._name}: {total} records were skipped, more than "
                f"max_skipped_fraction={self.max_fraction} allows "
                f"({allowed}): {self.counts}. The last one: {name}"
            )
            raise self.failure

    def _log(self, reason, name, count=1):
        with self._lock:
            # Counts calls, not records, as each call has one name.
            self._calls[reason] += 1
            calls = self._calls[reason]
        if calls <= self.MOST_NAMES:
            last = " (no more names)" if calls == self.MOST_NAMES else ""
            times = f"{count} x " if count > 1 else ""
            logging.warning(
                "%s: skipped %s: %s%s%s", self._name, name, times, reason, last
            )

    def report(
        self,
        batch,
        diagnose,
        stream,
        start_index=0,
        num_hosts=1,
        left_out=None,
    ):
        """Counts the bad records of a batch, in a tf.data graph.

        Python is called only for a batch that has some. A position of a
        stream counts once, however often the stream is read.

        Args:
            batch: Dict with "ok", "raw" and "index" as from
                `RecordDecoder.decode_chunk`. Padding is not ok and has no
                bytes.
            diagnose: Function of a serialized record that returns (reason,
                name).
            stream: Name of the stream.
            start_index: Position at which the stream started.
            num_hosts: Number of hosts that share the stream; each counts its
                own part.
            left_out: The reason why captions are left out of records that are
                ok and not blank in "raw".
        """
        raw = batch["raw"]
        bad = tf.strings.length(raw) > 0

        @tf.autograph.experimental.do_not_convert
        def count(raws, good, positions):
            for serialized, is_good, position in zip(
                raws.numpy(), good.numpy(), positions.numpy()
            ):
                if (stream, position) in self._positions:
                    continue
                self._positions.add((stream, position))
                reason, name = diagnose(serialized)
                if is_good:
                    self.leave_out(left_out, name)
                    continue
                read = int(position) - start_index + 1
                self.add(reason, name, -(-read // num_hosts))
            return 0

        tf.cond(
            tf.reduce_any(bad),
            lambda: tf.py_function(
                count,
                [
                    tf.boolean_mask(raw, bad),
                    tf.boolean_mask(batch["ok"], bad),
                    tf.boolean_mask(batch["index"], bad),
                ],
                tf.int32,
            ),
            lambda: 0,
        )

    def allowed(self, seen=0):
        """Returns how many may be skipped after `seen` examples."""
        if self.max_fraction == 0:
            return 0
        examples = max(seen, self._num_examples)
        return max(1, math.ceil(self.max_fraction * examples))


def check_shards(wrong, message, num_examples, max_fraction):
    """Decides, before reading, about shards that differ from their record.

    Missing or shorter shards are tolerated (the missing records are skipped and
    counted) as long as they are few. Shards that have grown belong to another
    version of the data.

    Args:
        wrong: List of (shard, its size on disk).
        message: Description of them.
        num_examples: Number of examples of the split.
        max_fraction: Maximum fraction of the examples that may be missing.

    Raises:
        ValueError: If too many are missing, or a shard is larger than recorded.
    """
    if not wrong:
        return
    lacking = 0.0
    for shard, size in wrong:
        if size > shard.num_bytes:
            raise ValueError(message)
        lacking += shard.num_examples * (1 - size / shard.num_bytes)
    if lacking > max_fraction * num_examples:
        raise ValueError(
            f"{message} About {lacking / num_examples:.2%} of the examples "
            f"are missing, more than max_skipped_fraction={max_fraction}."
        )
    logging.warning("%s", message)
