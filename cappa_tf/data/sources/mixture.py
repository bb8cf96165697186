"""Mixture of several sources, by weight.

Position P of the stream belongs to one source, whose next record is used. The
source is a function of (seed, P): in each block of 10,000 turns a source gets
its exact share, in a new random order for each block. So the number of records
of a source before any position is its share of the whole blocks plus a count in
one block, and a run resumes at any position directly. The records of a source
are the stream it would have alone, with its own order and complete epochs.

Dimensions:
    M: turns of a block.
    L: positions a turn lasts.
"""

import collections
import dataclasses

import numpy as np
import tensorflow as tf

from cappa_tf.data import prompts as prompts_lib
from cappa_tf.data.sources.base import Records
from cappa_tf.data.sources.prepared import as_source
from cappa_tf.data.stream import shuffling, stateless_random
from cappa_tf.utils import arguments

# M. Weights count as multiples of 1 / M.
BLOCK = 10_000


class Mixture:
    """A source that mixes other sources.

    Evaluation ignores the weights and goes through the sources in sequence,
    every record once.

    Args:
        sources: List of sources, or of folders of prepared data.
        weights: List of numbers in any unit, the relative frequencies.
        splits: Dict from a split to a list of its names in each source, for
            splits whose names differ.
        run_length: L, number of consecutive positions from one source;
            changing it changes the order. With several hosts, each reads only
            its own records if this and `num_readers` are multiples of their
            number; otherwise each reads all and drops those of the others.
        prompts: None, or a template for each source, what its captions
            answer: text such as "caption:" or "answer: {question}", or None
            for the questions of its records as they are, if it has any.
    """

    def __init__(
        self,
        sources: list | tuple,
        weights: list | tuple,
        splits: dict | None = None,
        run_length=1,
        prompts: list | tuple | None = None,
    ):
        arguments.check_integer("run_length", run_length, 1)
        if not sources or len(sources) != len(weights) or len(sources) > 255:
            raise ValueError(
                "`sources` must be 1 to 255 sources, and `weights` a number "
                f"for each. Received: {len(sources)} and weights={weights!r}"
            )
        self._shares = shares(weights)
        self._sources = [as_source(source) for source in sources]
        self._splits = splits or {}
        for split, names in self._splits.items():
            if len(names) != len(sources):
                raise ValueError(
                    "`splits` must give a name for each source. Received: "
                    f"{split!r}: {names!r} for {len(sources)} sources"
                )
        self._prompts = [None] * len(sources) if prompts is None else prompts
        if len(self._prompts) != len(sources):
            raise ValueError(
                "`prompts` must give a template (or None) for each source. "
                f"Received: prompts={prompts!r} for {len(sources)} sources"
            )
        for prompt in self._prompts:
            prompts_lib.check_template(prompt, "prompts")
        self._run_length = run_length
        self.name = " + ".join(source.name for source in self._sources)

    def split(self, split):
        """Returns the `Records` of a split."""
        names = self._splits.get(split, [split] * len(self._sources))
        return MixedRecords(
            [s.split(name) for s, name in zip(self._sources, names)],
            self._shares,
            self._run_length,
            self._prompts,
        )


def shares(weights):
    """Number of turns in a block for each weight, by largest remainder.

    Args:
        weights: Positive numbers.

    Returns:
        int64 array that sums to M, each at least 1.

    Raises:
        ValueError: If a weight is not a positive number, or less than half a
            turn.
    """
    numbers = all(
        isinstance(w, int | float) and 0 < w < float("inf") for w in weights
    )
    if not numbers:
        raise ValueError(
            f"`weights` must be positive numbers. Received: weights={weights!r}"
        )
    exact = np.array(weights, np.float64) / sum(weights) * BLOCK
    turns = np.floor(exact).astype(np.int64)
    missing = BLOCK - turns.sum()
    turns[np.argsort(turns - exact, kind="stable")[:missing]] += 1
    if turns.min() < 1:
        raise ValueError(
            f"Each of `weights` must be at least 1 / {BLOCK} of their sum. "
            f"Received: weights={weights!r}"
        )
    return turns


