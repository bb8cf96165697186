"""The trainer is independent of the method: a minimal task runs through it."""

import json

import keras
import numpy as np
import tensorflow as tf
import tiny

from cappa_tf.data.preprocessing import ImagePreprocessing
from cappa_tf.models.task import ExampleLosses, Task
from cappa_tf.saving.checkpoints import latest_checkpoint
from cappa_tf.training.optimizers.adafactor import Adafactor


@keras.saving.register_keras_serializable("tests")
class Brightness(Task):
    """Distinguishes dark images from bright ones by their mean."""

    selection_metric = "accuracy"
    selection_mode = "max"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.head = keras.layers.Dense(2, name="head")

    @property
    def parts(self):
        return {"head": self.head}

    def build(self, input_shape=None):
        self.head.build((None, 3))
        super().build(input_shape)

    def example_losses(self, batch, training):
        logits = self.head(tf.reduce_mean(batch["image"], [1, 2]))
        loss = tf.nn.sparse_softmax_cross_entropy_with_logits(
            batch["label"], logits
        )
        best = tf.argmax(logits, -1, batch["label"].dtype)
        right = tf.cast(best == batch["label"], tf.float32)
        return ExampleLosses(loss, {"accuracy": (right, batch["one"])}, {})


class Images:
    """Without a tokenizer."""

    skipped = {}
    tokenizer = None
    preprocessing = ImagePreprocessing(4, max_pixels=None)

    def __init__(self):
        draw = np.random.default_rng(0)
        self._images = draw.uniform(size=(21, 4, 4, 3)).astype("float32")
        self._images[::2] -= 1.0

    def _examples(self, indices):
        def example(i):
            image = tf.gather(self._images, i % 21)
            one = tf.ones([])
            return {"image": image, "label": i % 21 % 2, "one": one}

        return indices.map(example)

    def train(self, batch_size, start_index=0, seed=0, host=0, num_hosts=1):
        stream = tf.data.Dataset.range(start_index, 2**40)
        return self._examples(stream).batch(batch_size, drop_remainder=True)

    def evaluate(self, batch_size, host=0, num_hosts=1):
        examples = self._examples(tf.data.Dataset.range(21))
        return examples.map(lambda x: {**x, "_mask": x["one"]}).batch(7)


def _run(folder, steps):
    return tiny.run(
        folder,
        workdir=str(folder / "run"),
        model=Brightness,
        optimizer=lambda: Adafactor(0.1),
        train_data=Images(),
        eval_data=Images(),
        total_steps=steps,
        eval_steps=10,
        eval_batch_size=7,
        checkpoint_steps=10,
        sample_images=4,
        final_evaluation=True,
        final_weights="best",
    )


def test_it_trains_validates_resumes_and_finishes(tmp_path):
    _run(tmp_path, 10)
    assert latest_checkpoint(tmp_path / "run").endswith("step-10")
    figures = _run(tmp_path, 30)
    run = tmp_path / "run"
    log = (run / "train.log").read_text()
    assert "resuming from" in log and "validation/accuracy" in log
    saved = json.loads((run / "results.json").read_text())
    assert saved["accuracy"] == figures["accuracy"] > 0.9
    assert saved["examples"] == 21
    names = {path.name for path in run.iterdir()}
    # None of the outputs that only a captioner has.
    assert not names & {"samples.png", "sheet.png", "tokenizer.model"}
    assert {"best", "checkpoints"} <= names
