"""The chunked loss equals the plain one, whatever the padding and chunks."""

import numpy as np
import pytest
import tensorflow as tf
from harness import check_loss

from cappa_tf.models.losses import cross_entropy

R, D, V = 23, 8, 11


def _inputs(valid_share=0.6, seed=0):
    random = np.random.RandomState(seed)
    return {
        "hidden": tf.constant(random.randn(R, D), tf.float32),
        "targets": tf.constant(random.randint(V, size=R), tf.int32),
        "valid": tf.constant(random.rand(R) < valid_share),
        "kernel": tf.constant(random.randn(D, V), tf.float32),
        "bias": tf.constant(random.randn(V), tf.float32),
    }


def _plain(hidden, targets, valid, kernel, bias, smoothing):
    """The same with all logits in memory and TensorFlow's own gradients."""
    log_probs = tf.nn.log_softmax(hidden @ kernel + bias)
    nll = -tf.gather(log_probs, targets, batch_dims=1)
    loss = (1 - smoothing) * nll - smoothing * tf.reduce_mean(log_probs, -1)
    zeros = tf.zeros_like(nll)
    return tf.where(valid, loss, zeros), tf.where(valid, nll, zeros)


def _run(function, inputs, **kwargs):
    """Values, and gradients of a sum with uneven weights."""
    weights = tf.linspace(0.5, 2.0, R)
    parts = [inputs[name] for name in ("hidden", "kernel", "bias")]
    with tf.GradientTape() as tape:
        tape.watch(parts)
        loss, nll = function(**inputs, **kwargs)
        total = tf.reduce_sum(loss * weights)
    gradients = tape.gradient(total, parts)
    return (loss, nll, *(tf.convert_to_tensor(g) for g in gradients))


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk_size", [4, 23, 1000])
def test_equals_the_plain_loss(chunk_size, smoothing, jit_compile):
    inputs = _inputs()
    run = tf.function(
        lambda: _run(
            cross_entropy.token_cross_entropy,
            inputs,
            chunk_size=chunk_size,
            label_smoothing=smoothing,
        ),
        jit_compile=jit_compile,
    )
    expected = _run(_plain, inputs, smoothing=smoothing)
    for ours, theirs in zip(run(), expected):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_or_everything_is_real(share):
    inputs = _inputs(share)
    results = _run(cross_entropy.token_cross_entropy, inputs, chunk_size=4)
    for ours, theirs in zip(results, _run(_plain, inputs, smoothing=0.0)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_padding_never_matters():
    inputs = _inputs()
    poisoned = dict(inputs)
    valid = inputs["valid"][:, None]
    poisoned["hidden"] = tf.where(valid, inputs["hidden"], 1e3)
    clean = _run(cross_entropy.token_cross_entropy, inputs, chunk_size=4)
    other = _run(cross_entropy.token_cross_entropy, poisoned, chunk_size=4)
    for a, b in zip(clean, other):
        np.testing.assert_array_equal(a, b)


def test_logits_of_a_chunk_are_all_that_is_held():
    """No tensor of the compiled graph has more than chunk x V elements."""
    chunk_size = 4
    inputs = _inputs()

    @tf.function
    def run():
        return _run(
            cross_entropy.token_cross_entropy, inputs, chunk_size=chunk_size
        )

    def sizes(graph):
        for op in graph.get_operations():
            for output in op.outputs:
                if output.shape.rank == 2 and output.shape[1] == V:
                    yield output.shape[0]

    graph = run.get_concrete_function().graph
    bodies = [graph, *graph._functions.values()]
    found = [
        rows
        for body in bodies
        for rows in sizes(getattr(body, "graph", body))
        if rows is not None
    ]
    assert max(found, default=0) <= max(chunk_size, D)


def test_losses_keep_the_promises_of_the_harness():
    inputs = _inputs()
    valid, targets = inputs["valid"], inputs["targets"]
    check_loss(
        lambda hidden, kernel, bias: cross_entropy.token_cross_entropy(
            1.0 * hidden, targets, valid, kernel, bias, chunk_size=4
        )[0],
        [inputs["hidden"], inputs["kernel"], inputs["bias"]],
        _plain(**inputs, smoothing=0.0)[0],
    )


def test_captions_count_alike_whatever_their_length():
    values = [[3.0, 1.0, 0.0], [5.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    valid = [[True, True, False], [True, False, False], [False] * 3]
    check_loss(cross_entropy.caption_mean, [values, valid], [2.0, 5.0, 0.0])


def test_refuses_smoothing_of_one():
    with pytest.raises(ValueError, match="label_smoothing=1.0"):
        cross_entropy.token_cross_entropy(**_inputs(), label_smoothing=1.0)


@pytest.mark.parametrize("columns", [1, 4, 11, 100])
@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
def test_normalizers_do_not_depend_on_the_columns_at_a_time(
    monkeypatch, columns, offset
):
    monkeypatch.setattr(cross_entropy, "_COLUMNS", columns)
    inputs = _inputs()
    hidden, kernel, bias = (inputs[x] for x in ("hidden", "kernel", "bias"))
    bias += offset
    found = cross_entropy.log_normalizers(hidden, kernel, bias)
    wanted = tf.reduce_logsumexp(hidden @ kernel + bias, axis=-1)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-5)
