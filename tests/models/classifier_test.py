"""The classifier: shapes, loss, and the trainer's contract."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from harness import check_layer, randomize

from cappa_tf.models.classifier import Classifier
from cappa_tf.models.vision_encoder import VisionEncoder

SMALL = {
    "hidden_dim": 16,
    "num_layers": 1,
    "num_heads": 2,
    "mlp_dim": 24,
    "patch_size": 4,
    "image_size": 8,
}
B, C = 3, 5


def make_classifier(**kwargs):
    model = Classifier(VisionEncoder(**SMALL), C, **kwargs)
    model.build()
    randomize(model)
    return model


@pytest.fixture
def batch():
    draw = np.random.default_rng(0)
    return {
        "image": tf.constant(draw.uniform(-1, 1, (B, 8, 8, 3)), tf.float32),
        "label": tf.constant([1, 4, -1], tf.int64),
        "index": tf.range(B, dtype=tf.int64),
    }


@pytest.mark.parametrize("rep_size", [None, 6])
def test_contract(rep_size, tmp_path):
    check_layer(
        Classifier,
        {
            "vision_encoder": VisionEncoder(**SMALL),
            "num_classes": C,
            "rep_size": rep_size,
        },
        [np.zeros((2, 8, 8, 3), "float32")],
        {
            "encoded": (2, 4, 16),
            "pre_logits": (2, rep_size or 16),
            "logits": (2, C),
        },
        tmp_path,
        # The encoder has a policy of its own.
        float32_outputs=("encoded", "logits")
        + (() if rep_size else ("pre_logits",)),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_loss_is_the_cross_entropy_of_the_smoothed_label(batch, smoothing):
    model = make_classifier(label_smoothing=smoothing)
    logits = model(batch["image"])["logits"]
    targets = np.eye(C)[batch["label"]] * (1 - smoothing) + smoothing / C
    expected = -np.sum(targets * tf.nn.log_softmax(logits), axis=-1)
    losses = model.example_losses(batch, training=False)
    np.testing.assert_allclose(losses.loss[:2], expected[:2], rtol=1e-5)
    right, known = losses.metrics["top_1"]
    best = np.argmax(logits, -1) == batch["label"]
    np.testing.assert_array_equal(right, best)
    # The last has no label.
    assert losses.loss[2] == 0.0
    np.testing.assert_array_equal(known, [1, 1, 0])


def test_it_learns_what_it_is_shown(batch):
    model = make_classifier()
    model.compile(keras.optimizers.Adam(0.01))
    data = tf.data.Dataset.from_tensors(batch).repeat(40)
    model.fit(data, verbose=0)
    losses = model.example_losses(batch, training=False)
    assert losses.metrics["top_1"][0].numpy().tolist()[:2] == [1.0, 1.0]


def test_an_encoder_that_pools_not_is_refused():
    with pytest.raises(ValueError, match="pooling='none'"):
        Classifier(VisionEncoder(**SMALL, pooling="none"), C)
