"""The encoder's file opens under every backend, and at another size."""

import importlib.util
import inspect
import json
import os
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT
from harness import randomize
from random_captioner import make_captioner
from random_contrastive import make_contrastive

import cappa_tf
from cappa_tf.export import keras_backbone
from cappa_tf.models.captioner import Captioner
from cappa_tf.models.classification_head import EncoderWithHead
from cappa_tf.models.positions import resample_positions
from cappa_tf.models.stateless_random import example_seeds
from cappa_tf.models.text_decoder import TextDecoder
from cappa_tf.models.vision_encoder import VisionEncoder
from cappa_tf.saving import preset_folder

SIZES = {
    "hidden_dim": 16,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_dim": 24,
    "patch_size": (4, 8),
    "image_size": (16, 24),
}
# A separate process, as for a user, in which TensorFlow may be missing.
OTHER_PROCESS = """
import sys
import numpy as np

backend, folder = sys.argv[1:]
if backend != "tensorflow":
    sys.modules["tensorflow"] = None  # Importing it fails, as if not there.
import cappa_tf
import keras

assert keras.backend.backend() == backend
with np.load(f"{folder}/in.npz") as arrays:
    images, larger = arrays["images"], arrays["larger"]
encoder = keras.saving.load_model(f"{folder}/encoder.keras")
found = {f"plain_{k}": v for k, v in encoder(images).items()}
resized = cappa_tf.load_backbone(f"{folder}/encoder.keras", (24, 40))
found.update({f"resized_{k}": v for k, v in resized(larger).items()})
preset = cappa_tf.load_backbone(f"{folder}/preset")
found.update({f"preset_{k}": v for k, v in preset(images).items()})
dropping = keras.saving.load_model(f"{folder}/dropping.keras")
from cappa_tf.models.stateless_random import example_seeds

seeds = example_seeds(3, np.array([7, 1000], "int32"))
outputs = dropping(images, seeds=seeds, training=True)
found.update({f"dropping_{k}": v for k, v in outputs.items()})
found = {k: keras.ops.convert_to_numpy(v) for k, v in found.items()}
np.savez(f"{folder}/{backend}.npz", **found)
"""

# TensorFlow takes seconds to import, and imports Keras where it can: the
# orders are tried in forks of a process that has TensorFlow alone.
IMPORT_ORDERS = """
import os
import sys
import traceback

folder, *orders = sys.argv[1:]
sys.modules["keras"] = None
import tensorflow

del sys.modules["keras"]
assert not [name for name in sys.modules if name.startswith("keras.")]
for order in orders:
    pid = os.fork()
    if pid == 0:
        try:
            exec(order)
            for name in ("encoder", "captioner", "contrastive"):
                keras.saving.load_model(f"{folder}/{name}.keras")
            print("loaded after", order, flush=True)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0, order
"""


def make_encoder(**kwargs):
    encoder = VisionEncoder(**{**SIZES, **kwargs})
    encoder.build()
    randomize(encoder)
    return encoder


def images(height=16, width=24):
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, (2, height, width, 3)).astype("float32")


def make_captioner_of(encoder):
    sizes = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 24}
    captioner = Captioner(encoder, TextDecoder(20, 8, **sizes))
    captioner.build()
    return captioner


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of two encoders, images, and the encoders' outputs."""
    folder = tmp_path_factory.mktemp("backbone")
    np.savez(folder / "in.npz", images=images(), larger=images(24, 40))
    encoder = make_encoder()
    keras_backbone.save_backbone(encoder, folder / "encoder.keras")
    # The encoder of a whole captioner, whose decoder needs TensorFlow.
    preset_folder.save(
        folder / "preset", make_captioner_of(encoder), {"image_size": [16, 24]}
    )
    dropping = make_encoder(dropout=0.3, patch_dropout=0.5, pooling="map")
    dropping.save(folder / "dropping.keras")
    resized = keras_backbone.rebuilt(encoder, image_size=(24, 40))
    seeds = example_seeds(3, [7, 1000])
    outputs = {
        "plain": encoder(images()),
        "preset": encoder(images()),
        "resized": resized(images(24, 40)),
        "dropping": dropping(images(), seeds=seeds, training=True),
    }
    arrays = {
        f"{model}_{name}": np.asarray(value)
        for model, named in outputs.items()
        for name, value in named.items()
    }
    np.savez(folder / "expected.npz", **arrays)
    make_captioner().save(folder / "captioner.keras")
    make_contrastive().save(folder / "contrastive.keras")
    return folder


def python(code, *arguments, backend="tensorflow"):
    """Runs code in a process with the environment and the project."""
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={
            **os.environ,
            "KERAS_BACKEND": backend,
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "-1",
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_features_are_the_same_under_every_backend(backend, folder):
    """Without TensorFlow if it is not the backend; including dropout."""
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed (pip install '.[interop]')")
    python(OTHER_PROCESS, backend, folder, backend=backend)
    expected = np.load(folder / "expected.npz")
    found = np.load(folder / f"{backend}.npz")
    assert sorted(found) == sorted(expected)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5)


