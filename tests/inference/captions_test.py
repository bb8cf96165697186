"""Caption evaluation: every image once, correct metrics, no padding."""

import math

import numpy as np
import pytest
import tensorflow as tf

from cappa_tf.data.caption_dataset import CaptionDataset
from cappa_tf.data.scenes import world
from cappa_tf.data.schema import Example, write_dataset
from cappa_tf.data.tokenizer import Tokenizer, train_tokenizer
from cappa_tf.evaluation import captioning
from cappa_tf.inference.captions import (
    CaptionDecoder,
    CaptionRow,
    word_slices,
)
from cappa_tf.models.captioner import Captioner
from cappa_tf.models.text_decoder import TextDecoder
from cappa_tf.models.vision_encoder import VisionEncoder

SIZE = 16
# Of different lengths and numbers: the widths of a batch must not matter.
REFERENCES = [
    ["a small red ring"],
    ["a large blue star", "the word lamp", "a star"],
    ["the word lamp in green on white", "lamp"],
    ["a small red ring above a large blue star"],
    ["a large ring"],
]


class FakeCaptioner:
    """Captions each image according to its first pixel."""

    left_to_right = True

    def __init__(self, tokens, log_probs):
        self.tokens = tf.constant(tokens)
        self.log_probs = tf.constant(log_probs)

    def generate(self, images, max_length=None):
        del max_length
        number = tf.cast(images[:, 0, 0, 0], tf.int32)
        return {
            "tokens": tf.gather(self.tokens, number),
            "log_probs": tf.gather(self.log_probs, number),
        }


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    captions = list(world.captions("train", 300))
    words = [word for caption in captions for word in caption.split()]
    train_tokenizer(captions + words, path, 92)
    return Tokenizer(path, max_length=12)


@pytest.fixture(scope="module")
def captioner(tokenizer):
    sizes = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32}
    model = Captioner(
        VisionEncoder(**sizes, patch_size=8, image_size=SIZE),
        TextDecoder(
            **sizes, vocabulary_size=tokenizer.vocabulary_size, max_length=12
        ),
    )
    model.build()
    # The head starts at zero; random values make all captions differ.
    rng = np.random.default_rng(1)
    for weight in model.weights:
        if "decoder" in weight.path and len(weight.shape) > 1:
            weight.assign(rng.normal(0, 0.5, weight.shape))
    return model


def _write(path, references):
    rng = np.random.default_rng(0)
    examples = []
    for i, captions in enumerate(references):
        pixels = rng.integers(0, 255, (SIZE, SIZE, 3), np.uint8)
        image = tf.io.encode_png(pixels).numpy()
        examples.append(Example(f"image-{i}", image, captions))
    # Two shards, so that the order on disk is not the order of reading.
    write_dataset({"test": examples}, path, "some", num_shards=2)
    return examples


