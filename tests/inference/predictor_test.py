"""Scores are those of the logits, whatever is padded around them."""

import numpy as np
import pytest
import scoring
import tensorflow as tf

from cappa_tf.evaluation import scorer as scorers

TEXTS = [["red circle"], ["blue", "green square left", "above"], ["left red"]]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return scoring.tiny_scorer(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def images():
    random = np.random.default_rng(0)
    return random.uniform(-1, 1, (3, 16, 16, 3)).astype("float32")


def by_logits(scorer, image, text, parallel=False):
    labels = scorer.tokenizer([text]).numpy()
    logits = scorer.captioner.logits(image[None], labels, parallel)
    log_p = tf.nn.log_softmax(logits).numpy()[0]
    tokens = labels[0][labels[0] != 0]
    return log_p[np.arange(len(tokens)), tokens].sum()


@pytest.mark.parametrize("mode", [scorers.AUTOREGRESSIVE, scorers.PARALLEL])
def test_captions_score_as_their_logits_say(scorer, images, mode):
    found = scorer.captions(images, TEXTS, mode)
    assert [len(row) for row in found] == [1, 3, 1]
    for image, texts, scores in zip(images, TEXTS, found):
        for text, score in zip(texts, scores):
            wanted = by_logits(scorer, image, text, mode == scorers.PARALLEL)
            assert score == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("mode", scorers.MODES)
def test_labels_are_captions_of_all_images(scorer, images, mode):
    texts = TEXTS[1]
    rows = scorer.captions(images, [texts] * 3, mode)
    np.testing.assert_allclose(
        scorer.labels(images, texts, mode), np.stack(rows), rtol=1e-4
    )


def test_blind_is_the_decoder_without_memory(scorer, images):
    labels = scorer.tokenizer(TEXTS[1]).numpy()
    shifted = np.pad(labels, ((0, 0), (1, 0)))[:, :-1]
    decoder = scorer.captioner.text_decoder
    log_p = tf.nn.log_softmax(decoder.logits(decoder(shifted))).numpy()
    chosen = np.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    wanted = (chosen * (labels != 0)).sum(-1)
    np.testing.assert_allclose(scorer.blind(TEXTS[1]), wanted, rtol=1e-4)
    assert (
        np.ptp(scorer.labels(images, TEXTS[1], scorers.BLIND), axis=0).max()
        == 0
    )


def test_many_texts_go_in_passes(scorer, images, monkeypatch):
    whole = scorer.captions(images, TEXTS)
    monkeypatch.setattr(scorers, "_TEXTS_PER_PASS", 2)
    for one, other in zip(scorer.captions(images, TEXTS), whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_what_cannot_be_scored_is_refused(scorer, images):
    with pytest.raises(ValueError, match="batch_size=4"):
        scorer.labels(np.repeat(images, 2, axis=0), ["red"])
    with pytest.raises(ValueError, match=r"lists of \[1, 0, 1\] texts"):
        scorer.captions(images, [["a"], [], ["b"]])
    with pytest.raises(ValueError, match="mode='paralel'"):
        scorer.labels(images, ["red"], "paralel")


def test_a_model_never_trained_in_parallel_has_no_such_mode(scorer):
    captioner = scoring.Knowing(scorer.tokenizer)
    captioner.masked_pred_prob = 0.0
    cap = scorers.Scorer(captioner, scorer.tokenizer, scoring.PREPROCESSING)
    assert cap.modes == (scorers.AUTOREGRESSIVE, scorers.BLIND)
