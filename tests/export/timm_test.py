"""What timm computes from the exported folders."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from harness import randomize

from cappa_tf.models.sizes import variant
from cappa_tf.models.vision_encoder import VisionEncoder

pytest.importorskip("safetensors", reason="pip install '.[interop]'")
from cappa_tf.export import timm

SIZES = {
    "hidden_dim": 16,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_dim": 24,
    "patch_size": 4,
    "image_size": 16,
}

# A process of its own: PyPI's torchvision may be of another build of PyTorch,
# where it cannot be imported, and timm's vision transformer never calls it.
RUN_TIMM = """
import json, sys
from unittest import mock
try:
    import torchvision
except (ImportError, RuntimeError):
    for name in (
        "", ".ops", ".ops.misc", ".transforms", ".transforms.functional",
        ".datasets", ".datasets.folder", ".models",
        ".models.feature_extraction",
    ):
        sys.modules["torchvision" + name] = mock.MagicMock()
import numpy as np
import timm
import torch
from safetensors.torch import load_file

folder = sys.argv[1]
images = torch.from_numpy(np.load(f"{folder}/images.npy"))
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
# Like timm itself, but no weight may be missing or left over.
with open(f"{folder}/config.json") as file:
    config = json.load(file)
byhand = timm.create_model(config["architecture"], **config["model_args"])
byhand.load_state_dict(load_file(f"{folder}/model.safetensors"), strict=True)
with torch.no_grad():
    np.savez(
        f"{folder}/found.npz",
        encoded=model.forward_features(images),
        pre_logits=model(images),
        byhand=byhand.eval()(images),
    )
print(json.dumps(timm.data.resolve_model_data_config(model)))
"""


def make_encoder(**kwargs):
    encoder = VisionEncoder(**{**SIZES, **kwargs})
    encoder.build()
    randomize(encoder)
    return encoder


def images(height=16, width=16):
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, (2, height, width, 3)).astype("float32")


def channels_first(images):
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    "kwargs", [{}, {"patch_size": (4, 8), "image_size": (16, 24)}]
)
def test_timm_gives_the_same_features(kwargs, tmp_path):
    pytest.importorskip("torch", reason="pip install '.[interop]'")
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed (pip install timm)")
    encoder = make_encoder(**kwargs)
    timm.save_timm(encoder, tmp_path)
    batch = images(*encoder.image_size)
    np.save(tmp_path / "images.npy", channels_first(batch))
    result = subprocess.run(
        [sys.executable, "-c", RUN_TIMM, tmp_path],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    found, expected = np.load(tmp_path / "found.npz"), encoder(batch)
    for name in ("encoded", "pre_logits"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5)
    np.testing.assert_array_equal(found["byhand"], found["pre_logits"])
    data = json.loads(result.stdout)
    assert data["input_size"] == [3, *encoder.image_size]
    assert data["mean"] == data["std"] == [0.5, 0.5, 0.5]
    assert (data["crop_mode"], data["crop_pct"]) == ("squash", 1.0)
    assert data["interpolation"] == "bilinear"


@pytest.mark.parametrize("size", ["Ti", "S", "M", "B", "L", "So400m"])
def test_timm_finds_the_width_of_the_mlp(size):
    sizes = variant(f"{size}/14")
    config = timm.timm_config(VisionEncoder(**sizes))
    ratio = config["model_args"]["mlp_ratio"]
    assert int(sizes["hidden_dim"] * ratio) == sizes["mlp_dim"]


@pytest.mark.parametrize(
    ("kwargs", "received"),
    [
        ({"pooling": "map"}, "pooling='map'"),
        ({"num_classes": 5}, "EncoderWithHead"),
    ],
)
def test_what_it_cannot_hold_is_named(kwargs, received, tmp_path):
    encoder = VisionEncoder.from_config({**SIZES, **kwargs})
    with pytest.raises(ValueError, match=received):
        timm.save_timm(encoder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
