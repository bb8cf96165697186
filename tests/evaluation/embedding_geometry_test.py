"""Figures of the unit sphere: by hand, and pair by pair."""

import math

import numpy as np
import pytest

from cappa_tf.evaluation import embedding_geometry


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_two_pairs_by_hand():
    """Images east and north; texts east, and west for the second image."""
    images = np.array([[1.0, 0.0], [0.0, 1.0]])
    texts = np.array([[1.0, 0.0], [-1.0, 0.0]])
    found = embedding_geometry.geometry(images, texts, np.array([0, 1]))
    # Means (1/2, 1/2) and (0, 0).
    assert found["modality_gap"] == pytest.approx(math.sqrt(1 / 2))
    # Squared distances 0 and 2; of the two images 2, of the two texts 4.
    assert found["alignment"] == pytest.approx(1.0)
    assert found["uniformity/images"] == pytest.approx(-4.0)
    assert found["uniformity/texts"] == pytest.approx(-8.0)
    assert found["cosine/pairs"] == pytest.approx(1 / 2)
    # The first image with "west", the second with "east".
    assert found["cosine/non_pairs"] == pytest.approx(-1 / 2)


def test_sums_over_a_split_are_those_over_its_pairs():
    rng = np.random.default_rng(0)
    images = unit(rng.normal(size=(7, 5)))
    texts = unit(rng.normal(size=(11, 5)))
    owners = np.array([0, 0, 1, 2, 2, 2, 3, 4, 5, 6, 6])
    found = embedding_geometry.geometry(images, texts, owners)
    cosines = images @ texts.T
    own = owners == np.arange(7)[:, None]
    assert found["cosine/pairs"] == pytest.approx(cosines[own].mean())
    assert found["cosine/non_pairs"] == pytest.approx(cosines[~own].mean())
    distances = [
        ((texts[i] - texts[j]) ** 2).sum() for i in range(11) for j in range(i)
    ]
    wanted = np.log(np.exp(-2 * np.array(distances)).mean())
    assert found["uniformity/texts"] == pytest.approx(wanted)
    for rows in (1, 4, 11, 99):
        part = embedding_geometry.uniformity(texts, rows)
        assert part == pytest.approx(wanted)


def test_what_has_no_pair_is_not_defined():
    one = np.ones((1, 1))
    found = embedding_geometry.geometry(one, one, [0])
    assert math.isnan(found["uniformity/images"])
    assert math.isnan(found["cosine/non_pairs"])
    assert found["alignment"] == found["modality_gap"] == 0.0
