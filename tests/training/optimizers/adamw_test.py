"""AdamW, and what it shares with Adafactor: clip, decay, order, replicas."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import two_devices
from harness import (
    assert_close,
    check_function,
    check_optimizer,
    relative_difference,
)

from cappa_tf.training.optimizers.adafactor import Adafactor
from cappa_tf.training.optimizers.adamw import AdamW
from cappa_tf.training.optimizers.base import (
    apply_summed,
    clip_scale,
    dense_gradients,
    global_norm,
)
from cappa_tf.training.optimizers.schedules import Cosine, Linear

PLAIN = {"schedule": None, "weight_decay": 0.0, "global_clip_norm": None}


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


@pytest.mark.parametrize("jit_compile", [False, True])
def test_equals_a_float64_rewrite(jit_compile):
    optimizer = AdamW(learning_rate=0.1, beta_2=0.95, epsilon=1e-3, **PLAIN)
    variable = keras.Variable(random(5, 7), name="kernel")
    wanted = variable.numpy().astype(np.float64)
    optimizer.build([variable])
    apply = tf.function(optimizer.apply, jit_compile=jit_compile)
    mean = square = 0.0
    for t in range(1, 6):
        g = random(5, 7, seed=t)
        apply([tf.constant(g)])
        mean = 0.9 * mean + 0.1 * g
        square = 0.95 * square + 0.05 * g.astype(np.float64) ** 2
        root = np.sqrt(square / (1 - 0.95**t)) + 1e-3
        wanted -= 0.1 * mean / (1 - 0.9**t) / root
        assert relative_difference(variable, wanted) < 1e-6


def test_equals_adam_of_keras_without_decay():
    ours, theirs = (
        AdamW(0.01, epsilon=1e-12, **PLAIN),
        keras.optimizers.Adam(0.01, epsilon=1e-12),
    )
    variables = [keras.Variable(random(40, 9)) for _ in range(2)]
    for step in range(4):
        g = tf.constant(random(40, 9, seed=step))
        for optimizer, variable in zip((ours, theirs), variables):
            optimizer.apply([g], [variable])
    # With an epsilon they differ: that of Keras is not bias-corrected.
    assert relative_difference(*variables) < 1e-6


def test_half_momentum_stays_close():
    full, half = (
        AdamW(0.1, **PLAIN),
        AdamW(0.1, momentum_dtype="bfloat16", **PLAIN),
    )
    variables = [keras.Variable(np.zeros((30, 9), "float32")) for _ in "ab"]
    for step in range(4):
        g = tf.constant(random(30, 9, seed=step))
        for optimizer, variable in zip((full, half), variables):
            optimizer.apply([g], [variable])
    assert [v.dtype for v in half.variables] == ["int64", "bfloat16", "float32"]
    assert 0.0 < relative_difference(*variables) < 0.01


def test_decay_is_independent_of_the_learning_rate():
    """w -= schedule(t) * weight_decay * w, kernels only."""
    optimizer = AdamW(0.0, schedule=Linear(10, end=0.0), weight_decay=0.1)
    names = ("kernel", "bias", "gamma", "embeddings", "position_embedding")
    variables = [keras.Variable(np.ones(3, "float32"), name=n) for n in names]
    for _ in range(2):
        optimizer.apply([tf.ones(3) for _ in names], variables)
    np.testing.assert_allclose(variables[0], 0.9 * (1 - 0.9 * 0.1), rtol=1e-6)
    for variable in variables[1:]:
        np.testing.assert_array_equal(variable, np.ones(3))


def test_kernels_of_keras_layers_are_decayed():
    optimizer = AdamW(0.0, weight_decay=0.5, global_clip_norm=None)
    layer = keras.layers.EinsumDense(
        "btd,dhc->bthc", (None, 2, 4), bias_axes="hc", bias_initializer="ones"
    )
    layer.build((None, None, 6))
    before = layer.kernel.numpy()
    optimizer.apply(
        [tf.zeros(v.shape) for v in layer.variables], layer.variables
    )
    np.testing.assert_allclose(layer.kernel, before / 2, rtol=1e-6)
    np.testing.assert_array_equal(layer.bias, np.ones((2, 4)))


def test_effective_learning_rate_is_what_is_applied():
    """Without an average, AdamW moves by the learning rate times the sign."""
    optimizer = AdamW(
        0.1,
        schedule=Cosine(10, 2),
        weight_decay=0.0,
        global_clip_norm=None,
        beta_1=0.0,
        beta_2=0.0,
        epsilon=0.0,
    )
    variable = keras.Variable([0.0])
    for step in range(10):
        before = float(variable[0])
        effective = float(optimizer.learning_rate)
        assert effective == float(optimizer.learning_rate_at(step))
        optimizer.apply([tf.constant([-2.0])], [variable])
        assert float(variable[0]) - before == pytest.approx(effective, abs=1e-7)
    assert float(optimizer.multiplier_at(2)) == 1.0
    assert float(AdamW(0.1).learning_rate_at(5)) == pytest.approx(0.1)


def test_clip_has_the_semantics_of_optax():
    gradients = [random(30, 4), random(7, seed=1)]
    norm = float(
        np.sqrt(sum((g.astype("float64") ** 2).sum() for g in gradients))
    )
    found = check_function(lambda *g: [global_norm(g)], gradients)[0]
    assert float(found) == pytest.approx(norm, rel=1e-6)
    for limit in (0.5 * norm, 1e-3):
        scale = float(clip_scale(found, limit))
        assert scale == pytest.approx(limit / norm, rel=1e-5)
    assert float(clip_scale(found, 1.01 * norm)) == 1.0
    assert float(clip_scale(tf.zeros([]), 1.0)) == 1.0
    broken = global_norm([*gradients, np.float32([np.nan])])
    assert np.isnan(float(clip_scale(broken, 1.0)))


def test_clip_comes_before_the_moments():
    clipping, plain = AdamW(0.1, None, 0.0, 0.5), AdamW(0.1, **PLAIN)
    variables = [keras.Variable(np.zeros(20, "float32")) for _ in "ab"]
    for step in range(3):
        g = random(20, seed=step)
        clipping.apply([tf.constant(g)], variables[:1])
        scaled = g * min(1.0, 0.5 / np.linalg.norm(g))
        plain.apply([tf.constant(scaled)], variables[1:])
    assert relative_difference(*variables) < 1e-6


def test_gradients_of_lookups_count_rows_that_occur_twice():
    """The norm is that of the sum, not of the slices."""
    rows = tf.IndexedSlices(
        tf.constant([[3.0], [1.0], [2.0]]), tf.constant([1, 0, 1]), (3, 1)
    )
    dense = [[1.0], [5.0], [0.0]]
    gradients = dense_gradients([rows, None])
    np.testing.assert_array_equal(gradients[0], dense)
    assert gradients[1] is None
    variables = [keras.Variable(np.zeros((3, 1), "float32")) for _ in "ab"]
    for g, variable in zip((rows, tf.constant(dense)), variables):
        AdamW(0.1, global_clip_norm=1.0).apply([g], [variable])
    np.testing.assert_array_equal(*variables)


def test_variables_without_a_gradient_stay_and_others_move():
    optimizer = AdamW(0.1, weight_decay=0.1)
    frozen, moved = (
        keras.Variable(np.ones(3, "float32"), name="kernel") for _ in "ab"
    )
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([None, tf.ones(3)], [frozen, moved])
    np.testing.assert_array_equal(frozen, np.ones(3))
    assert np.all(moved.numpy() < 0.95)


def test_average_of_the_weights():
    optimizer = AdamW(0.1, use_ema=True, ema_momentum=0.75, **PLAIN)
    variable = keras.Variable(random(6), name="kernel")
    wanted = None
    for step in range(4):
        optimizer.apply([tf.constant(random(6, seed=step))], [variable])
        value = variable.numpy()
        wanted = value if step == 0 else 0.75 * wanted + 0.25 * value
    assert relative_difference(variable, wanted) > 0.01
    optimizer.finalize_variable_values([variable])
    assert relative_difference(variable, wanted) < 1e-6


def test_contract(tmp_path):
    check_optimizer(
        AdamW,
        {
            "learning_rate": 0.01,
            "schedule": Cosine(20, 2),
            "weight_decay": 0.01,
            "global_clip_norm": 0.5,
            "use_ema": True,
        },
        tmp_path,
    )


@pytest.mark.parametrize(
    ("kwargs", "received"),
    [
        ({"learning_rate": "1e-3"}, "learning_rate='1e-3'"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"global_clip_norm": True}, "global_clip_norm=True"),
        ({"beta_1": 1.0}, "beta_1=1.0"),
        ({"beta_2": -0.1}, "beta_2=-0.1"),
        ({"epsilon": "1e-8"}, "epsilon='1e-8'"),
        ({"momentum_dtype": None}, "momentum_dtype=None"),
        ({"schedule": Cosine}, "schedule=<class"),
        ({"ema_momentum": 1.1}, "ema_momentum=1.1"),
    ],
)
def test_wrong_arguments_are_named(kwargs, received):
    with pytest.raises(ValueError, match="Received: ") as error:
        AdamW(**kwargs)
    assert received in str(error.value)


SHARES = (1.0, 3.0)  # Of the gradient, by replica; their sum is 4.


def replicated_steps(optimizer_cls, gradients, reduce_first):
    """Each replica's weights after the steps, then each one's averages."""
    strategy = two_devices()
    with strategy.scope():
        optimizer, variable = averaging_optimizer(optimizer_cls)

    def replica_step(gradient):
        context = tf.distribute.get_replica_context()
        gradient *= tf.gather(SHARES, context.replica_id_in_sync_group)
        if reduce_first:
            gradient = context.all_reduce("SUM", gradient)
            apply_summed(optimizer, [gradient], [variable])
        else:
            optimizer.apply([gradient], [variable])

    @tf.function
    def step(gradient):
        strategy.run(replica_step, args=(gradient,))

    for gradient in gradients:
        step(tf.constant(gradient))
    results = [c.numpy() for c in variable.value.values]
    optimizer.finalize_variable_values([variable])
    return results + [c.numpy() for c in variable.value.values]


def averaging_optimizer(optimizer_cls):
    variable = keras.Variable(np.ones((40, 36), "float32"), name="kernel")
    # A large epsilon, or else the size of the gradients would not matter.
    optimizer = optimizer_cls(
        0.1, weight_decay=0.1, global_clip_norm=50.0, epsilon=1.0, use_ema=True
    )
    optimizer.build([variable])
    return optimizer, variable


@pytest.mark.parametrize("reduce_first", [False, True])
@pytest.mark.parametrize("optimizer_cls", [AdamW, Adafactor])
def test_two_replicas_make_the_step_of_one(optimizer_cls, reduce_first):
    """Whoever sums; the clip sees the sum of the replicas' gradients."""
    gradients = [random(40, 36, seed=step) for step in range(3)]
    optimizer, variable = averaging_optimizer(optimizer_cls)
    for gradient in gradients:
        optimizer.apply([tf.constant(4.0 * gradient)])
    last = variable.numpy()
    optimizer.finalize_variable_values([variable])
    wanted = [last, last, variable.numpy(), variable.numpy()]
    actual = replicated_steps(optimizer_cls, gradients, reduce_first)
    assert_close(wanted, actual, 1e-6, 1e-6)


