"""The benchmarks compare equivalent computations."""

import random

import pytest
import small_run
import tensorflow as tf
import tiny
from random_captioner import make_captioner

from tools import benchmark
from tools.benchmarks import features, generate, memory, score


def test_every_benchmark_can_be_loaded():
    for name in benchmark.BENCHMARKS:
        module = benchmark.load([name])
        assert callable(module.define_flags) and callable(module.run)
    with pytest.raises(
        ValueError, match=r"(?s)'speed'.*Benchmarks are:.*memory"
    ):
        benchmark.load(["speed"])


def test_both_ways_give_the_same_loss():
    sizes = {
        "batch_size": 8,
        "length": 6,
        "tokens": 3,
        "vocabulary_size": 50,
        "width": 16,
    }
    plain = memory.measure_loss("plain", **sizes)
    chunked = memory.measure_loss("chunked", **sizes)
    assert chunked["loss"] == pytest.approx(plain["loss"], rel=1e-5)


def test_ways_to_score_give_the_same_scores():
    """Also runs all methods, at a very small size."""
    captioner = score.make_captioner("Ti/8", 16, 14, 30, layers=1)
    labels = score.make_labels(9, 14, 30)
    lengths = (labels != 0).sum(1)
    assert lengths.min() >= 6 and lengths.max() <= 13
    ways = score.make_ways(captioner, labels, part=3)
    images = tf.random.stateless_uniform([2, 16, 16, 3], [0, 1])
    found, difference = score.measure(ways, images, rounds=1)
    assert difference < 1e-4
    assert all(result["seconds"] > 0 for result in found.values())


def test_ways_to_caption_give_the_greedy_caption():
    captioner = make_captioner(length=5)
    ways = generate.make_ways(captioner)
    images = generate.make_images(2, 16)
    found = generate.measure(ways, images, rounds=1)
    assert found["greedy, uncached"]["equal"] == 1.0
    assert found["parallel draft"]["passes"] == 1


@pytest.mark.parametrize("kind", ["pre_logits", "encoded"])
def test_cached_features_train_on_the_same_examples(tmp_path, kind):
    small_run.write_data(str(tmp_path))
    data = small_run.data(str(tmp_path))
    size = data.tokenizer.vocabulary_size
    losses = []
    for way in features.WAYS:
        random.seed(0)  # What Keras' initializers sample from.
        if kind == "encoded":
            model = tiny.make_model(size)
        else:
            model = tiny.make_contrastive(size, embedding_dim=(None, 16))
        model.build()
        model.freeze(["vision_encoder"])
        streams, _ = features.make_streams(
            data, model.vision_encoder, str(tmp_path / "cache"), kind
        )
        sums = features.make_steps(model, streams[way], 8)(2)[0]
        total, weight = sums.figures["loss"]
        losses.append(total / weight)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
