"""Prompts: read and not predicted, in losses, generation and scores."""

import numpy as np
import pytest
import tensorflow as tf
from random_captioner import V, make_captioner, make_images

from cappa_tf.models.captioner import Captioner
from cappa_tf.models.sampling import BeamSearch, RandomSearch

L = 10
LENGTHS = (2, 0, 4, 1)  # of the prompts
# Tokens that no prompt of the tests has in common with another.
PROMPTS = np.array(
    [[5, 6, 0, 0], [0] * 4, [7, 8, 9, 5], [11, 0, 0, 0]], "int32"
)
SAMPLERS = {
    "greedy": {},
    "beams": {"sampler": BeamSearch(3), "num_captions": 3},
    "random": {"sampler": RandomSearch(), "num_captions": 2},
}


@pytest.fixture(scope="module")
def captioner():
    made = make_captioner(length=L, masked_pred_prob=0.5)
    # Ends about half of its captions early.
    made.text_decoder.head_weights[1].assign(np.eye(V)[1] * 0.4)
    return made


@pytest.fixture(scope="module")
def batch():
    random = np.random.RandomState(0)
    labels = random.randint(2, V, (4, 2, L))
    lengths = np.repeat([LENGTHS], 2, 0).T  # [B, K]
    for row, answer in enumerate((3, 4, 6, 2)):
        end = LENGTHS[row] + answer
        labels[row, :, end - 1], labels[row, :, end:] = 1, 0
    return {
        "image": tf.constant(make_images()),
        "labels": tf.constant(labels, tf.int32),
        "prompt_lengths": tf.constant(lengths, tf.int32),
        "index": tf.range(10, 14, dtype=tf.int64),
    }


def _answers(batch):
    """Which tokens are predicted, bool [B, K, L]."""
    lengths = batch["prompt_lengths"].numpy()[..., None]
    return (batch["labels"].numpy() != 0) & (np.arange(L) >= lengths)


def _mean(values, counted):
    """Mean over the tokens of each caption, then over captions, [B]."""
    return ((values * counted).sum(-1) / counted.sum(-1)).mean(-1)


def _parallel_log_probs(captioner, images, labels, lengths):
    """Log-probabilities [N, L, V] where prompts are shown, all else MASK."""
    inputs = np.where(np.arange(L) < lengths[:, None], labels, V)
    decoder = captioner.text_decoder
    memory = decoder.project_memory(captioner.encode(images))
    everywhere = tf.fill([len(labels)], True)
    hidden = decoder(tf.constant(inputs, tf.int32), memory, everywhere)
    return tf.nn.log_softmax(decoder.logits(hidden)).numpy()


def _nll(captioner, batch, parallel):
    """Of each token, [B, K, L], from the logits."""
    labels = batch["labels"]
    if parallel:
        flat = labels.numpy().reshape(-1, L)
        lengths = batch["prompt_lengths"].numpy().reshape(-1)
        found = _parallel_log_probs(captioner, batch["image"], flat, lengths)
        log_probs = found.reshape(4, 2, L, V)
    else:
        logits = captioner.logits(batch["image"], labels)
        log_probs = tf.nn.log_softmax(logits).numpy()
    return -np.take_along_axis(log_probs, labels.numpy()[..., None], -1)[..., 0]