@pytest.mark.parametrize("make", [AdamW, Adafactor])
def test_fused_updates_are_the_plain_ones(make):
    """With clipping, decay, state in bfloat16 and an average, in place."""
    optimizers = [
        make(0.1, momentum_dtype="bfloat16", global_clip_norm=0.5, use_ema=True)
        for _ in "ab"
    ]
    # Two of one shape, which are traced once.
    shapes = [(40, 36), (40, 36), (7,)]
    lists = [
        [
            keras.Variable(random(*shape, seed=i), name="kernel")
            for i, shape in enumerate(shapes)
        ]
        for _ in "ab"
    ]
    applied = []
    for optimizer, variables in zip(optimizers, lists):
        optimizer.build(variables)
        applied.append(tf.function(optimizer.apply, autograph=False))
    optimizers[1].fuse_updates()
    for step in range(3):
        gradients = [
            tf.constant(random(*shape, seed=9 * step + i))
            for i, shape in enumerate(shapes)
        ]
        for apply in applied:
            apply(gradients)
    for plain, fused in zip(*(o.variables for o in optimizers), strict=True):
        # A sum in another order may round a bfloat16 the other way.
        limit = 1e-2 if plain.dtype == "bfloat16" else 1e-5
        np.testing.assert_allclose(
            tf.cast(plain.value, tf.float32),
            tf.cast(fused.value, tf.float32),
            rtol=limit,
            atol=1e-6,
        )
    for plain, fused in zip(*lists, strict=True):
        assert relative_difference(plain, fused) < 1e-5
    graph = applied[1].get_concrete_function(gradients).graph.as_graph_def()
    updates = [f.signature.name for f in graph.library.function]
    assert len(updates) == 2, updates
