"""Kendall's tau by hand, and the judgments of Flickr8k as published."""

import gzip

import pytest
import scoring
from conftest import shared_data

from cappa_tf.evaluation import human_judgments


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "flickr"
    scoring.write_judgments(folder)
    crowd = folder / "judgments" / "CrowdFlowerAnnotations.txt.gz"
    with gzip.open(crowd, "wt") as file:
        file.write("red.png\tblue.png#0\t0\t0\t3\n")
        file.write("red.png\tother.png#1\t0.75\t3\t1\n")
    return folder


def test_tau_by_hand():
    """6 pairs: 4 agree, 1 does not, 1 is a tie of the ratings."""
    pytest.importorskip("scipy", reason="pip install '.[test]'")
    found = human_judgments.correlations(
        [1.0, 2.0, 3.0, 4.0], [[1], [3], [2], [3]]
    )
    assert found["tau_b"] == pytest.approx((4 - 1) / (6 * 5) ** 0.5)
    # tau-c = 2 (P - Q) / (n^2 (m - 1) / m), with m = 3 different ratings.
    assert found["tau_c"] == pytest.approx(2 * (4 - 1) / (4**2 * 2 / 3))


def test_each_rating_is_a_pair():
    pytest.importorskip("scipy", reason="pip install '.[test]'")
    together = human_judgments.correlations([1.0, 2.0], [[1, 2], [2, 4]])
    apart = human_judgments.correlations(
        [1.0, 1.0, 2.0, 2.0], [[1], [2], [2], [4]]
    )
    assert together == apart


def test_a_model_that_knows_agrees_with_people(folder, tmp_path):
    pytest.importorskip("scipy", reason="pip install '.[test]'")
    evaluator = human_judgments.Judgments(folder)
    evaluator.open()
    report = evaluator.evaluate(scoring.knowing_predictor(tmp_path))
    # The caption of the image itself is left out.
    assert report.details["num_captions"] == 4
    assert report.details["num_ratings"] == 12
    assert report.metrics["tau_b"] > 0.7
    assert report.metrics["parallel/tau_b"] == report.metrics["tau_b"]
    crowd = human_judgments.Judgments(folder, "crowdflower", limit=1)
    assert (
        crowd.evaluate(scoring.knowing_predictor(tmp_path)).metrics["tau_b"]
        == 1
    )
    assert [row["ratings"] for row in report.rows][0] == (1, 1, 2)


def test_bad_lines_are_named(folder):
    path = folder / "judgments" / "ExpertAnnotations.txt"
    path.write_text("red.png blue.png#0 many")
    with pytest.raises(ValueError, match="line 1"):
        human_judgments.Judgments(folder).open()
    path.write_text("red.png nowhere.png#0 1")
    with pytest.raises(ValueError, match="nowhere.png#0"):
        human_judgments.Judgments(folder).open()
    path.unlink()
    with pytest.raises(ValueError, match="ExpertAnnotations.txt"):
        human_judgments.Judgments(folder).open()


def test_flickr8k_as_published():
    folder = shared_data("flickr8k/judgments")
    expert = human_judgments.read(folder)
    assert len(expert) == 5822
    others = [j for j in expert if not j.is_own]
    assert len(others) == 5664  # as CLIPScore counts
    assert {len(j.ratings) for j in others} == {3}
    crowd = human_judgments.read(folder, "crowdflower")
    assert len(crowd) == 47_830
    assert {len(j.ratings) for j in crowd} == {1}
    found, *_ = human_judgments.Judgments(folder.parent, limit=10)._read()
    assert len(found) == 10
