"""Texts are embedded once, and again only for other weights."""

import numpy as np
import pytest
import scoring

from cappa_tf.inference import text_embeddings
from cappa_tf.inference.text_embeddings import TextEmbeddings

TEXTS = ["red circle", "blue", "Red Circle", "green square left", "blue"]


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    return scoring.contrastive_predictor(folder, batch_size=2)


@pytest.fixture
def embeddings(predictor, monkeypatch):
    """`TextEmbeddings` that note what they embed, in `asked`."""
    found = TextEmbeddings(predictor.model, predictor.tokenizer, 2)
    found.asked = []
    embed = found._embeddings

    def noting(ids):
        found.asked.append(len(ids))
        return embed(ids)

    monkeypatch.setattr(found, "_embeddings", noting)
    return found


def test_a_text_is_embedded_once_for_the_same_weights(predictor, embeddings):
    table, rows = embeddings.find(TEXTS)
    wanted = predictor.model.embed_texts(predictor.tokenizer(TEXTS))
    np.testing.assert_allclose(table[rows], wanted, atol=1e-6)
    assert rows.tolist() == [0, 1, 0, 2, 1]  # by tokens: case is none
    table, rows = embeddings.find(["above", "blue"])
    np.testing.assert_allclose(table[rows[1]], wanted[1], atol=1e-6)
    assert embeddings.asked == [3, 1]
    temperature = predictor.model.contrastive_head.log_temperature
    for variable in (predictor.model.text_encoder.variables[0], temperature):
        before = variable.numpy()
        variable.assign(before + 0.5)
        changed, rows = embeddings.find(["blue"])
        assert embeddings.asked.pop() == len(changed) == 1
        variable.assign(before)
    predictor.model.vision_encoder.variables[0].assign_add(
        np.ones_like(predictor.model.vision_encoder.variables[0])
    )
    embeddings.find(["blue"])
    assert embeddings.asked == [3, 1, 1]
    embeddings.find(["blue"])
    assert embeddings.asked == [3, 1, 1]


def test_what_is_kept_is_bounded(embeddings, monkeypatch):
    monkeypatch.setattr(text_embeddings, "_MOST_TEXTS", 3)
    embeddings.find(["red", "green"])
    table, rows = embeddings.find(["red", "blue", "left"])
    assert len(table) == 3 and rows.tolist() == [0, 1, 2]
    assert embeddings.asked == [2, 3]