class Turns:
    """Assignment of positions to sources.

    Args:
        shares: int64 array, number of turns in a block for each source.
        seed: Integer.
        run_length: L.
    """

    def __init__(self, shares, seed, run_length):
        self._shares = shares
        self._seed = seed
        self._run_length = run_length
        self._length = run_length * BLOCK  # positions of a block

    def pattern(self, block):
        """Sources of the turns of a block, int64 [M]."""
        order = stateless_random.permutation(
            self._seed, stateless_random.MIXTURE, block, BLOCK
        )
        return tf.searchsorted(
            np.cumsum(self._shares), order, side="right", out_type=tf.int64
        )

    def given(self, position):
        """Number of records of each source before a position, int64 array."""
        block, rest = divmod(position, self._length)
        with tf.device("CPU:0"):
            pattern = np.repeat(self.pattern(block), self._run_length)
        return block * self._shares * self._run_length + np.bincount(
            pattern[:rest], minlength=len(self._shares)
        )

    def choices(self, start_index):
        """A `tf.data.Dataset` of (position, source) from a position on."""
        first = start_index // self._length

        def sources(block):
            skip = tf.maximum(start_index - block * self._length, 0)
            return tf.data.Dataset.from_tensor_slices(
                tf.repeat(self.pattern(block), self._run_length)[skip:]
            )

        blocks = tf.data.Dataset.counter(first, dtype=tf.int64)
        return blocks.flat_map(sources).enumerate(start=start_index)


