"""Captioners of clip-jax give its numbers, and are captioners like any other.

Two references: arrays of clip-jax itself (if they are available) and golden
arrays of this project (testdata/make_clip_jax_golden.py).
"""

import json

import clip_jax_parity as parity
import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import shared_reference
from parity import MODES

from cappa_tf.export import big_vision, clip_jax, timm
from cappa_tf.models.block_style import BlockStyle
from cappa_tf.models.captioner import Captioner
from cappa_tf.models.vision_encoder import VisionEncoder
from cappa_tf.saving.weights import rebuilt


@pytest.fixture(scope="module", params=parity.NAMES)
def golden(request):
    """(arrays, weights, captioner) of one structure."""
    arrays, params = parity.read(request.param)
    return arrays, params, parity.load(arrays, params)


def check_parity(arrays, captioner):
    found = parity.predictions(captioner, arrays)
    real = arrays["attention_mask"] == 1
    for name, tolerance in (
        ("encoded", 2e-5),
        ("logits_autoregressive", 2e-5),
        ("logits_parallel", 2e-5),
        ("scores", 1e-4),
    ):
        one, other = found[name], arrays[name]
        if name == "logits_autoregressive":
            one, other = one[real], other[real]
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance)
    np.testing.assert_array_equal(found["greedy"], arrays["greedy"])
    probability = captioner.masked_pred_prob
    found = parity.gradients(captioner, arrays)
    captioner.masked_pred_prob = probability
    for mode in MODES:
        loss = float(arrays[f"loss_{mode}"])
        assert float(found[f"loss_{mode}"]) == pytest.approx(loss, rel=1e-5)
        parity.check_gradients(found, arrays, mode)


def test_golden_arrays(golden):
    check_parity(golden[0], golden[2])


@pytest.mark.parametrize("name", parity.NAMES)
def test_arrays_of_clip_jax(name):
    arrays, params = parity.read(name, shared_reference("clipjax_tiny.npz"))
    check_parity(arrays, parity.load(arrays, params))
    if "other_size/image" in arrays:
        image = arrays["other_size/image"]
        other = parity.load(arrays, params, image_size=image.shape[1:3])
        np.testing.assert_allclose(
            other.encode(image), arrays["other_size/encoded"], atol=2e-5
        )


def test_another_size_of_the_image_with_the_same_weights(golden):
    arrays, params, captioner = golden
    other = parity.load(arrays, params, image_size=(12, 16))
    again = rebuilt(captioner.vision_encoder, image_size=(12, 16))
    image = np.random.default_rng(1).normal(size=(1, 12, 16, 3))
    encoded = other.encode(image)
    assert encoded.shape == (1, 3 * 4 + 2, 8)
    np.testing.assert_allclose(again(image)["encoded"], encoded, atol=1e-6)


def test_pooling_leaves_registers_out(golden):
    outputs = golden[2].vision_encoder(golden[0]["image"])
    patches = outputs["encoded"][:, :4]
    np.testing.assert_allclose(
        outputs["pre_logits"], np.mean(patches, axis=1), atol=1e-6
    )
    config = {**golden[2].vision_encoder.get_config(), "keep_registers": False}
    short = VisionEncoder.from_config(config)
    short.build()
    assert short(golden[0]["image"])["encoded"].shape == (3, 4, 8)
    assert short.output_shapes()["encoded"] == (4, 8)


def check_greedy(captioner, image, found, prompts):
    """Each token is the most probable one of a pass without a cache."""
    special = captioner.text_decoder.special_tokens
    labels = np.concatenate([prompts, found], axis=1)
    logits = captioner.logits(image, labels).numpy()
    logits[..., special.pad] = -np.inf
    best = logits.argmax(-1)[:, prompts.shape[1] :]
    real = found != special.pad
    assert real.any()
    np.testing.assert_array_equal(found[real], best[real])


