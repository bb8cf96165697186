"""Generation: properties of captions for every sampler."""

import contextlib
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_nlp import samplers
from random_captioner import B, L, V, make_captioner, make_images

from cappa_tf.models import generation
from cappa_tf.models.sampling import (
    BANNED,
    BeamSearch,
    GreedySearch,
    RandomSearch,
    Rules,
)

SAMPLERS = {
    "greedy": {},
    "beams": {"sampler": BeamSearch(3), "num_captions": 3},
    "random": {"sampler": samplers.RandomSampler(), "num_captions": 3},
    "top_p": {
        "sampler": samplers.TopPSampler(p=0.8, k=9, temperature=1.5),
        "num_captions": 2,
    },
}


@pytest.fixture(name="captioner", scope="module")
def _captioner():
    """Ends about half of its captions early."""
    captioner = make_captioner()
    captioner.text_decoder.head_weights[1].assign(np.eye(V)[1] * 0.4)
    return captioner


@pytest.fixture(name="images", scope="module")
def _images():
    return make_images()


def captions(captioner, images, **kwargs):
    """Tokens and log_probs, [B, S, L]."""
    outputs = captioner.generate(images, **kwargs)
    tokens, log_probs = (
        outputs[name].numpy().reshape(len(images), -1, outputs[name].shape[-1])
        for name in ("tokens", "log_probs")
    )
    np.testing.assert_allclose(
        outputs["log_likelihood"].numpy().reshape(log_probs.shape[:2]),
        log_probs.sum(-1),
        rtol=1e-5,
    )
    return tokens, log_probs


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prefix", [None, [5, 6]])
def test_log_probs_are_those_of_the_full_logits(
    captioner, images, name, prefix
):
    """Cached = uncached, at every step; 0 after eos and no 0 before it."""
    tokens, log_probs = captions(
        captioner, images, prefix=prefix, **SAMPLERS[name]
    )
    for s in range(tokens.shape[1]):
        logits = captioner.logits(images, tokens[:, s])
        wanted = tf.gather(
            tf.nn.log_softmax(logits), tokens[:, s], batch_dims=2
        )
        ended = np.cumsum(tokens[:, s] == 1, axis=1) - (tokens[:, s] == 1) > 0
        np.testing.assert_array_equal(tokens[:, s] == 0, ended)
        np.testing.assert_allclose(
            log_probs[:, s], np.where(ended, 0, wanted), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_batch_is_its_images_one_by_one(captioner, images, name):
    together = captions(captioner, images, **SAMPLERS[name])
    lengths = (together[0] != 0).sum(-1)
    assert lengths.min() < lengths.max()  # Some end before others.
    for row in range(B):
        alone = captions(
            captioner,
            images[row : row + 1],
            index=tf.constant([row]),
            **SAMPLERS[name],
        )
        np.testing.assert_array_equal(together[0][row], alone[0][0])
        np.testing.assert_allclose(
            together[1][row], alone[1][0], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("right", [0, 2, L])
def test_drafted_captions_are_greedy(captioner, images, monkeypatch, right):
    """However many tokens of a draft are right, from the second image on."""
    options = {"prefix": [5], "min_length": 3, "no_repeat_ngram": 1}
    for given in ({}, options):
        wanted = captions(captioner, images, **given)
        loop = captioner.text_decoder.call_with_cache
        steps = []

        def draft(decoder, memory, size, wanted=wanted):
            drafted = tf.constant(wanted[0][:, 0])
            wrong = (drafted + 1) % V
            keep = tf.range(L) < tf.constant([[L]] + [[right]] * (B - 1))
            return tf.where(keep, drafted, wrong)

        def call_with_cache(*args, loop=loop, steps=steps):
            steps.append(args[3])
            return loop(*args)

        with monkeypatch.context() as patch:
            patch.setattr(generation, "draft", draft)
            patch.setattr(
                captioner.text_decoder, "call_with_cache", call_with_cache
            )
            found = captions(
                captioner, images, sampler=GreedySearch(draft=True), **given
            )
        np.testing.assert_array_equal(found[0], wanted[0])
        np.testing.assert_allclose(found[1], wanted[1], rtol=1e-4, atol=1e-5)
        longest = (wanted[0] != 0).sum(-1).max()
        first = max(right, len(given.get("prefix", []))) + 1
        # The pass gave the first token that is not the draft's, too.
        assert steps == list(range(first, longest)) or right == L and not steps


def test_the_draft_is_the_parallel_prediction(captioner, images):
    """No other text without pad that is as long has a higher score."""
    memory = captioner.text_decoder.project_memory(captioner.encode(images))
    drafted = generation.draft(captioner.text_decoder, memory, (B, 3)).numpy()
    for row in range(B):
        texts = np.tile(drafted[row], (1 + 3 * (V - 1), 1))
        for place in range(3):
            rows = slice(1 + place * (V - 1), 1 + (place + 1) * (V - 1))
            texts[rows, place] = np.arange(1, V)
        scores = captioner.score(images[row : row + 1], texts, parallel=True)
        assert scores[0, 0] >= np.max(scores) - 1e-5


def test_drafts_refuse_what_they_cannot_do(captioner, images):
    search = GreedySearch(draft=True)
    with pytest.raises(ValueError, match="follow prompts"):
        captioner.generate(images, sampler=search, prompts=[[5]] * B)
    masked = make_captioner(masked_pred_prob=1.0, masking_ratio=(0.0, 1.0))
    with pytest.raises(ValueError, match="left to right"):
        masked.plan_generation(sampler=search)


def test_the_loop_does_not_cast_weights(images, monkeypatch):
    """Under mixed precision; captions are those of weights cast each time."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        captioner = make_captioner()
    finally:
        keras.config.set_dtype_policy(policy)

    def casts(found):
        """Casts to bfloat16 of variables that are read in the loop's body."""
        total = 0
        for function in found.graph.as_graph_def().library.function:
            if "while_body" in function.signature.name:
                nodes = {node.name: node for node in function.node_def}
                sources = [
                    nodes.get(node.input[0].split(":")[0])
                    for node in function.node_def
                    if node.op == "Cast"
                    and node.attr["DstT"].type == tf.bfloat16.as_datatype_enum
                ]
                total += sum(
                    source is not None and source.op == "ReadVariableOp"
                    for source in sources
                )
        return total

    def compiled():
        function = tf.function(captioner.generate, autograph=False)
        return function.get_concrete_function(tf.constant(images))

    found = compiled()
    monkeypatch.setattr(
        generation, "_weights_cast_once", contextlib.nullcontext
    )
    plain = compiled()
    # Per block: 4 of self-attention, 2 of cross-attention, 2 of the MLP.
    kernels = 8 * len(captioner.text_decoder.blocks)
    assert casts(found) == casts(plain) - kernels
    for name, values in found(tf.constant(images)).items():
        np.testing.assert_array_equal(values, plain(tf.constant(images))[name])


def test_one_beam_is_greedy(captioner, images):
    beam = captions(captioner, images, sampler=BeamSearch(1))
    np.testing.assert_array_equal(beam[0], captions(captioner, images)[0])


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_wide_beams_find_the_best_of_all_captions(penalty):
    """Vocabulary: pad, eos and 3 tokens; captions of at most 3."""
    captioner, images = (
        make_captioner(vocabulary_size=5, length=3),
        make_images(),
    )
    every = [(1, 0, 0)] + [(a, 1, 0) for a in (2, 3, 4)]
    every += list(itertools.product((2, 3, 4), (2, 3, 4), (1, 2, 3, 4)))
    every = np.array(every, np.int32)
    scores = captioner.score(images, every).numpy()
    scores /= ((5 + (every != 0).sum(-1)) / 6) ** penalty
    tokens, _ = captions(
        captioner, images, sampler=BeamSearch(40, penalty), num_captions=5
    )
    best = np.argsort(-scores, axis=1)[:, :5]
    np.testing.assert_array_equal(tokens, every[best])


def test_samples_have_their_probabilities():
    draws = 40_000
    uniform = np.random.RandomState(0).uniform(size=(1, draws)).astype("f")
    probabilities = np.array([0.0, 0.4, 0.1, 0.3, 0.2], np.float32)
    logits = np.log(
        probabilities, where=probabilities > 0, out=np.full(5, -1e9)
    )
    scores = tf.constant(np.tile(logits.astype("f"), (1, draws, 1)))

    def shares(search):
        _, tokens = search.choose(None, scores, None, uniform)
        return np.bincount(tokens[0], minlength=5) / draws

    squared = probabilities**2 / (probabilities**2).sum()
    for search, wanted in (
        (RandomSearch(), probabilities),
        (RandomSearch(temperature=0.5), squared),
        (RandomSearch(k=2), [0, 4 / 7, 0, 3 / 7, 0]),
        (RandomSearch(p=0.6), [0, 4 / 7, 0, 3 / 7, 0]),
        (RandomSearch(p=0.75), [0, 4 / 9, 0, 3 / 9, 2 / 9]),
    ):
        np.testing.assert_allclose(shares(search), wanted, atol=0.01)


def test_seeds_repeat(captioner, images):
    options = SAMPLERS["random"]
    one, again, other = (
        captions(captioner, images, seed=seed, **options)[0]
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert np.any(one != other)
    same = np.repeat(images[:1], B, axis=0)
    tokens = captions(captioner, same, **options)[0]
    assert len(np.unique(tokens.reshape(-1, L), axis=0)) > 3


@pytest.mark.parametrize("name", SAMPLERS)
def test_rules_hold(captioner, images, name):
    tokens, _ = captions(
        captioner,
        images,
        prefix=[4, 5, 4],
        min_length=5,
        no_repeat_ngram=2,
        **SAMPLERS[name],
    )
    assert np.all(tokens[..., :3] == [4, 5, 4])
    assert np.all(tokens[..., :5] > 1)
    for text in tokens.reshape(-1, L):
        text = text[text != 0].tolist()
        pairs = list(zip(text, text[1:]))
        assert len(set(pairs)) == len(pairs)


def test_repeats_are_banned_by_example():
    """After 2 3 2 the pair 2 3 is there; after 2 3 3 none begins with 3 2."""
    tokens = tf.constant([[2, 3, 2, 0, 0], [2, 3, 3, 0, 0]])
    scores = tf.zeros([2, 5])
    for n, banned in ((1, [[2, 3], [2, 3]]), (2, [[3], [3]]), (3, [[], []])):
        found = Rules(no_repeat_ngram=n).apply(scores, tokens, tf.constant(3))
        for row, ids in zip(found.numpy(), banned):
            assert np.flatnonzero(row <= BANNED).tolist() == [0, *ids]


def test_a_caption_ends_where_nothing_may_follow():
    captioner = make_captioner(vocabulary_size=4)
    tokens, _ = captions(
        captioner, make_images(), no_repeat_ngram=1, min_length=5
    )
    for text in tokens[:, 0]:
        assert sorted(text[:2]) == [2, 3]
        assert text[2:].tolist() == [1, 0, 0, 0, 0]


def test_prefix_may_be_text_or_of_each_image(captioner, images):
    ids = [[2 + row, 9] for row in range(B)]
    tokens, _ = captions(captioner, images, prefix=ids)
    np.testing.assert_array_equal(tokens[:, 0, :2], ids)
    tokens, _ = captions(
        captioner, images, prefix=ids, sampler=BeamSearch(2), num_captions=2
    )
    np.testing.assert_array_equal(tokens[:, 1, :2], ids)
    captioner.tokenizer = lambda strings: tf.constant([[7, 8, 1, 0]])
    try:
        tokens, _ = captions(captioner, images, prefix="a photo")
    finally:
        del captioner.tokenizer
    np.testing.assert_array_equal(tokens[:, 0, :2], [[7, 8]] * B)


@pytest.mark.parametrize("name", ["beams", "top_p"])
def test_compiles_with_xla(captioner, images, name):
    options = {"prefix": [5], "no_repeat_ngram": 2, **SAMPLERS[name]}
    compiled = tf.function(
        lambda x: captioner.generate(x, **options),
        jit_compile=True,
        autograph=False,
    )(images)
    np.testing.assert_array_equal(
        compiled["tokens"], captions(captioner, images, **options)[0]
    )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_length": 8}, "max_length=8"),
        ({"min_length": 7}, "min_length=7"),
        ({"prefix": [2] * 7}, "7 tokens of prefix"),
        ({"num_captions": 2}, "num_captions=2"),
        ({"sampler": BeamSearch(2), "num_captions": 3}, "num_captions=3"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram=-1"),
        ({"sampler": samplers.RandomSampler(seed=3)}, "seed=3"),
        ({"sampler": samplers.BeamSampler(2)}, "BeamSearch"),
    ],
)
def test_refuses(captioner, images, kwargs, message):
    with pytest.raises(ValueError, match=message):
        captioner.generate(images, **kwargs)
    with pytest.raises(ValueError, match=message):
        captioner.plan_generation(**kwargs)


def test_samplers_refuse_what_makes_no_sense():
    for make, message in (
        (lambda: BeamSearch(0), "num_beams=0"),
        (lambda: GreedySearch(draft=1), "draft=1"),
        (lambda: RandomSearch(temperature=0), "temperature=0"),
        (lambda: RandomSearch(p=0.0), "p=0.0"),
        (lambda: RandomSearch(k=0), "k=0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
