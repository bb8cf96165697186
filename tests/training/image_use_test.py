"""Whether the decoder uses the images: figures of a run, and its warning."""

import numpy as np
import pytest
import tensorflow as tf
import tiny

from cappa_tf.training.reporting.image_use import identical_share

LINE = "image_use/own_image"


class Constant(tiny.Data):
    """All images are the same."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._images = np.zeros_like(self._images)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return tmp_path_factory.mktemp("vocabulary")


def train(vocabulary, workdir, data, **options):
    """Log of a run that validates at its half and at its end, by lines."""
    tiny.run(
        vocabulary,
        workdir=str(workdir),
        train_data=data(vocabulary),
        eval_data=data(vocabulary, examples=16),
        **{
            "total_steps": 80,
            "eval_steps": 40,
            "checkpoint_steps": 80,
            "steps_per_loop": 40,
            "log_steps": 40,
            "sample_images": 4,
            "image_use_images": 16,
            **options,
        },
    )
    return (workdir / "train.log").read_text().splitlines()


def figures(line):
    """Dict of the figures of a log line."""
    parts = [one.split() for one in line.split("  ") if "image_use/" in one]
    return {name.removeprefix("image_use/"): float(x) for name, x in parts}


def test_a_decoder_without_any_use_of_images_is_told(vocabulary, tmp_path):
    lines = train(vocabulary, tmp_path / "run", Constant)
    reports = [figures(line) for line in lines if LINE in line]
    assert len(reports) == 2
    for found in reports:
        assert found["own_image"] == found["other_image"]
        assert found["identical_captions"] == 1.0
        assert found["no_image"] > 0
    (warning,) = [line for line in lines if "WARNING" in line]
    assert "hardly uses the images" in warning
    assert "100% of the sample captions" in warning
    assert "samples.png" in warning


def test_a_decoder_that_learns_from_images_is_not_warned_of(
    vocabulary, tmp_path
):
    lines = train(vocabulary, tmp_path / "run", tiny.Data, sample_images=0)
    found = [figures(line) for line in lines if LINE in line][-1]
    assert found["other_image"] - found["own_image"] > 0.05
    assert not [line for line in lines if "WARNING" in line]


def test_what_captions_cost(vocabulary):
    """The nll of validation, and the decoder's without memory; no prompts."""
    data = tiny.Data(vocabulary, captions=2)
    model = tiny.make_model(data.tokenizer.vocabulary_size)
    model.build()
    for i, weight in enumerate(model.text_decoder.head_weights):
        weight.assign(tf.random.stateless_normal(weight.shape, [1, i]))
    batch = next(iter(data.train(3)))
    labels = batch["labels"].numpy()
    lengths = np.array([[0, 1], [1, 1], [0, 2]], np.int32)
    places = np.arange(labels.shape[-1])
    scored = (labels != 0) & (places >= lengths[..., None])
    batch["prompt_lengths"] = tf.constant(lengths)
    decoder = model.text_decoder
    flat = labels.reshape(-1, labels.shape[-1])
    alone = decoder.logits(decoder(decoder.shift_right(tf.constant(flat))))
    together = model.logits(batch["image"], batch["labels"])
    for logits, with_images in ((alone, False), (together, True)):
        nats, tokens = model.text_nll(batch, with_images)
        log_p = tf.nn.log_softmax(tf.reshape(logits, (*labels.shape, -1)))
        chosen = np.take_along_axis(log_p.numpy(), labels[..., None], -1)
        wanted = -(chosen[..., 0] * scored).sum((1, 2))
        np.testing.assert_allclose(nats, wanted, rtol=1e-4)
        np.testing.assert_array_equal(tokens, scored.sum((1, 2)))


def test_the_share_of_captions_that_occur_twice():
    assert identical_share(["a dog", "a cat", "a dog", "a man"]) == 0.5
    assert identical_share(["a", "b"]) == 0.0
    assert identical_share(["a", "a", "a"]) == 1.0
