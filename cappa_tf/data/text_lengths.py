"""Lengths of a data set's captions, and those to cut batches to.

`train_tokenizer` counts the captions by their number of tokens and writes the
counts beside the vocabulary. From them a data set with `length_buckets="auto"`
chooses the lengths that leave the least padding. Each is a program of its own
where XLA compiles a step, so there are three at most.
"""

import itertools
import json
import os

import numpy as np

from cappa_tf.utils import files

MOST = 3
# A further length has to save this fraction of the longest.
_WORTH = 0.05
# Products are faster if sizes are multiples of it.
_STEP = 8


def path_beside(vocabulary):
    """Path of the counts that belong to a vocabulary file."""
    return os.path.splitext(vocabulary)[0] + ".lengths.json"


def write(vocabulary, lengths):
    """Writes how many captions have each length.

    Args:
        vocabulary: Path of the vocabulary file.
        lengths: Integers, the number of tokens of each caption with eos.
    """
    values, counts = np.unique(lengths, return_counts=True)
    pairs = zip(values.tolist(), counts.tolist(), strict=True)
    files.write_json(path_beside(vocabulary), {str(v): n for v, n in pairs})


def read(vocabulary):
    """Dict from a length to the number of captions; None without the file.

    Raises:
        ValueError: If the file is not of that form.
    """
    path = path_beside(vocabulary)
    if not files.exists(path):
        return None
    try:
        pairs = json.loads(files.read_text(path)).items()
        counts = {int(length): int(count) for length, count in pairs}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} must map lengths of captions to counts, as "
            f"cappa-train-tokenizer writes it. Received: {error}"
        ) from None
    return counts if sum(counts.values()) > 0 else None


def choose(counts, max_length, captions):
    """Lengths to cut batches to, which leave the least padding on average.

    Args:
        counts: Dict from a length to the number of captions of that length.
        max_length: L, the length of uncut texts.
        captions: Number of captions in a batch, whose longest decides.

    Returns:
        Sorted list of lengths that ends with `max_length`; only that if no
        shorter one pays.
    """
    lengths = np.minimum(list(counts), max_length)
    total = sum(counts.values())

    def chance(length):
        """Probability that all captions of a batch fit."""
        fit = sum(n for x, n in zip(lengths, counts.values()) if x <= length)
        return (fit / total) ** captions

    chances = {x: chance(x) for x in range(_STEP, max_length, _STEP)}

    def expected(chosen):
        mean, below = 0.0, 0.0
        for length in chosen:
            mean += length * (chances[length] - below)
            below = chances[length]
        return mean + max_length * (1.0 - below)

    best, least = (), float(max_length)
    for count in range(1, MOST):
        chosen = min(
            itertools.combinations(chances, count), key=expected, default=()
        )
        if expected(chosen) > least - _WORTH * max_length:
            break
        best, least = chosen, expected(chosen)
    return [*best, max_length]
