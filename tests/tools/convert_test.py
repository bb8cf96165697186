"""tools/convert.py converts weights from big_vision to Keras and back."""

import clip_jax_parity
import keras
import numpy as np
import numpy_reference as reference
import pytest
import tiny
from absl import flags
from random_contrastive import make_contrastive

from cappa_tf.saving import big_vision
from tools import convert

SIZES = reference.Sizes(image=(8, 12), length=4)


def run(**values):
    """Parses flags like the program and converts."""
    flag_values = flags.FlagValues()
    convert.define_flags(flag_values)
    arguments = [f"--{name.strip('_')}={v}" for name, v in values.items()]
    flag_values(["convert", *arguments])
    return convert.convert(flag_values)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert")
    arrays = reference.random_captioner(SIZES)
    np.savez(folder / "a.npz", **{f"params/{k}": v for k, v in arrays.items()})
    return folder / "a.npz", folder / "a.keras", folder


def test_captioner_there_and_back(paths):
    npz, captioner, folder = paths
    said = run(
        from_="big_vision", input=npz, output=captioner, image_size="8,12"
    )
    assert "captioner" in said and "8 x 12" in said
    run(to="big_vision", input=captioner, output=folder / "b.npz")
    with np.load(npz) as first, np.load(folder / "b.npz") as second:
        assert sorted(first) == sorted(second)
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])
    image, text = reference.random_batch(SIZES)
    model = keras.saving.load_model(captioner)
    with np.load(npz) as arrays:
        p = reference.below(arrays, "params/")
    expected = reference.logits(p, image, text)
    np.testing.assert_allclose(model.logits(image, text), expected, atol=2e-5)


def test_only_the_encoder_and_stacked_blocks(paths):
    npz, _, folder = paths
    encoder = folder / "encoder.keras"
    said = run(
        from_="big_vision",
        input=npz,
        output=encoder,
        image_size="8,12",
        encoder_only=True,
    )
    assert "vision encoder" in said
    run(to="big_vision", input=encoder, output=folder / "c.npz", scan=True)
    with np.load(npz) as first, np.load(folder / "c.npz") as second:
        p = reference.below(reference.below(first, "params/"), "encoder/")
        for name, array in reference.stacked(p).items():
            np.testing.assert_array_equal(array, second[f"params/{name}"])


def test_two_towers_there_and_back(tmp_path):
    npz, model = tmp_path / "a.npz", tmp_path / "a.keras"
    big_vision.save_two_towers(make_contrastive(), npz)
    said = run(from_="big_vision", input=npz, output=model)
    assert "contrastive model" in said and "16 x 16" in said
    run(to="big_vision", input=model, output=tmp_path / "b.npz")
    with np.load(npz) as first, np.load(tmp_path / "b.npz") as second:
        assert sorted(first) == sorted(second)
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])
    run(
        from_="big_vision",
        input=npz,
        output=model,
        image_size=24,
        text_pooling="gap",
        pad_with_eos=False,
    )
    found = keras.saving.load_model(model)
    assert found.vision_encoder.grid == (3, 3)
    assert found.text_encoder.pooling == "gap"
    assert not found.text_encoder.pad_with_eos
    given = {"from_": "big_vision", "input": npz, "output": model}
    said = run(**given, encoder_only=True)
    assert "vision encoder" in said
    with pytest.raises(ValueError, match="--max_length is for captioners"):
        run(**given, max_length=8)
    with pytest.raises(ValueError, match="--text_pooling is for contrastive"):
        run(**given, encoder_only=True, text_pooling="gap")


def test_a_model_that_is_both_is_in_neither_layout(tmp_path):
    model = tiny.make_contrastive_captioner(20)
    model.build()
    model.save(tmp_path / "both.keras")
    given = {"to": "big_vision", "input": tmp_path / "both.keras"}
    with pytest.raises(ValueError, match="captioner or two towers.*both"):
        run(**given, output=tmp_path / "both.npz")
    run(**given, output=tmp_path / "encoder.npz", encoder_only=True)
    big_vision.save_two_towers(model, tmp_path / "towers.npz")
    towers = big_vision.load_two_towers(tmp_path / "towers.npz")
    images = np.zeros((1, 16, 16, 3), np.float32)
    np.testing.assert_allclose(
        towers.embed_images(images), model.embed_images(images), atol=1e-6
    )


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"output": "x.keras"}, "--from"),
        ({"from_": "big_vision", "output": "x.h5"}, "--output"),
        ({"from_": "big_vision", "output": "x.keras", "scan": True}, "--scan"),
        (
            {"to": "big_vision", "output": "x.npz", "image_size": 8},
            "--image_size",
        ),
        (
            {"from_": "big_vision", "output": "x.keras", "image_size": "a"},
            "=a$",
        ),
        ({"from_": "big_vision", "output": "x.keras"}, "missing.npz"),
    ],
)
def test_wrong_flags_are_named(values, named):
    with pytest.raises(ValueError, match=named):
        run(input="missing.npz", **values)


def test_captioner_of_clip_jax(tmp_path):
    arrays, params = clip_jax_parity.read("released")
    clip_jax_parity.write_folder(tmp_path / "model", arrays, params)
    output = tmp_path / "captioner.keras"
    said = run(from_="clip_jax", input=tmp_path / "model", output=output)
    assert "captioner" in said and "8 x 8" in said
    encoded = keras.saving.load_model(output).encode(arrays["image"])
    np.testing.assert_allclose(encoded, arrays["encoded"], atol=2e-5)
    for other, message in (
        ({"max_length": 5}, "--max_length is for files of big_vision"),
        ({"to": "big_vision"}, "must be keras, the other another format"),
    ):
        with pytest.raises(ValueError, match=message):
            run(
                from_="clip_jax",
                input=tmp_path / "model",
                output=output,
                **other,
            )