def test_cached_captions_are_those_of_whole_passes(golden):
    image, captioner = golden[0]["image"], golden[2]
    found = captioner.generate(image)["tokens"].numpy()
    check_greedy(captioner, image, found, np.zeros((3, 0), np.int32))
    prompts = np.array([[7], [5], [9]], np.int32)
    found = captioner.generate(image, max_length=4, prompts=prompts)
    check_greedy(captioner, image, found["tokens"].numpy(), prompts)
    # A padded prompt: the rotation is that of its position, not of its place
    # in the cache.
    prompts = np.array([[7, 3, 3], [5, 6, 8], [9, 5, 3]], np.int32)
    mixed = captioner.generate(image, max_length=2, prompts=prompts)["tokens"]
    for i, prompt in enumerate(prompts):
        alone = captioner.generate(
            image[i : i + 1],
            max_length=2,
            prompts=prompt[None, : np.sum(prompt != 3)],
        )["tokens"]
        np.testing.assert_array_equal(mixed[i : i + 1], alone)


def test_scores_of_prefix_trees_are_those_of_whole_passes(golden):
    arrays, captioner = golden[0], golden[2]
    labels = parity.labels_of(arrays["score_input_ids"])
    logits = captioner.logits(
        np.repeat(arrays["image"], len(labels), axis=0),
        np.tile(labels, (3, 1)),
    )
    log_probs = tf.nn.log_softmax(logits)
    tokens = np.tile(labels, (3, 1))
    chosen = tf.gather(log_probs, tokens, batch_dims=2)
    sums = tf.reduce_sum(tf.where(tokens != 3, chosen, 0.0), axis=1)
    found = captioner.score(arrays["image"], labels)
    np.testing.assert_allclose(
        found, np.reshape(sums, (3, 3)), rtol=0, atol=2e-5
    )


def test_remat_gives_the_same_gradients():
    arrays, params = parity.read("released")
    captioner = parity.load(arrays, params)
    for part in captioner.parts.values():
        part.remat = True
    for name, value in parity.gradients(captioner, arrays).items():
        np.testing.assert_allclose(value, arrays[name], atol=1e-5)


def test_saved_and_loaded(golden, tmp_path):
    arrays, _, captioner = golden
    json.dumps(captioner.get_config())
    path = tmp_path / "captioner.keras"
    captioner.save(path)
    loaded = keras.models.load_model(path)
    assert type(loaded) is Captioner
    labels = parity.labels_of(arrays["input_ids"])
    np.testing.assert_array_equal(
        loaded.logits(arrays["image"], labels),
        captioner.logits(arrays["image"], labels),
    )
    assert loaded.text_decoder.style == captioner.text_decoder.style


def test_mixed_precision_stays_close():
    arrays, params = parity.read("released")
    policy = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy("mixed_bfloat16")
        mixed = parity.load(arrays, params)
    finally:
        keras.config.set_dtype_policy(policy)
    labels = parity.labels_of(arrays["input_ids"])
    found = np.asarray(mixed.logits(arrays["image"], labels))
    expected = arrays["logits_autoregressive"]
    real = arrays["attention_mask"] == 1
    difference = np.linalg.norm((found - expected)[real])
    assert difference < 0.03 * np.linalg.norm(expected[real])


def test_formats_of_other_models_refuse_it(golden, tmp_path):
    captioner = golden[2]
    with pytest.raises(ValueError, match="default block style"):
        big_vision.save_captioner(captioner, tmp_path / "a.npz")
    assert not any(tmp_path.iterdir())


def test_timm_refuses_it(golden, tmp_path):
    pytest.importorskip("safetensors", reason="pip install '.[interop]'")
    with pytest.raises(ValueError, match="default block style"):
        timm.save_timm(golden[2].vision_encoder, tmp_path / "b")
    assert not any(tmp_path.iterdir())


# Checkpoint folders.


@pytest.mark.parametrize("sharded", [False, True])
def test_folders(golden, tmp_path, sharded):
    arrays, params, captioner = golden
    names = [n for n in params if n.endswith("kernel")] if sharded else []
    step = parity.write_folder(tmp_path / "model", arrays, params, names).parent
    for path in (tmp_path / "model", step, step / "default"):
        found = clip_jax.load_captioner(path)
        for one, other in zip(found.weights, captioner.weights, strict=True):
            np.testing.assert_array_equal(one, other)
    assert clip_jax.is_clip_jax(tmp_path / "model")
    assert not clip_jax.is_clip_jax(step)


