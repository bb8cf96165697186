"""Zero-shot accuracies, by hand and of a model that knows the classes."""

import json

import numpy as np
import pytest
import scoring
from conftest import shared_data, shared_reference

from cappa_tf.evaluation import class_figures, features, zero_shot
from cappa_tf.evaluation.images import EvaluationImages


def test_figures_by_hand():
    """Ranks 0, 1, 5, and a tie of the best two, which counts as an error."""
    scores = np.array(
        [
            [9, 1, 2, 3, 4, 5],
            [5, 4, 3, 2, 1, 0],
            [0, 1, 2, 3, 4, 5],
            [7, 7, 1, 1, 1, 1],
        ],
        float,
    )
    labels = np.array([0, 1, 0, 1])
    np.testing.assert_array_equal(
        class_figures.ranks(scores, labels), [0, 1, 5, 1]
    )
    found, confusion = class_figures.figures(scores, labels)
    assert found == {"top_1": 1 / 4, "top_5": 3 / 4, "mean_per_class": 1 / 4}
    assert confusion.tolist()[0] == [1, 0, 0, 0, 0, 1]
    assert confusion.tolist()[1] == [2, 0, 0, 0, 0, 0]
    assert confusion.sum() == 4


def test_few_classes_have_no_top_5():
    found, _ = class_figures.figures(np.eye(3), np.arange(3))
    assert found == {"top_1": 1.0, "mean_per_class": 1.0}


def test_any_of_several_labels_is_right():
    """Second best, but the best is a label, too; the last is wrong."""
    scores = np.array([[9, 1, 8], [3, 2, 1], [1, 2, 3]], float)
    labels = np.array([[2, 0], [0, -1], [1, 0]])
    np.testing.assert_array_equal(
        class_figures.ranks(scores, labels), [0, 0, 1]
    )
    found, confusion = class_figures.figures(scores, labels)
    assert found["top_1"] == 2 / 3
    # Of class 0 two of three images are right; of 1 none, of 2 its only one.
    assert found["mean_per_class"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert confusion.tolist() == [[2, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_class_embeddings_and_predictions_of_the_reference():
    arrays = np.load(shared_reference("transfer_tiny.npz"))
    arrays = {
        name.removeprefix("zero_shot/"): arrays[name] for name in arrays.files
    }
    classes = zero_shot.class_embeddings(
        arrays["text_embeddings"], arrays["text_class"]
    )
    np.testing.assert_allclose(
        classes, arrays["class_embeddings"], rtol=0, atol=1e-7
    )
    scores = arrays["image_embeddings"] @ classes.T
    labels = arrays["labels"]
    np.testing.assert_array_equal(scores.argmax(1), arrays["predicted"])
    # Images without any label are left out before.
    labelled = (labels >= 0).any(1)
    ranks = class_figures.ranks(scores[labelled], labels[labelled])
    np.testing.assert_array_equal(ranks == 0, arrays["correct"][labelled])
    assert not arrays["correct"][~labelled].any()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return scoring.write_colours(tmp_path_factory.mktemp("colours"))


def test_a_model_that_knows_names_every_colour(folder, tmp_path):
    evaluator = zero_shot.ZeroShot(
        folder / "labels",
        templates=["{} square", "square {}"],
        parallel=True,
        resize="resize_small",
    )
    report = evaluator.evaluate(scoring.knowing_predictor(tmp_path))
    assert report.metrics["top_1"] == report.metrics["parallel/top_1"] == 1.0
    assert report.details["class_names"] == ["red", "green", "blue"]
    wanted = (2 * np.eye(3, dtype=int)).tolist()
    assert report.details["confusion"] == wanted
    assert (
        dict(evaluator.run(scoring.knowing_predictor(tmp_path)))
        == report.metrics
    )


def test_the_prior_of_a_name_is_taken_off(folder, tmp_path):
    """A model that dislikes each "e": "green" has two, the others one."""
    evaluator = zero_shot.ZeroShot(folder / "labels", templates=["{}"])
    metrics = evaluator.evaluate(
        scoring.knowing_predictor(tmp_path, prior=50.0)
    ).metrics
    assert metrics["top_1"] == pytest.approx(2 / 3)
    assert metrics["minus_blind/top_1"] == 1.0


def test_a_class_is_as_likely_as_its_likeliest_name(folder, tmp_path):
    """Templates are averaged, of aliases the best one counts."""
    predictor = scoring.knowing_predictor(tmp_path)

    def top_1(name, **options):
        evaluator = zero_shot.ZeroShot(
            folder / "labels",
            class_names=[name, "green", "blue"],
            templates=["{} square", "square {}"],
            **options,
        )
        return evaluator.evaluate(predictor).metrics["top_1"]

    # "above" alone names no colour: it scores 0, more than any colour.
    assert top_1("above,red") == 1.0
    assert top_1("above,red", aliases="first") == pytest.approx(1 / 3)
    assert top_1("red,above", aliases="all") == pytest.approx(1 / 3)


def test_all_of_the_picture_is_seen(folder):
    """Without a margin the crop is the whole, squashed image."""
    assert features.preprocessing(9, margin=1.0).squash_size is None


def test_limit_and_bad_names(folder, tmp_path):
    predictor = scoring.knowing_predictor(tmp_path)
    some = zero_shot.ZeroShot(folder / "labels", limit=5).evaluate(predictor)
    assert some.details["num_images"] == 5
    few = zero_shot.ZeroShot(folder / "labels", class_names=["a", "b"])
    with pytest.raises(ValueError, match="label 2 with the 2 names"):
        few.evaluate(predictor)
    with pytest.raises(ValueError, match="'nowhere'"):
        zero_shot.ZeroShot(folder / "labels", "nowhere").open()


def test_several_labels_of_a_file(folder, tmp_path):
    """Images 0 and 3 are red, 1 green, 2 blue."""
    path = tmp_path / "several.json"
    several = {"0": [1, 0], "1": [1], "2": [0], "3": []}
    with (folder / "labels" / "labels.jsonl").open() as file:
        names = [json.loads(line)["image"] for line in file]
    keys = {str(i): name for i, name in enumerate(names)}
    path.write_text(json.dumps({keys[i]: row for i, row in several.items()}))
    evaluator = zero_shot.ZeroShot(
        folder / "labels", labels=path, templates=["{} square"]
    )
    evaluator.open()
    report = evaluator.evaluate(scoring.knowing_predictor(tmp_path))
    assert report.metrics["top_1"] == pytest.approx(2 / 3)
    assert report.details["num_images"] == 3
    assert report.details["skipped"] == {"no label": 3}
    for wrong in ("[]", '{"0": 1}', '{"0": [3]}', '{"0": ["a"]}', "{"):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="several.json"):
            evaluator.open()


def test_names_of_the_clothing_set():
    data = EvaluationImages(shared_data("clothing_small"), "test")
    assert len(data.class_names) == 10
    assert data.class_names[0] == "dress"
