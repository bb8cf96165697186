"""VQA accuracy agrees with the public implementation."""

import numpy as np
import pytest
from conftest import shared_reference

from cappa_tf.evaluation.vqa_accuracy import answer_type, clean, vqa_accuracy


def test_equals_the_public_implementation():
    with np.load(shared_reference("vqa_accuracy.npz")) as file:
        reference = {name: file[name] for name in file.files}
    for name in ("said", "human"):
        cleaned = [clean(str(each)) for each in reference[name].flat]
        expected = reference[f"{name}_cleaned"].ravel().tolist()
        assert cleaned == expected
    found = [
        vqa_accuracy(str(said), [*map(str, human)])
        for said, human in zip(reference["said"], reference["human"])
    ]
    np.testing.assert_array_equal(found, reference["accuracy"])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Two.", "2"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("shes the one", "shes 1"),
        ("somebody'd", "somebodyd"),
        ("a red-ish car", "red ish car"),
        ("red - ish", "red ish"),
        ("1,000 red-ish", "1000 redish"),
        ("3.5 m.", "3.5 m"),
    ],
)
def test_cleaning_by_hand(answer, expected):
    assert clean(answer) == expected


@pytest.mark.parametrize(
    ("count", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1)]
)
def test_three_of_ten_people_left_out_one_by_one(count, accuracy):
    answers = ["blue"] * count + ["red"] * (10 - count)
    assert vqa_accuracy("Blue", answers) == pytest.approx(accuracy)


def test_answers_are_cleaned_only_if_they_differ():
    assert vqa_accuracy("Blue", ["blue"] * 10) == 0
    assert vqa_accuracy("Blue", ["blue"] * 9 + ["red"]) == 1


def test_types_of_answers():
    assert answer_type(["Yes", "yes.", "it is"]) == "yes/no"
    assert answer_type(["two"]) == "number"
    assert answer_type(["3.5"]) == "number"
    assert answer_type(["rectangle"]) == "other"
