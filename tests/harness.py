"""Common checks of every layer, function and optimizer.

A test of a class calls its check once, and then tests only what is specific
to that class.
"""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf


def check_layer(
    layer_cls,
    init_kwargs,
    inputs,
    expected_output_shapes,
    tmp_path,
    *,
    call_kwargs=None,
    build_shapes=None,
    float32_outputs=(),
    bfloat16_tolerance=0.05,
):
    """Checks a Keras layer or model against the contract of this project.

    It builds; its symbolic, eager, compiled and XLA results agree; under
    mixed_bfloat16 weights stay float32 and outputs stay close; it refuses
    unknown arguments; its config and its `.keras` file rebuild the same.

    Args:
        layer_cls: Class under test.
        init_kwargs: Its arguments.
        inputs: Arrays, the positional call arguments; batch first.
        expected_output_shapes: A shape, or a tuple or dict of shapes as the
            layer returns them, batch included.
        tmp_path: Folder for the saved file.
        call_kwargs: Further call arguments, passed as they are.
        build_shapes: Arguments of `build`, for layers that cannot tell them
            from the inputs; `None` lets the first call build.
        float32_outputs: Keys of a dict output that stay float32 under mixed
            precision.
        bfloat16_tolerance: Largest L2 difference from float32, relative.

    Returns:
        The layer and its eager outputs, for further tests.
    """
    call_kwargs = call_kwargs or {}
    with pytest.raises((TypeError, ValueError)):
        layer_cls(**init_kwargs, misspelled_argument=1)
    layer = _built(layer_cls(**init_kwargs), build_shapes)
    inputs = [tf.convert_to_tensor(x) for x in inputs]
    layer(*inputs, **call_kwargs)
    randomize(layer)
    outputs = layer(*inputs, **call_kwargs)
    assert layer.built
    assert shapes_of(outputs) == expected_output_shapes
    wrapped = functional(layer, inputs, call_kwargs)
    _check_symbolic(wrapped.output, expected_output_shapes)
    check_function(lambda *x: layer(*x, **call_kwargs), inputs)
    rebuilt = _built(check_config(layer), build_shapes)
    assert shapes_of(rebuilt(*inputs, **call_kwargs)) == expected_output_shapes
    assert _weight_shapes(rebuilt) == _weight_shapes(layer)
    _check_saving(layer, wrapped, inputs, call_kwargs, tmp_path)
    half = layer_cls(**init_kwargs, dtype="mixed_bfloat16")
    half = _built(half, build_shapes)
    half(*inputs, **call_kwargs)
    half.set_weights(layer.get_weights())
    half_outputs = half(*inputs, **call_kwargs)
    assert {w.dtype for w in half.weights} <= {"float32"}
    _check_half(outputs, half_outputs, float32_outputs, bfloat16_tolerance)
    return layer, outputs


def check_function(function, inputs, rtol=1e-5, atol=1e-5):
    """Checks that a function has equal results eagerly, as a graph and in XLA.

    Args:
        function: Takes tensors, returns a structure of tensors.
        inputs: Its arguments.
        rtol: Relative tolerance.
        atol: Absolute tolerance.

    Returns:
        The eager result.
    """
    inputs = [tf.convert_to_tensor(x) for x in inputs]
    eager = function(*inputs)
    for jit_compile in (False, True):
        compiled = tf.function(function, jit_compile=jit_compile)(*inputs)
        assert_close(eager, compiled, rtol, atol)
    return eager


def check_loss(function, inputs, expected, rtol=1e-5, atol=1e-6):
    """Checks a loss: its value in all modes of execution, and its gradient.

    Args:
        function: Takes tensors, returns a tensor of losses.
        inputs: Its arguments; the loss is differentiable in the first.
        expected: The right losses, as an array.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
    """
    inputs = [tf.convert_to_tensor(x) for x in inputs]
    loss = check_function(function, inputs, rtol, atol)
    np.testing.assert_allclose(loss, expected, rtol, atol)
    with tf.GradientTape() as tape:
        tape.watch(inputs[0])
        total = tf.reduce_sum(function(*inputs))
    gradient = tape.gradient(total, inputs[0])
    assert gradient.shape == inputs[0].shape
    assert np.all(np.isfinite(gradient))


def check_optimizer(optimizer_cls, init_kwargs, tmp_path):
    """Checks an optimizer against the contract of this project.

    It refuses unknown arguments; its config rebuilds it; a compiled model
    saved in mid-run resumes with the same next step; XLA changes nothing.

    Args:
        optimizer_cls: Class under test.
        init_kwargs: Its arguments.
        tmp_path: Folder for the saved file.

    Returns:
        A small compiled model after three steps, for further tests.
    """
    with pytest.raises((TypeError, ValueError)):
        optimizer_cls(**init_kwargs, misspelled_argument=1)
    check_config(optimizer_cls(**init_kwargs))
    models = [
        small_model(optimizer_cls(**init_kwargs), jit_compile=jit_compile)
        for jit_compile in (False, True)
    ]
    models[1].set_weights(models[0].get_weights())
    for model in models:
        _train(model, steps=3)
    assert_close(models[0].get_weights(), models[1].get_weights(), 1e-3, 1e-5)
    model = models[0]
    assert int(model.optimizer.iterations) == 3
    path = tmp_path / "optimizer.keras"
    model.save(path)
    loaded = keras.models.load_model(path)
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    for old, new in zip(model.optimizer.variables, loaded.optimizer.variables):
        assert old.dtype == new.dtype
        np.testing.assert_array_equal(old.numpy(), new.numpy())
    for one in (model, loaded):
        _train(one, steps=1)
    assert_close(model.get_weights(), loaded.get_weights(), 0.0, 0.0)
    return model