def test_whatever_is_imported_first(folder):
    """With the backend that is always installed, before Keras is imported."""
    orders = [
        "import keras, cappa_tf",
        "import cappa_tf, keras",
        # Half imported when Keras comes and wants the encoder's classes.
        "import cappa_tf.models.attention, keras",
        "import cappa_tf.saving.weights, keras",
        "import cappa_tf.models.losses.cross_entropy, keras",
    ]
    printed = python(IMPORT_ORDERS, folder, *orders)
    assert printed.splitlines() == [f"loaded after {order}" for order in orders]


def test_the_config_names_every_argument():
    parameters = inspect.signature(VisionEncoder.__init__).parameters
    arguments = {*parameters} - {"self", "kwargs"}
    # Those that files of older versions do not have are left out by default.
    newer = {
        "position_embedding": "factorised",
        "position_grid": (4, 4),
        "num_registers": 2,
        "keep_registers": False,
        "style": {"norm": "rms_norm"},
    }
    named = {*VisionEncoder(**SIZES).get_config()}
    assert named == arguments - {*newer} | {
        *("name", "trainable", "dtype", "position_embedding")
    }
    config = VisionEncoder(**{**SIZES, **newer}).get_config()
    assert {*config} == arguments | {"name", "trainable", "dtype"}


def test_what_only_pretraining_needs_stays_behind(tmp_path):
    path = tmp_path / "encoder.keras"
    trained = make_encoder(
        dropout=0.1, patch_dropout=0.5, dtype="mixed_bfloat16"
    )
    keras_backbone.save_backbone(trained, path)
    encoder = cappa_tf.load_backbone(path)
    assert (encoder.dropout, encoder.patch_dropout) == (0.0, 0.0)
    assert encoder.dtype_policy.name == "float32"
    # `fit` passes training=True and no seeds.
    plain, training = encoder(images()), encoder(images(), training=True)
    np.testing.assert_allclose(
        plain["encoded"], training["encoded"], rtol=1e-5, atol=1e-5
    )
    half = cappa_tf.load_backbone(path, dtype="mixed_bfloat16")
    np.testing.assert_array_equal(
        np.asarray(half(images())["encoded"], "float32"),
        np.asarray(trained(images())["encoded"], "float32"),
    )
    assert [file.name for file in tmp_path.iterdir()] == ["encoder.keras"]


@pytest.mark.parametrize("positions", ["learned", "sincos2d"])
def test_another_size_resamples_the_positions_alone(positions):
    encoder = make_encoder(position_embedding=positions)
    # As many patches, 3 x 4 in place of 4 x 3: still another grid.
    resized = keras_backbone.rebuilt(encoder, image_size=(12, 32))
    assert resized.image_size == (12, 32)
    old, new = encoder.get_weights(), resized.get_weights()
    changed = [i for i, (a, b) in enumerate(zip(old, new)) if (a != b).any()]
    if positions == "sincos2d":
        assert changed == []
    else:
        (i,) = changed
        expected = resample_positions(old[i], (3, 4), (4, 3))
        np.testing.assert_array_equal(new[i], expected)
    resized(images(12, 32))


def test_what_is_no_encoder_is_named(tmp_path):
    path = tmp_path / "other.keras"
    keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]).save(path)
    with pytest.raises(ValueError, match=r"other\.keras.*Sequential"):
        cappa_tf.load_backbone(path)


def test_a_saved_model_of_keras(folder, tmp_path):
    """`Model.export` needs no signature, as the image size is known."""
    encoder = make_encoder()
    encoder.export(str(tmp_path / "exported"), verbose=False)
    exported = tf.saved_model.load(str(tmp_path / "exported"))
    served = exported.serve(images())
    for name, value in encoder(images()).items():
        np.testing.assert_allclose(served[name], value, atol=1e-6)


def test_an_encoder_with_a_head_as_version_0_1_0_saved_it(tmp_path):
    """Its layers were among those of the encoder."""
    old = EncoderWithHead(rep_size=6, num_classes=5, **SIZES)
    old.build()
    randomize(old)
    old.save(tmp_path / "new.keras")
    with (
        zipfile.ZipFile(tmp_path / "new.keras") as new,
        zipfile.ZipFile(tmp_path / "old.keras", "w") as file,
    ):
        for name in new.namelist():
            content = new.read(name)
            if name == "config.json":
                config = json.loads(content)
                config["class_name"] = "VisionEncoder"
                config["registered_name"] = "cappa_tf>VisionEncoder"
                content = json.dumps(config)
            file.writestr(name, content)
    loaded = keras.saving.load_model(tmp_path / "old.keras")
    for name, value in old(images()).items():
        np.testing.assert_array_equal(loaded(images())[name], value)
    assert loaded(images())["logits"].shape == (2, 5)


def test_a_size_that_does_not_fit_is_named(folder):
    path = folder / "encoder.keras"
    with pytest.raises(ValueError, match=r"image_size=\(16, 20\)"):
        cappa_tf.load_backbone(path, (16, 20))
