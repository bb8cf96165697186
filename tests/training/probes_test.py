"""Probes in the training loop: frozen encoders of any kind, and their cache."""

import json
import pathlib

import numpy as np
import pytest
import tiny
from labelled import SIDE, keras_model, write

from cappa_tf.data.caption_dataset import CaptionDataset
from cappa_tf.inference.feature_cache import FeatureCache
from cappa_tf.inference.predictor import Predictor
from cappa_tf.models.classifier import Classifier
from cappa_tf.saving.encoders import open_encoder
from cappa_tf.training.optimizers.adamw import AdamW
from cappa_tf.training.train import train

STEPS = 20
POOL = "vision_encoder/pool"


@pytest.fixture(scope="module", name="data")
def _data(tmp_path_factory):
    splits = {"train": list(range(7)) * 4 + [None], "test": list(range(7))}
    return write(tmp_path_factory.mktemp("data") / "data", splits)


@pytest.fixture(scope="module", name="encoder")
def _encoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "encoder.keras"
    keras_model(pool=False).save(path)
    return str(path)


def _run(data, encoder, workdir, **options):
    """Trains the head and the pooling of an encoder of another library."""

    def split(name):
        return CaptionDataset(data, name, None, SIDE)

    arguments = {
        "model": lambda: Classifier(
            open_encoder(encoder, pooling="map"), 7, name="classifier"
        ),
        # Decay would move a frozen kernel even without a gradient.
        "optimizer": lambda: AdamW(0.03, weight_decay=0.01),
        "train_data": split("train"),
        "eval_data": split("test"),
        "total_steps": STEPS,
        "batch_size": 8,
        "eval_batch_size": 4,
        "steps_per_loop": 10,
        "log_steps": 10,
        "eval_steps": STEPS,
        "checkpoint_steps": STEPS,
        "strategy": "one",
        "frozen_parts": ["vision_encoder"],
        "trained_parts": [POOL],
    }
    arguments = tiny.with_settings(**arguments | options)
    return train(workdir=str(workdir), **arguments)


@pytest.fixture(scope="module", name="runs")
def _runs(data, encoder, tmp_path_factory):
    """A run on images, and one on cached patches."""
    folder = tmp_path_factory.mktemp("runs")
    plain = _run(data, encoder, folder / "plain")
    cached = _run(data, encoder, folder / "cached", features="cached")
    return folder, plain, cached


def test_a_frozen_encoder_is_bitwise_unchanged(runs, encoder):
    """Also its statistics and the seeds of its dropout."""
    source = open_encoder(encoder).model.get_weights()
    for name in ("plain", "cached"):
        trained = Predictor.open(runs[0] / name).encoder
        for one, other in zip(trained.model.get_weights(), source, strict=True):
            assert one.tobytes() == other.tobytes()


def test_cached_patches_train_as_images_do(runs):
    folder, plain, cached = runs
    for name in ("loss", "top_1", "top_5"):
        assert cached[name] == pytest.approx(plain[name], rel=1e-3)
    assert plain["loss"] < np.log(7) - 0.1
    log = (folder / "cached" / "train.log").read_text()
    assert "frozen except pool" in log and "29 x [4, 8] float32" in log
    results = json.loads((folder / "cached" / "results.json").read_text())
    assert results["top_1"] == cached["top_1"]


def test_a_cache_that_a_full_disk_cut_short_is_mended(runs, data):
    """The rows that it lost are computed again, and the labels stay theirs."""
    folder = runs[0] / "cached"
    encoder = Predictor.open(folder).encoder

    def read():
        dataset = CaptionDataset(data, "train", None, SIDE)
        return FeatureCache.open_or_compute(
            encoder, dataset, "encoded", folder=str(folder / "features")
        )

    whole = read()
    before = whole.labelled()
    assert before[2] == {"no label": 1}
    assert np.bincount(before[1]).tolist() == [4] * 7
    features, labels = np.array(before[0]), np.array(before[1])
    path = pathlib.Path(whole.path, "rows")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    mended = read()
    assert "29 computed in" in mended.origin
    after = mended.labelled()
    np.testing.assert_allclose(after[0], features, atol=1e-5)
    np.testing.assert_array_equal(after[1], labels)