def test_folder_of_clip_jax():
    path = shared_reference("clipjax_orbax")
    for module in ("msgpack", "tensorstore"):
        parity.optional(module)
    arrays, _ = parity.read("released", shared_reference("clipjax_tiny.npz"))
    found = clip_jax.load_captioner(path).encode(arrays["image"])
    np.testing.assert_allclose(found, arrays["encoded"], atol=2e-5)


# Bad input.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ln_type": "postln"}, 'ln_type is "postln", not "normformer"'),
        ({"use_bias": True}, "use_bias is true, not false"),
        ({"hidden_size": None}, "hidden_size is null, not a positive int"),
        ({"use_rmsnorm": ...}, "use_rmsnorm is missing"),
    ],
)
def test_unknown_configurations(golden, change, message):
    config = parity.clip_jax_config(golden[0])
    for name, value in change.items():
        del config["vision_config"][name]
        if value is not ...:
            config["vision_config"][name] = value
    with pytest.raises(ValueError, match=message):
        clip_jax.load_captioner(golden[1], config)


def test_wrong_arrays_are_all_named(golden):
    arrays, params, _ = golden
    params = dict(params)
    del params["text/logits/bias"]
    params["vision/more"] = np.zeros(3)
    params["vision/embeddings/registers"] = np.zeros((1, 3, 8))
    with pytest.raises(ValueError) as error:
        parity.load(arrays, params)
    message = str(error.value)
    for line in (
        "Missing (1):\n - text/logits/bias (12,)",
        "Extra (1):\n + vision/more (3,)",
        " ! vision/embeddings/registers expected (1, 2, 8), found (1, 3, 8)",
    ):
        assert line in message
    with pytest.raises(ValueError, match="need `config`"):
        clip_jax.load_captioner(params)


def test_half_folders(golden, tmp_path):
    arrays, params, _ = golden
    with pytest.raises(ValueError, match="must be a folder with the file"):
        clip_jax.load_captioner(tmp_path)
    default = parity.write_folder(tmp_path / "model", arrays, params)
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"needs its config\.json"):
        clip_jax.load_captioner(tmp_path / "model")
    config = parity.clip_jax_config(arrays)
    # An array that only TensorStore's files, which are missing, could hold.
    key = str(("params", "text", "more", "value"))
    metadata = {"tree_metadata": {key: {}}, "use_zarr3": False}
    (default / "_METADATA").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=r"it has no manifest\.ocdbt"):
        clip_jax.load_captioner(tmp_path / "model", config)
    (default / "_METADATA").write_text("[]")
    with pytest.raises(ValueError, match="Orbax' description"):
        clip_jax.load_captioner(tmp_path / "model", config)
    (default / "_METADATA").unlink()
    (default / "checkpoint").write_bytes(b"\x93\x01")
    with pytest.raises(ValueError, match="must be a msgpack file of flax"):
        clip_jax.load_captioner(tmp_path / "model", config)


# The variations by themselves.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "batch_norm"}, "`norm` must be one of"),
        ({"activation": "tanh"}, "`activation` must be one of"),
        ({"gated_mlp": 1}, "`gated_mlp`"),
    ],
)
def test_wrong_styles(arguments, message):
    with pytest.raises(ValueError, match=message):
        BlockStyle(**arguments)
    with pytest.raises(ValueError, match=message):
        VisionEncoder(8, 1, num_heads=2, mlp_dim=8, style=arguments)


def test_unknown_field_of_a_style():
    with pytest.raises(ValueError, match="must be None, a BlockStyle or"):
        BlockStyle.of({"norms": "rms_norm"})
    with pytest.raises(ValueError, match="is for factorised and sincos2d"):
        VisionEncoder(8, 1, num_heads=2, mlp_dim=8, position_grid=2)


def test_configuration_of_the_default_is_as_it_was():
    config = VisionEncoder(8, 1, num_heads=2, mlp_dim=8).get_config()
    names = {"style", "position_grid", "num_registers", "keep_registers"}
    assert not names & config.keys()
