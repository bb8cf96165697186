"""Recall@k by hand, in both directions, with several captions per image."""

import numpy as np
import pytest
import scoring
from conftest import shared_reference

from cappa_tf.evaluation import retrieval

# Images A, B; captions a1 a2 (of A) and b1 b2 b3 (of B).
OWNERS = np.array([0, 0, 1, 1, 1])
SCORES = np.array(
    [
        # a1 a2 b1 b2 b3
        [1, 4, 5, 2, 0],  # own best is 4, one other is above: rank 1
        [3, 9, 7, 2, 1],  # own best is 7, a2 is above: rank 1
    ],
    float,
)


def test_recalls_by_hand():
    found = retrieval.recalls(SCORES, OWNERS, at=(1, 2))
    # Text to image: a1 1 < 3 no; a2 4 < 9 no; b1 7 > 5 yes; b2 2 = 2 a tie,
    # lost; b3 1 > 0 yes.
    assert found == {
        "image_to_text/recall@1": 0.0,
        "image_to_text/recall@2": 1.0,
        "text_to_image/recall@1": 2 / 5,
        "text_to_image/recall@2": 1.0,
    }


def test_recalls_of_the_reference():
    arrays = np.load(shared_reference("transfer_tiny.npz"))
    found = retrieval.recalls(
        arrays["retrieval/similarity"], arrays["retrieval/image_of_text"]
    )
    wanted = np.concatenate(
        [
            arrays[f"retrieval/{direction}_recall_at_1_5_10"]
            for direction in ("image_to_text", "text_to_image")
        ]
    )
    np.testing.assert_allclose([*found.values()], wanted, rtol=1e-12)


def test_a_constant_finds_nothing_and_a_perfect_score_all():
    constant = retrieval.recalls(np.zeros((12, 12)), np.arange(12))
    assert set(constant.values()) == {0.0}
    assert set(retrieval.recalls(np.eye(12), np.arange(12)).values()) == {1.0}


def test_captions_without_an_image_are_refused():
    with pytest.raises(ValueError, match="1 owners"):
        retrieval.recalls(np.zeros((2, 2)), np.array([0]))
    with pytest.raises(ValueError, match="image a caption"):
        retrieval.recalls(np.zeros((2, 2)), np.array([0, 0]))


def test_the_prior_of_captions_is_taken_off(tmp_path):
    """Six images of three colors: a twin's caption is as good, a tie.

    "green square" has an "e" more than the others.
    """
    folder = scoring.write_colours(tmp_path / "colours")
    evaluator = retrieval.Retrieval(folder / "captions", limit=3, parallel=True)
    evaluator.open()
    knowing = evaluator.evaluate(scoring.knowing_predictor(tmp_path))
    assert knowing.details["num_captions"] == 6
    assert set(knowing.metrics.values()) == {1.0}
    biased = evaluator.evaluate(scoring.knowing_predictor(tmp_path, prior=50.0))
    assert biased.metrics["image_to_text/recall@1"] == pytest.approx(2 / 3)
    assert biased.metrics["minus_blind/image_to_text/recall@1"] == 1.0
    assert biased.metrics["text_to_image/recall@1"] == 1.0
    whole = retrieval.Retrieval(folder / "captions", captions_per_image=1)
    twins = whole.evaluate(scoring.knowing_predictor(tmp_path)).metrics
    assert twins["image_to_text/recall@1"] == 0.0
    assert twins["image_to_text/recall@5"] == 1.0