def test_the_loss_is_that_of_the_answers_alone(captioner, batch):
    big = {k: tf.repeat(v, 4, axis=0) for k, v in batch.items()}
    big["index"] = tf.range(16, dtype=tf.int64)
    parts = captioner.compute_losses(big)
    chosen = parts["parallel"].numpy() == 1
    assert 0 < chosen.sum() < 16
    counted = _answers(batch)
    loss, nll = (
        np.where(chosen, *(f(_nll(captioner, batch, p)) for p in (True, False)))
        for f in (
            lambda x: np.repeat(_mean(x, counted), 4),
            lambda x: np.repeat((x * counted).sum((1, 2)), 4),
        )
    )
    np.testing.assert_allclose(parts["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(parts["nll"], nll, rtol=1e-5)
    tokens = np.repeat(counted.sum((1, 2)), 4)
    np.testing.assert_array_equal(parts["tokens"], tokens)
    np.testing.assert_array_equal(parts["predicted"], tokens)


def test_prompts_are_no_targets(captioner, batch):
    """The head's bias gets no gradient towards tokens of prompts alone."""
    labels = np.full((4, 1, L), 0, np.int32)
    labels[:, 0, :6] = [17, 18, 19, 3, 4, 1]
    images = batch["image"]

    def gradient(**prompt):
        with tf.GradientTape() as tape:
            one = {"image": images, "labels": tf.constant(labels), **prompt}
            parts = captioner.compute_losses(one, training=False)
            loss = tf.reduce_mean(parts["loss"])
        return tape.gradient(loss, captioner.text_decoder.head_weights[1].value)

    whole = gradient()
    assert np.all(whole.numpy()[17:20] < 0)  # Each target is pulled up.
    answers = gradient(prompt_lengths=tf.fill([4, 1], 3)).numpy()
    assert np.all(answers[17:20] > 0)
    assert np.all(answers[[3, 4, 1]] < 0)


@pytest.mark.parametrize("ratio", [1.0, 0.6, (0.2, 1.0)])
def test_parallel_examples_show_their_prompt(ratio):
    captioner = make_captioner(
        length=L, masked_pred_prob=1.0, masking_ratio=ratio
    )
    labels = tf.constant(np.random.RandomState(1).randint(2, V, (6, L)))
    labels = tf.cast(labels, tf.int32)
    lengths = np.array([0, 1, 3, 5, 9, 4])
    seeds = tf.constant(range(6), tf.uint32)
    inputs, _, _ = captioner._decoder_inputs(
        labels, tf.fill([6], True), seeds, tf.constant(lengths, tf.int32)
    )
    plain, _, _ = captioner._decoder_inputs(labels, tf.fill([6], True), seeds)
    in_prompt = np.arange(L) < lengths[:, None]
    np.testing.assert_array_equal(inputs, np.where(in_prompt, labels, plain))
    assert np.any(plain.numpy()[in_prompt] == V)


def test_empty_prompts_change_nothing(captioner, batch):
    without = {k: v for k, v in batch.items() if k != "prompt_lengths"}
    empty = {**batch, "prompt_lengths": tf.zeros([4, 2], tf.int32)}
    for training in (True, False):
        pair = [
            captioner.compute_losses(one, training) for one in (without, empty)
        ]
        for name, value in pair[0].items():
            np.testing.assert_array_equal(value, pair[1][name])


def _captions(captioner, images, **options):
    found = captioner.generate(images, **options)
    shape = (len(images), -1, found["tokens"].shape[-1])
    return [found[n].numpy().reshape(shape) for n in ("tokens", "log_probs")]


@pytest.mark.parametrize("name", SAMPLERS)
def test_generation_with_a_cache_is_that_of_whole_texts(captioner, name):
    """Log-probabilities of what is said are those of prompt and caption."""
    tokens, log_probs = _captions(
        captioner, make_images(), prompts=PROMPTS, **SAMPLERS[name]
    )
    for row, length in enumerate(LENGTHS):
        prompt = PROMPTS[row, :length]
        for said, found in zip(tokens[row], log_probs[row]):
            count = np.sum(said != 0)
            assert length + count <= L
            text = np.zeros(L, np.int32)
            text[: length + count] = [*prompt, *said[:count]]
            logits = captioner.logits(make_images()[row : row + 1], text[None])
            wanted = tf.gather(
                tf.nn.log_softmax(logits[0]), text, batch_dims=1
            ).numpy()[length : length + count]
            np.testing.assert_allclose(found[:count], wanted, atol=1e-4)
            assert not found[count:].any()
    if name == "greedy":
        for row, length in enumerate(LENGTHS):
            text = np.zeros((1, L), np.int32)
            text[0, :length] = PROMPTS[row, :length]
            for i in range(length, L):
                logits = captioner.logits(make_images()[row : row + 1], text)
                text[0, i] = 1 + np.argmax(logits[0, i, 1:])
                if text[0, i] == 1:
                    break
            np.testing.assert_array_equal(
                tokens[row, 0, : L - length], text[0, length:]
            )


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_batch_of_prompts_is_each_on_its_own(captioner, name):
    images = make_images()
    together = _captions(captioner, images, prompts=PROMPTS, **SAMPLERS[name])
    for row, length in enumerate(LENGTHS):
        prompt = {"prompts": PROMPTS[row : row + 1, :length]}
        if not length:
            prompt = {}  # An empty prompt is none.
        alone = _captions(
            captioner,
            images[row : row + 1],
            index=tf.constant([row]),
            **prompt,
            **SAMPLERS[name],
        )
        np.testing.assert_array_equal(together[0][row], alone[0][0])
        np.testing.assert_allclose(together[1][row], alone[1][0], atol=1e-4)


def test_prompts_of_unknown_length_are_read_in_a_graph(captioner):
    expected = _captions(captioner, make_images(), prompts=PROMPTS)

    def generate(prompts):
        found = captioner.generate(make_images(), prompts=prompts)
        return found["tokens"]

    for count in (None, 4):
        spec = [tf.TensorSpec([count, None], tf.int32)]
        compiled = tf.function(generate, spec, autograph=False)
        np.testing.assert_array_equal(compiled(PROMPTS), expected[0][:, 0])


def test_a_model_that_fills_masks_in_sees_the_prompt():
    captioner = make_captioner(
        length=L, masked_pred_prob=1.0, masking_ratio=(0.0, 1.0)
    )
    tokens, log_probs = _captions(captioner, make_images(), prompts=PROMPTS)
    for row, length in enumerate(LENGTHS):
        text = np.full((1, L), V, np.int32)
        text[0, :length] = PROMPTS[row, :length]
        for i in range(length, L):
            found = _parallel_log_probs(
                captioner,
                make_images()[row : row + 1],
                text,
                np.array([i]),
            )[0, i]
            text[0, i] = said = tokens[row, 0, i - length]
            assert said == 1 + np.argmax(found[1:])
            np.testing.assert_allclose(
                log_probs[row, 0, i - length], found[said], atol=1e-4
            )
            if said == 1:
                break


@pytest.mark.parametrize("parallel", [False, True])
def test_scores_are_those_of_answers(captioner, batch, parallel):
    nll = _nll(captioner, batch, parallel)
    expected = -(nll * _answers(batch)).sum(-1)
    labels, lengths = batch["labels"], batch["prompt_lengths"]
    found = captioner.score_own_texts(
        batch["image"],
        labels,
        "parallel" if parallel else "autoregressive",
        prompt_lengths=lengths,
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    # The same texts for all images, in prefix trees where left to right.
    texts = tf.reshape(labels, [-1, L])
    every = captioner.score_texts(
        batch["image"],
        texts,
        "parallel" if parallel else "autoregressive",
        prompt_lengths=tf.reshape(lengths, [-1]),
    ).numpy()
    for row in range(4):
        np.testing.assert_allclose(
            every[row, 2 * row : 2 * row + 2], expected[row], rtol=1e-4
        )


def test_a_captioner_knows_its_prompts(captioner):
    class Data:
        prompts = ("caption:", "answer: {question}")

    taught = make_captioner(length=L)
    taught.adopt(Data())
    again = Captioner.from_config(taught.get_config())
    assert again.prompts == Data.prompts
    with pytest.raises(ValueError, match="caption:.*needs one for each image"):
        taught.generate(make_images())
    with pytest.raises(ValueError, match="at most.*9"):
        taught.generate(make_images(), prompts=np.ones((4, 10), np.int32))
    captioner.generate(make_images())


def test_generation_without_an_image_is_that_of_the_blind_decoder(captioner):
    found = captioner.generate(None, prompts=PROMPTS)
    tokens, log_probs = (found[n].numpy() for n in ("tokens", "log_probs"))
    for row, length in enumerate(LENGTHS):
        text = np.zeros((1, L), np.int32)
        text[0, :length] = PROMPTS[row, :length]
        said = tokens[row, : L - length]
        text[0, length:] = said
        score = captioner.score_captions(
            None, text[None], prompt_lengths=tf.constant([[length]])
        )
        np.testing.assert_allclose(score, [[log_probs[row].sum()]], rtol=1e-4)
        # The likeliest first token is no longer that of the image.
        hidden = captioner.text_decoder(
            captioner.text_decoder.shift_right(tf.constant(text))
        )
        logits = captioner.text_decoder.logits(hidden)[0, length]
        assert said[0] == 1 + np.argmax(logits[1:])