class MixedRecords(Records):
    """One split of a `Mixture`.

    A record is prefixed by the number of its source, a byte.

    Args:
        members: List of `Records`.
        shares: int64 array, number of turns in a block for each.
        run_length: L.
        prompts: List of a template of prompts or None for each, or None.
    """

    def __init__(self, members, shares, run_length, prompts=None):
        super().__init__(
            " + ".join(records.name for records in members),
            [shard for records in members for shard in records],
        )
        self._members, self._shares = members, shares
        self._run_length = run_length
        self._prompts = [None] * len(members) if prompts is None else prompts
        for prompt, records in zip(self._prompts, members):
            prompts_lib.check_questions(prompt, records)
        self.has_prompts = any(self.prompts)

    @property
    def parts(self):
        """The `Records` of all sources, tagged with their number."""
        return [
            _Tagged(part, number)
            for number, records in enumerate(self._members)
            for part in records.parts
        ]

    @property
    def identity(self):
        """As `Records.identity`, of all members."""
        members = [records.identity for records in self._members]
        return [type(self).__name__, members, *self.settings]

    @property
    def settings(self):
        """As `Records.settings`: the templates of prompts."""
        return [self._prompts] if any(self._prompts) else []

    @property
    def prompts(self):
        """As `Records.prompts`; "" if some sources have none."""
        found = [
            prompts_lib.composed(prompt, records.prompts)
            for prompt, records in zip(self._prompts, self._members)
        ]
        if not any(found):
            return ()
        return tuple(dict.fromkeys(p for some in found for p in some or ("",)))

    @property
    def max_captions(self):
        """Maximum number of captions of a record."""
        return max(records.max_captions for records in self._members)

    def label_counts(self):
        """Counts the labels of all sources, as `Records` does."""
        found = [records.label_counts() for records in self._members]
        if None in found:
            return None
        return dict(sum(map(collections.Counter, found), collections.Counter()))

    def parse(self, serialized):
        """Parses a record in a graph, as in `Records`."""
        number = tf.io.decode_raw(tf.strings.substr(serialized, 0, 1), tf.uint8)
        length = tf.maximum(tf.strings.length(serialized) - 1, 0)
        content = tf.strings.substr(serialized, 1, length)

        def parse(records, prompt):
            def run():
                record = records.parse(content)
                if prompt is None:
                    return record
                captions, own = record["captions"], record["prompts"]
                missing = tf.size(captions) - tf.size(own)  # All or none.
                own = tf.pad(own, [[0, missing]])
                own, captions = prompts_lib.fill_in(prompt, own, captions)
                return {**record, "prompts": own, "captions": captions}

            return run

        return tf.switch_case(
            tf.cast(number[0], tf.int32),
            [parse(r, p) for r, p in zip(self._members, self._prompts)],
        )

    def deserialize(self, serialized):
        """Parses a record in Python, as in `Records`."""
        if not serialized or serialized[0] >= len(self._members):
            raise ValueError("no record of this mixture")
        example = self._members[serialized[0]].deserialize(serialized[1:])
        prompt = self._prompts[serialized[0]]
        if prompt is None:
            return example
        return prompts_lib.fill_in_example(prompt, example)

    def check(self, counter):
        """Checks the files, as in `Records`."""
        for records in self._members:
            records.check(counter)

    def check_captions(self):
        """Checks that no source is known to have no captions at all."""
        for records in self._members:
            records.check_captions()

    def numbers(self, reading, start_index):
        """Returns the training stream as record numbers, as in `Records`.

        The numbers of a source follow those of the previous one.
        """
        return self._numbers("numbers", reading, start_index, own=True)

    def order(self, reading, start_index):
        """As `Records.order`."""
        readers = reading.num_readers % reading.num_hosts == 0
        return self._numbers("order", reading, start_index, own=readers)

    def _numbers(self, kind, reading, start_index, own):
        begins = np.cumsum([0] + [r.num_examples for r in self._members])

        def numbers(member, records, *arguments):
            return getattr(records, kind)(*arguments).map(
                lambda _, number: number + begins[member]
            )

        return self._choose(numbers, reading, start_index, own)

    def stream(self, reading, start_index):
        """Returns the training stream, as in `Records`."""

        def stream(member, records, *arguments):
            return records.stream(*arguments).map(
                lambda _, serialized: _tag(member, serialized)
            )

        readers = reading.num_readers % reading.num_hosts == 0
        return self._choose(stream, reading, start_index, own=readers)

    def _choose(self, make_stream, reading, start_index, own):
        """Mixes the members' streams.

        Args:
            make_stream: Function of (index of a member, the member, reading,
                start index) that returns a `tf.data.Dataset`.
            reading: `Reading`.
            start_index: Position to start at.
            own: Whether members can read only the positions of a host.

        Returns:
            A `tf.data.Dataset` of (position, element).
        """
        host, num_hosts = reading.host, reading.num_hosts
        turns = Turns(self._shares, reading.seed, self._run_length)
        choices = turns.choices(start_index)
        # Then a position of the mixture equals, modulo the number of hosts, the
        # position in the stream of its source.
        own = own and self._run_length % num_hosts == 0
        if own:
            choices = shuffling.of_host(choices, host, num_hosts)
        else:
            reading = dataclasses.replace(reading, host=0, num_hosts=1)
        streams = [
            make_stream(member, records, reading, int(start))
            for member, (records, start) in enumerate(
                zip(self._members, turns.given(start_index))
            )
        ]
        chosen = tf.data.Dataset.choose_from_datasets(
            streams, choices.map(lambda position, source: source)
        )
        stride = num_hosts if own else 1
        first = start_index + (host - start_index) % stride
        positions = tf.data.Dataset.range(first, tf.int64.max, stride)
        stream = tf.data.Dataset.zip(positions, chosen)
        return stream if own else shuffling.of_host(stream, host, num_hosts)


class _Tagged(Records):
    """The records of a member, each prefixed by the member's number."""

    def __init__(self, part, number):
        super().__init__(part.name, part.shards)
        self._part, self._number = part, number

    def range_identity(self, shard, skip, count):
        return [self._number, *self._part.range_identity(shard, skip, count)]

    def read(self, shard, skip, count):
        return self._part.read(shard, skip, count).map(
            lambda serialized: _tag(self._number, serialized)
        )


def _tag(number, serialized):
    """Prefixes a record by a byte, unless it is lost."""
    lost = (
        tf.strings.substr(serialized, 0, len(shuffling.LOST)) == shuffling.LOST
    )
    tagged = tf.strings.join([bytes([number]), serialized])
    return tf.where(lost, serialized, tagged)
