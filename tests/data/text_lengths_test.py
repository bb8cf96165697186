"""Lengths to cut batches to leave the least padding, in few programs."""

import numpy as np
import pytest

from cappa_tf.data import text_lengths


@pytest.mark.parametrize(
    "counts, max_length, captions, wanted",
    [
        ({10: 5}, 64, 8, [16, 64]),
        ({8: 50, 40: 50}, 64, 1, [8, 40, 64]),
        # Nearly every batch has a long caption.
        ({8: 50, 40: 50}, 64, 1000, [40, 64]),
        ({8: 1, 64: 99}, 64, 2, [64]),
        ({300: 7}, 64, 2, [64]),
        ({3: 7}, 8, 2, [8]),
    ],
)
def test_lengths_are_those_that_pay(counts, max_length, captions, wanted):
    assert text_lengths.choose(counts, max_length, captions) == wanted


def test_no_three_lengths_leave_less_padding():
    """Against batches sampled from the counts."""
    random = np.random.default_rng(0)
    lengths = np.minimum(random.gamma(4.0, 4.0, 500).astype(int) + 2, 64)
    values, numbers = np.unique(lengths, return_counts=True)
    counts = dict(zip(values.tolist(), numbers.tolist()))
    longest = random.choice(lengths, (4000, 8)).max(axis=1)

    def mean_length(buckets):
        return np.take(buckets, np.searchsorted(buckets, longest)).mean()

    chosen = text_lengths.choose(counts, 64, captions=8)
    least = min(
        mean_length([a, b, 64])
        for a in range(8, 64, 8)
        for b in range(a + 8, 64, 8)
    )
    assert len(chosen) <= text_lengths.MOST
    # Sampling, and a length that saves less than it has to.
    assert mean_length(chosen) < least + 0.06 * 64


def test_counts_are_read_as_written(tmp_path):
    path = str(tmp_path / "tokenizer.model")
    assert text_lengths.read(path) is None
    text_lengths.write(path, [5, 3, 5])
    assert text_lengths.read(path) == {3: 1, 5: 2}
    (tmp_path / "tokenizer.lengths.json").write_text('["5"]')
    with pytest.raises(ValueError, match="tokenizer.lengths.json must map"):
        text_lengths.read(path)
