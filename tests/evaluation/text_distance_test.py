"""Edit distance and error rates, against a plain recursion and by hand."""

import functools
import random

import pytest

from cappa_tf.evaluation.text_distance import (
    edit_distance,
    recognition_scores,
)


def _recursive(first, second):
    @functools.cache
    def distance(i, j):
        if not i or not j:
            return i + j
        return min(
            distance(i - 1, j) + 1,
            distance(i, j - 1) + 1,
            distance(i - 1, j - 1) + (first[i - 1] != second[j - 1]),
        )

    return distance(len(first), len(second))


def test_equals_the_recursion():
    numbers = random.Random(0)
    for _ in range(200):
        first, second = (
            "".join(numbers.choices("abc", k=numbers.randrange(9)))
            for _ in range(2)
        )
        assert edit_distance(first, second) == _recursive(first, second)
        assert edit_distance([*first], second) == _recursive(first, second)


def test_rates_by_hand():
    found = recognition_scores(
        [("total 10", "total 10"), ("t0tal", "total 10"), ("", "ab")]
    )
    assert found["exact_match"] == pytest.approx(1 / 3)
    # t0tal is one word replaced and one missing; "" lacks one.
    assert found["word_accuracy"] == pytest.approx(1 - 3 / 5)
    assert found["character_error_rate"] == pytest.approx((0 + 4 + 2) / 18)
    assert found["normalized_edit_distance"] == pytest.approx(
        (0 + 4 / 8 + 2 / 2) / 3
    )
    assert recognition_scores([("a b c", "d")])["word_accuracy"] == -2
