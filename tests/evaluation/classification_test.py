"""Classification: figures by hand, and of a classifier."""

import keras
import numpy as np
import pytest
from labelled import SIDE, keras_model, write

from cappa_tf.data.preprocessing import ImagePreprocessing
from cappa_tf.evaluation import class_figures, classification
from cappa_tf.inference.predictor import Predictor
from cappa_tf.models.classifier import Classifier
from cappa_tf.models.encoder_adapter import EncoderAdapter


def test_calibration_error_by_hand():
    """Two of three right at 0.9, and none of one at 0.6."""
    probabilities = np.array([[0.9, 0.1]] * 3 + [[0.4, 0.6]])
    error, bins = class_figures.calibration_error(
        probabilities, [0, 0, 1, 0], bins=5
    )
    assert error == pytest.approx(0.75 * (0.9 - 2 / 3) + 0.25 * 0.6)
    assert [count for count, _, _ in bins] == [0, 0, 1, 0, 3]
    # A sure model that is always right has none.
    assert class_figures.calibration_error(np.eye(3), [0, 1, 2])[0] == 0.0


def test_report_by_hand():
    probabilities = np.array(
        [
            [0.6, 0.2, 0.1, 0.04, 0.03, 0.02, 0.01],
            [0.6, 0.2, 0.1, 0.04, 0.03, 0.02, 0.01],
            [0.6, 0.2, 0.1, 0.04, 0.03, 0.02, 0.01],
            [0.1, 0.7, 0.1, 0.04, 0.03, 0.02, 0.01],
        ]
    )
    labels = np.array([0, 1, 6, 1])
    found = classification.report(probabilities, labels)
    assert found.metrics["top_1"] == 0.5
    assert found.metrics["top_5"] == 0.75
    assert found.metrics["mean_per_class"] == pytest.approx(1.5 / 3)
    assert found.metrics["nll"] == pytest.approx(
        -np.log([0.6, 0.2, 0.01, 0.7]).mean()
    )
    second = found.details["per_class"][1]
    assert second == {
        "class": "1",
        "images": 2,
        "accuracy": 0.5,
        "precision": 1.0,
    }
    text = "\n".join(found.lines)
    assert "classes without an image: 2, 3, 4, 5" in text
    assert "1 x 1 taken for 0" in text
    with pytest.raises(ValueError, match="0 to 6. Received: label 7 in here"):
        classification.report(probabilities, labels + 1, source="here")


def test_a_classifier_on_prepared_images(tmp_path):
    """Its head reads colors, which tell the class."""
    labels = [0, 1, 2] * 3 + [None, 1]
    data = write(tmp_path / "data", {"test": labels}, classes=["a", "b", "c"])
    image = keras.Input((SIDE, SIDE, 3))
    mean = keras.layers.GlobalAveragePooling2D()(image)
    model = Classifier(
        EncoderAdapter(keras.Model(image, mean), name="vision_encoder"), 3
    )
    model.build()
    predictor = Predictor(model, None, ImagePreprocessing(SIDE))
    images, numbers, _ = next(
        classification.EvaluationImages(data, "test").labelled(
            predictor.preprocessing, 32
        )
    )
    means = np.stack(
        [images[numbers == c].mean((0, 1, 2)) for c in range(3)], axis=1
    )
    # Nearest mean as a linear function, sharp enough to be sure.
    model.head.set_weights([200 * means, -100 * (means**2).sum(0)])
    evaluator = classification.Classification(data)
    evaluator.open()
    found = evaluator.evaluate(predictor)
    assert found.metrics["top_1"] == found.metrics["mean_per_class"] == 1.0
    assert found.details["num_images"] == 10
    assert found.details["skipped"] == {"no label": 1}
    assert found.details["class_names"] == ["a", "b", "c"]
    few = classification.Classification(data, limit=4).evaluate(predictor)
    assert few.details["num_images"] == 4


def test_only_a_model_with_classes_classifies():
    encoder = EncoderAdapter(keras_model())
    encoder.build()
    predictor = Predictor(encoder, None, ImagePreprocessing(SIDE))
    assert predictor.capabilities == ("features",)
    with pytest.raises(ValueError, match="Classification.*classify"):
        classification.Classification("data").check(predictor)