@pytest.fixture(scope="module")
def dataset(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    _write(path, REFERENCES)
    return CaptionDataset(path, "test", tokenizer, SIZE)


@pytest.fixture(scope="module")
def decoder(captioner, tokenizer):
    return CaptionDecoder(captioner, tokenizer, batch_size=2)


@pytest.fixture(scope="module")
def result(decoder, dataset):
    return captioning.evaluate_captions(decoder, dataset, keep_images=3)


@pytest.fixture(scope="module")
def images(dataset):
    """All five images as the model takes them, in the order of `result`."""
    return next(iter(dataset.evaluate(5)))["image"].numpy()


def test_every_image_once_though_the_last_batch_is_padded(result, dataset):
    examples = list(dataset.read_examples())
    assert sorted(row.key for row in result.rows) == [
        f"image-{i}" for i in range(5)
    ]
    for row, example in zip(result.rows, examples):
        assert (row.key, row.references) == (example.key, example.captions)
        assert row.references == REFERENCES[int(row.key[-1])]
    kept = [row.image for row in result.rows]
    assert kept == [example.image for example in examples[:3]] + [None, None]
    assert result.metrics["num_images"] == 5


def test_the_batch_size_changes_nothing(captioner, tokenizer, dataset, result):
    other = captioning.evaluate_captions(
        CaptionDecoder(captioner, tokenizer, 5), dataset
    )
    captions = [row.caption for row in result.rows]
    # Some untrained captions are equal, which ones the CPU's rounding decides.
    assert len(set(captions)) > 1
    assert [row.caption for row in other.rows] == captions
    for name, value in result.metrics.items():
        assert other.metrics[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
def test_limit(decoder, dataset, result, limit):
    some = captioning.evaluate_captions(decoder, dataset, limit)
    captions = [row.caption for row in result.rows[:limit]]
    assert [row.caption for row in some.rows] == captions


def test_nll_is_that_of_the_logits_over_all_real_tokens(
    captioner, tokenizer, result, images
):
    nll, count = 0.0, 0
    for image, row in zip(images, result.rows):
        labels = tokenizer(row.references).numpy()
        repeated = np.repeat(image[None], len(labels), axis=0)
        log_p = tf.nn.log_softmax(captioner.logits(repeated, labels)).numpy()
        real = labels != 0
        nll -= np.take_along_axis(log_p, labels[..., None], -1)[real].sum()
        count += real.sum()
    assert result.metrics["nll_per_token"] == pytest.approx(nll / count, 1e-4)


def test_log_likelihood_is_the_score_of_the_caption(captioner, result, images):
    """Probabilities of greedy decoding equal teacher forcing on its output."""
    tokens = captioner.generate(images)["tokens"]
    scores = np.diag(captioner.score(images, tokens))
    for row, score in zip(result.rows, scores):
        assert row.log_likelihood == pytest.approx(score, rel=1e-4)
        logs = [math.log(p) for p in row.probabilities]
        assert row.log_likelihood == pytest.approx(sum(logs), rel=1e-4)
        assert len(row.pieces) == len(row.probabilities)


def test_a_bad_record_is_left_out(
    decoder, dataset, result, tokenizer, tmp_path
):
    examples = list(dataset.read_examples())
    examples[1].image = examples[1].image[:40]
    write_dataset({"test": examples}, tmp_path, "some", num_shards=1)
    damaged = CaptionDataset(
        tmp_path, "test", tokenizer, SIZE, max_skipped_fraction=0.5
    )
    some = captioning.evaluate_captions(decoder, damaged, keep_images=2)
    left = [row for i, row in enumerate(result.rows) if i != 1]
    assert [row.key for row in some.rows] == [row.key for row in left]
    assert [row.caption for row in some.rows] == [row.caption for row in left]
    assert [row.image is None for row in some.rows] == [
        False,
        False,
        True,
        True,
    ]


def _ids(tokenizer, caption):
    return tokenizer([caption]).numpy()[0]


def test_rows_end_at_eos(tokenizer):
    tokens = np.stack(
        [
            _ids(tokenizer, "a small red ring"),
            _ids(tokenizer, ""),
            np.full(12, _ids(tokenizer, "red")[0]),
        ]
    )
    log_probs = np.where(tokens == 0, 0, np.log(0.5)).astype(np.float32)
    decoder = CaptionDecoder(
        FakeCaptioner(tokens, log_probs), tokenizer, batch_size=4
    )
    images = np.arange(3.0)[:, None, None, None] * np.ones((1, 2, 2, 3))
    normal, empty, endless = decoder.decode(images, ["x", "y", "z"])
    assert normal.caption == "a small red ring"
    assert normal.pieces == [" a", " small", " red", " ring", "<eos>"]
    assert normal.probabilities == pytest.approx([0.5] * 5)
    assert normal.log_likelihood == pytest.approx(5 * math.log(0.5))
    assert (empty.caption, empty.pieces) == ("", ["<eos>"])
    assert endless.pieces == [" red"] * 12  # truncated, without eos
    for row in (normal, empty, endless):
        text = "".join(p for p in row.pieces if p != "<eos>").strip()
        assert text == row.caption
    with pytest.raises(ValueError, match="5 images, batch_size=4"):
        decoder.decode(np.zeros((5, 2, 2, 3)), list("abcde"))


def test_exact_match_and_counts():
    def row(caption, references):
        return CaptionRow("k", caption, 0.0, [], [], references)

    rows = [
        row("a red  ring", ["A Red ring", "b"]),
        row("a red ring", ["b", "a red ring"]),
        row("a red ring", ["a red rings"]),
        row("a blue big star", []),
    ]
    assert [r.exact_match for r in rows] == [True, True, False, False]
    assert captioning.summarize(rows) == {
        "num_images": 4,
        "exact_match": 0.5,
        "distinct_captions": 2,
        "mean_words": 3.25,
    }


def test_corpus_scores_and_progress(decoder, dataset, result):
    pytest.importorskip("pycocoevalcap", reason="pip install '.[test]'")
    done = []
    scored = captioning.evaluate_captions(
        decoder, dataset, corpus_scores=True, progress=done.append
    )
    assert done == [2, 4, 5]
    added = set(scored.metrics) - set(result.metrics)
    assert {"cider", "bleu_1", "bleu_4", "rouge_l"} <= added


def test_nothing_to_caption(captioner, tokenizer, decoder, dataset):
    with pytest.raises(ValueError, match="at least one image.*limit=0"):
        captioning.evaluate_captions(decoder, dataset, limit=0)
    with pytest.raises(ValueError, match="batch_size=0"):
        CaptionDecoder(captioner, tokenizer, batch_size=0)


@pytest.mark.parametrize(
    "pieces, words",
    [
        (
            [" a", " ", "do", "g", " ", "<eos>"],
            [("a", slice(0, 1)), ("dog", slice(1, 5))],
        ),
        ([" ", " ", " red"], [("red", slice(0, 3))]),
        (
            [" red", " ", " ", " sea"],
            [("red", slice(0, 1)), ("sea", slice(1, 4))],
        ),
        (["re", "d"], [("red", slice(0, 2))]),
        ([" ", " "], []),
        (["<eos>"], []),
    ],
)
def test_words_of_pieces(pieces, words):
    assert word_slices(pieces) == words