def check_config(thing):
    """Checks that a Keras object's config is JSON and rebuilds it.

    Returns:
        The rebuilt object.
    """
    config = thing.get_config()
    rebuilt = type(thing).from_config(json.loads(json.dumps(config)))
    assert _plain(rebuilt.get_config()) == _plain(config)
    assert type(thing).__name__ in keras.saving.get_registered_name(type(thing))
    assert keras.saving.get_registered_name(type(thing)).startswith("cappa_tf>")
    return rebuilt


def small_model(optimizer, jit_compile=False):
    """An embedding and a dense layer, compiled; maps 8 ids to 40 scores."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Embedding(50, 32),
            keras.layers.Dense(40),
        ]
    )
    model.build((None, 8))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, jit_compile=jit_compile)
    return model


def randomize(layer, scale=0.1, seed=0):
    """Adds noise to all weights, to reveal a forgotten bias or head."""
    rng = np.random.default_rng(seed)
    for weight in layer.weights:
        noise = scale * rng.normal(size=weight.shape)
        weight.assign(weight + noise.astype("float32"))


def functional(layer, inputs, call_kwargs=None):
    """A functional model around a layer, with the batch left open."""
    symbols = [
        keras.Input(batch_shape=(None, *x.shape[1:]), dtype=x.dtype.name)
        for x in inputs
    ]
    return keras.Model(symbols, layer(*symbols, **(call_kwargs or {})))


def shapes_of(outputs):
    """The structure of `outputs` with a tuple of ints for each tensor."""
    if isinstance(outputs, dict):
        return {key: shapes_of(value) for key, value in outputs.items()}
    if isinstance(outputs, (list, tuple)):
        return tuple(shapes_of(value) for value in outputs)
    return tuple(outputs.shape)


def assert_close(expected, actual, rtol=1e-5, atol=1e-5):
    """Compares two structures of numbers."""
    pairs = zip(tf.nest.flatten(expected), tf.nest.flatten(actual), strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(_array(one), _array(other), rtol, atol)


def relative_difference(actual, expected):
    """L2 norm of the difference over that of `expected`."""
    actual, expected = _array(actual), _array(expected)
    norm = max(np.linalg.norm(expected), 1e-30)
    return float(np.linalg.norm(actual - expected) / norm)


def _built(layer, build_shapes):
    if build_shapes is not None:
        layer.build(*build_shapes)
    return layer


def _train(model, steps):
    for _ in range(steps):
        rng = np.random.default_rng(int(model.optimizer.iterations))
        ids = rng.integers(0, 40, (4, 8))
        model.train_on_batch(ids, ids)


def _check_symbolic(symbols, expected):
    def open_batch(shapes):
        if isinstance(shapes, dict):
            return {key: open_batch(value) for key, value in shapes.items()}
        if shapes and isinstance(shapes[0], tuple):
            return tuple(open_batch(value) for value in shapes)
        return (None, *shapes[1:])

    assert shapes_of(symbols) == open_batch(expected)


def _check_saving(layer, wrapped, inputs, call_kwargs, tmp_path):
    path = tmp_path / "layer.keras"
    model = layer if isinstance(layer, keras.Model) else wrapped
    model.save(path)
    loaded = keras.models.load_model(path)
    if isinstance(layer, keras.Model):
        wanted, actual = (
            one(*inputs, **call_kwargs) for one in (model, loaded)
        )
    else:
        wanted, actual = (
            one(inputs if len(inputs) > 1 else inputs[0])
            for one in (model, loaded)
        )
    assert_close(wanted, actual, 0.0, 0.0)


def _check_half(outputs, half_outputs, float32_outputs, tolerance):
    if not isinstance(outputs, dict):
        outputs, half_outputs = {"output": outputs}, {"output": half_outputs}
    for name, half in half_outputs.items():
        wanted = "float32" if name in float32_outputs else "bfloat16"
        assert half.dtype == wanted, name
        assert relative_difference(half, outputs[name]) < tolerance, name


def _weight_shapes(layer):
    return [tuple(weight.shape) for weight in layer.weights]


def _plain(config):
    """The config without random seeds, and with tuples as JSON lists."""
    return json.loads(json.dumps(config))


def _array(value):
    return np.asarray(tf.cast(tf.convert_to_tensor(value), tf.float64))
