"""Adafactor equals a float64 rewrite, and the reference's own steps."""

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from harness import check_optimizer, relative_difference

from cappa_tf.training.optimizers.adafactor import Adafactor, factored_axes
from cappa_tf.training.optimizers.schedules import Cosine, Linear

# As in the model; factored where two axes have at least 32.
SHAPES = {
    "mlp": (64, 40),
    "mlp_back": (40, 64),
    "square": (36, 36),
    "query": (48, 3, 36),
    "out": (3, 36, 48),
    "heads": (34, 35, 33),
    "narrow": (48, 4, 16),
    "patches": (4, 4, 3, 64),
    "bias": (64,),
    "head_bias": (3, 36),
    "scalar": (),
}
PLAIN = {"schedule": None, "weight_decay": 0.0, "global_clip_norm": None}


def rewritten_step(gradient, state, step, momentum, stored_dtype, cap=0.999):
    """One direction in float64; `state` is a dict that is updated."""
    beta2 = min(cap, 1.0 - (step + 1.0) ** -0.8)

    def decay(name, value):
        state[name] = beta2 * state.get(name, 0.0) + (1.0 - beta2) * value
        return state[name]

    square = gradient**2 + 1e-30
    sizes = sorted(range(gradient.ndim), key=lambda axis: gradient.shape[axis])
    if gradient.ndim > 1 and gradient.shape[sizes[-2]] >= 32:
        second, largest = sizes[-2:]
        row = decay("row", square.mean(largest, keepdims=True))
        column = decay("column", square.mean(second, keepdims=True))
        estimate = row * column / row.mean(second, keepdims=True)
    else:
        estimate = decay("full", square)
    rounded = float(np.asarray(momentum, stored_dtype))
    past = np.asarray(rounded * np.float32(state.get("momentum", 0.0)))
    past = past.astype(stored_dtype).astype(np.float64)
    average = (1.0 - momentum) * gradient / estimate**0.5 + past
    state["momentum"] = average.astype(np.float32).astype(stored_dtype)
    return average


def variables_of(shapes, value=0.0):
    return [
        keras.Variable(np.full(shape, value, "float32"), name=name)
        for name, shape in shapes.items()
    ]


def random_gradients(shapes, seed):
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(size=shape) * 10.0 ** rng.uniform(-3, 1)).astype("float32")
        for shape in shapes.values()
    ]


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_the_rewrite_for_every_shape(dtype, jit_compile):
    optimizer = Adafactor(
        learning_rate=1.0, momentum_dtype=dtype, beta2_cap=0.7, **PLAIN
    )
    variables = variables_of(SHAPES)
    optimizer.build(variables)
    apply = tf.function(optimizer.apply, jit_compile=jit_compile)
    stored = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    # A value on the edge of two bfloat16 may be rounded either way.
    tolerance = 1e-6 if dtype == "float32" else 2e-4
    states = [{} for _ in SHAPES]
    for step in range(6):
        gradients = random_gradients(SHAPES, step)
        before = [v.numpy() for v in variables]
        apply([tf.constant(g) for g in gradients])
        for name, v, old, g, state in zip(
            SHAPES, variables, before, gradients, states
        ):
            wanted = rewritten_step(
                g.astype(np.float64), state, step, 0.9, stored, cap=0.7
            )
            moved = old - v.numpy()
            assert relative_difference(moved, wanted) < tolerance + 1e-5, name


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((768, 3072), (0, 1)),
        ((3072, 768), (1, 0)),
        ((768, 12, 64), (2, 0)),
        ((12, 64, 768), (1, 2)),
        ((16, 16, 3, 768), None),
        ((768,), None),
        ((), None),
        ((32, 32), (0, 1)),
        ((31, 4096), None),
        ((1, 196, 768), (1, 2)),
        ((40, 40, 40), (1, 2)),
    ],
)
def test_factors_the_two_largest_axes(shape, axes):
    assert factored_axes(shape, 32) == axes


def test_state_is_small():
    """n + m numbers for a matrix, momentum in two bytes a weight."""
    optimizer = Adafactor()
    optimizer.build(variables_of({"kernel": (768, 12, 64)}))
    sizes = sorted(
        (v.dtype, int(np.prod(v.shape))) for v in optimizer.variables
    )
    assert sizes == [
        ("bfloat16", 768 * 12 * 64),
        ("float32", 12 * 64),
        ("float32", 768 * 12),
        ("int64", 1),
    ]
    without = Adafactor(momentum=0.0)
    without.build(variables_of({"kernel": (768, 12, 64)}))
    assert len(without.variables) == len(optimizer.variables) - 1


def test_first_step_is_the_sign_of_the_gradient():
    """At t = 1 the second moment is the square itself (not factored)."""
    optimizer = Adafactor(learning_rate=0.5, momentum=0.0, **PLAIN)
    variable = keras.Variable([1.0, 1.0, 1.0])
    optimizer.apply([tf.constant([3.0, -1e-6, 0.0])], [variable])
    np.testing.assert_allclose(variable, [0.5, 1.5, 1.0], rtol=1e-6)


def test_rows_that_never_had_a_gradient_stay_finite():
    """Rare tokens: most rows of an embedding have a zero gradient."""
    optimizer = Adafactor(learning_rate=0.1, **PLAIN)
    variable = keras.Variable(np.ones((50, 40), "float32"), name="embeddings")
    gradient = np.zeros((50, 40), "float32")
    for _ in range(3):
        optimizer.apply([tf.constant(gradient)], [variable])
    np.testing.assert_array_equal(variable, np.ones((50, 40)))
    gradient[7] = 1e-12
    optimizer.apply([tf.constant(gradient)], [variable])
    assert np.all(np.isfinite(variable))
    np.testing.assert_array_equal(variable[:7], np.ones((7, 40)))


def test_warmup_moves_statistics_but_no_weight():
    optimizer = Adafactor(schedule=Linear(10, 5), weight_decay=0.1)
    variables = variables_of({"kernel": (40, 40)}, value=1.0)
    optimizer.build(variables)
    optimizer.apply([tf.ones((40, 40))])
    np.testing.assert_array_equal(variables[0], np.ones((40, 40)))
    assert np.all(optimizer.variables[1].numpy() > 0)


def test_contract(tmp_path):
    model = check_optimizer(
        Adafactor,
        {
            "learning_rate": 0.01,
            "schedule": Cosine(20, 2),
            "weight_decay": 0.01,
            "global_clip_norm": 0.5,
        },
        tmp_path,
    )
    momentum = [v for v in model.optimizer.variables if v.dtype == "bfloat16"]
    assert len(momentum) == len(model.trainable_variables)


@pytest.mark.parametrize(
    ("kwargs", "received"),
    [
        ({"learning_rate": "1e-3"}, "learning_rate='1e-3'"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"weight_decay": None}, "weight_decay=None"),
        ({"global_clip_norm": 0.0}, "global_clip_norm=0.0"),
        ({"beta2_cap": 1.5}, "beta2_cap=1.5"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"momentum_dtype": "float16"}, "momentum_dtype='float16'"),
        ({"min_dim_size_to_factor": 32.0}, "min_dim_size_to_factor=32.0"),
        ({"epsilon": 0.0}, "epsilon=0.0"),
        ({"decay_exponent": True}, "decay_exponent=True"),
        ({"schedule": "cosine"}, "schedule='cosine'"),
        ({"use_ema": 1}, "use_ema=1"),
    ],
)
def test_wrong_arguments_are_named(kwargs, received):
    with pytest.raises(ValueError, match="Received: ") as error:
        Adafactor(**kwargs)
    assert received in str(error.value)
