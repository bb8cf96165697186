"""Samplers by name are those of keras_nlp, with the documented defaults."""

import pytest
from keras_nlp import samplers as theirs

from cappa_tf.inference import samplers
from cappa_tf.models.sampling import BeamSearch, RandomSearch, search_of


@pytest.mark.parametrize(
    "name, options, wanted",
    [
        ("random", {}, theirs.RandomSampler()),
        ("random", {"temperature": 0.5}, theirs.RandomSampler(temperature=0.5)),
        ("top_k", {}, theirs.TopKSampler(k=5)),
        ("top_k", {"top_k": 2}, theirs.TopKSampler(k=2)),
        ("top_p", {"top_k": 7}, theirs.TopPSampler(p=0.9, k=7)),
        ("top_p", {"top_p": 0.5}, theirs.TopPSampler(p=0.5)),
    ],
)
def test_random_samplers(name, options, wanted):
    made = samplers.make_sampler(name, **options)
    assert isinstance(made, RandomSearch)
    assert made == search_of(wanted)


def test_greedy_and_beams():
    assert samplers.make_sampler("greedy") is None
    made = samplers.make_sampler("beam", beams=3, length_penalty=1.0)
    assert made == BeamSearch(3, 1.0)
    assert samplers.make_sampler("beam") == BeamSearch(4, 0.6)


def test_what_it_does_not_use_is_refused():
    with pytest.raises(ValueError, match=r"greedy uses \[\].*top_p"):
        samplers.make_sampler("greedy", top_p=0.5)
    with pytest.raises(ValueError, match="sampler='best'"):
        samplers.make_sampler("best")
