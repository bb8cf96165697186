"""Scores equal those of a full decoder pass per pair."""

import numpy as np
import pytest
import tensorflow as tf
from random_captioner import B, L, V, make_captioner, make_images

from cappa_tf.models import likelihood
from cappa_tf.models.special_tokens import SpecialTokens

SPECIAL = SpecialTokens()


@pytest.fixture(name="captioner", scope="module")
def _captioner():
    return make_captioner()


@pytest.fixture(name="images", scope="module")
def _images():
    return make_images()


def texts(count=12, seed=0):
    """Texts of 1 to L tokens that share beginnings, and two that are equal."""
    draw = np.random.RandomState(seed)
    labels = draw.randint(2, 5, (count, L))
    labels[: count // 2, :3] = [7, 8, 9]
    for row, length in zip(labels, draw.randint(1, L + 1, count)):
        row[length - 1] = 1
        row[length:] = 0
    labels[-1] = labels[0]
    return labels.astype(np.int32)


def one_by_one(captioner, images, labels, parallel=False):
    """[B, T] from the full logits of every pair, at full length."""
    decoder = captioner.text_decoder
    columns = []
    for label in labels:
        count = 1 if images is None else len(images)
        tiled = tf.repeat(label[None], count, 0)
        if images is None:
            inputs = np.concatenate([[0], label[:-1]])[None]
            everywhere = None
            if parallel:
                inputs = np.full((1, L), V)
                everywhere = tf.constant([True])
            logits = decoder.logits(decoder(inputs, None, parallel=everywhere))
        else:
            logits = captioner.logits(images, tiled, parallel=parallel)
        log_probs = tf.gather(tf.nn.log_softmax(logits), tiled, batch_dims=2)
        columns.append(np.where(label != 0, log_probs, 0.0).sum(-1))
    return np.stack(columns, 1)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("blind", [False, True])
def test_score_is_one_pass_for_every_pair(captioner, images, blind, parallel):
    images = None if blind else images
    scores = captioner.score(images, texts(), parallel=parallel)
    wanted = one_by_one(captioner, images, texts(), parallel)
    np.testing.assert_allclose(scores, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("blind", [False, True])
def test_score_captions_is_the_score_of_each_images_own(
    captioner, images, blind, parallel
):
    labels = texts(B * 3).reshape(B, 3, L)
    labels[1, 2] = 0  # Missing: scores 0.
    given = None if blind else images
    scores = captioner.score_captions(given, labels, parallel=parallel)
    for row in range(B):
        one = None if blind else images[row : row + 1]
        wanted = one_by_one(captioner, one, labels[row], parallel)[0]
        np.testing.assert_allclose(scores[row], wanted, rtol=1e-4, atol=1e-4)
    assert scores[1, 2] == 0


@pytest.mark.parametrize("nodes", [1, 8, 1000])
def test_scores_do_not_depend_on_the_groups(captioner, images, nodes):
    memory = captioner.text_decoder.project_memory(captioner.encode(images))
    scores = likelihood.score_groups(
        captioner.text_decoder,
        memory,
        likelihood.group_by_prefix(texts(), SPECIAL, nodes),
    )
    wanted = captioner.score(images, texts())
    np.testing.assert_allclose(scores, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("known", [False, True])
def test_score_in_a_graph(captioner, images, known):
    """Labels may be constants of the graph or inputs of it."""
    if known:
        score = tf.function(lambda x: captioner.score(x, texts()))
        scores = score(images)
    else:
        scores = tf.function(captioner.score)(images, tf.constant(texts()))
    wanted = captioner.score(images, texts())
    np.testing.assert_allclose(scores, wanted, rtol=1e-4, atol=1e-4)


def test_many_labels_share_prefixes_in_a_graph(captioner, images, monkeypatch):
    """However many: TensorFlow keeps the values of 128 elements by itself."""
    labels = texts(40)
    assert labels.size > 128
    used, real = [], likelihood.score_groups

    def score_groups(decoder, memory, groups):
        used.append(groups)
        return real(decoder, memory, groups)

    monkeypatch.setattr(likelihood, "score_groups", score_groups)
    # By closure: a default argument would be an input of the graph.
    known, tensor = labels, tf.constant(labels)
    for score in (
        tf.function(lambda x: captioner.score(x, known)),
        tf.function(lambda x: captioner.score(x, tensor)),
    ):
        wanted = one_by_one(captioner, images, labels)
        np.testing.assert_allclose(score(images), wanted, rtol=1e-4, atol=1e-4)
    assert len(used) == 2


def test_a_shared_prefix_is_one_node():
    """ "7 8 2 eos" and "7 8 3 eos": prefixes "", 7, 7 8, 7 8 2 and 7 8 3."""
    texts = np.array([[7, 8, 2, 1], [7, 8, 3, 1]])
    groups = likelihood.group_by_prefix(texts, SPECIAL)
    np.testing.assert_array_equal(groups.tokens, [[0, 7, 8, 2, 3]])
    np.testing.assert_array_equal(groups.depths, [[0, 1, 2, 3, 3]])
    np.testing.assert_array_equal(groups.nodes, [[[0, 1, 2, 3], [0, 1, 2, 4]]])
    looks_at = [np.flatnonzero(row).tolist() for row in groups.ancestors[0]]
    assert looks_at == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 4]]


def test_equal_texts_are_computed_once_and_keep_their_places():
    labels = np.array([[5, 1, 0], [4, 1, 0], [5, 1, 0]])
    groups = likelihood.group_by_prefix(labels, SPECIAL)
    np.testing.assert_array_equal(groups.targets, [[[4, 1], [5, 1]]])
    np.testing.assert_array_equal(groups.order, [1, 0, 1])
