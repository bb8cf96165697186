"""LiT: a frozen image tower, and runs on its cached features."""

import pathlib

import numpy as np
import pytest
import small_run
import tiny

from cappa_tf.data.tokenizer import Tokenizer
from cappa_tf.saving.run_folder import load_model

POOL = "vision_encoder/pool"


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))
    small_run.write_data(folder)
    return folder


@pytest.fixture(scope="module", name="encoder")
def _encoder(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("encoder") / "encoder.keras"
    model = _model(folder)
    model.build()
    model.vision_encoder.save(path)
    return str(path)


def _model(folder, pooling="gap", **kwargs):
    size = Tokenizer(folder, small_run.LENGTH).vocabulary_size
    # Were it trained, it would drop.
    kwargs = {"dropout": 0.5, "patch_dropout": 0.5, **kwargs}
    return tiny.make_contrastive(size, pooling=pooling, **kwargs)


def _run(folder, workdir, encoder, **options):
    options = {
        "model": lambda: _model(folder, "map"),
        "initialize_from": encoder,
        "initialize_parts": ["vision_encoder"],
        "frozen_parts": ["vision_encoder"],
        "trained_parts": [POOL],
        "deterministic": False,  # It would last for all tests.
        "total_steps": 6,
        "checkpoint_steps": 3,
        "eval_steps": 3,
        "steps_per_loop": 3,
        "final_evaluation": False,
        **options,
    }
    return small_run.run(folder, workdir, **options)


def test_a_resumed_cached_run_is_an_uncached_one(folder, encoder, tmp_path):
    """With a pooling head that the encoder's file does not have."""
    cached = {"features": "cached", "cache_folder": str(tmp_path / "features")}
    plain, parts = str(tmp_path / "plain"), str(tmp_path / "parts")
    _run(folder, plain, encoder)
    _run(folder, parts, encoder, **cached, total_steps=3)
    # The features are there, and the weights in the checkpoint.
    pathlib.Path(encoder).rename(tmp_path / "gone.keras")
    _run(folder, parts, encoder, **cached)
    (tmp_path / "gone.keras").rename(encoder)
    weights = [small_run.saved(workdir, 6) for workdir in (plain, parts)]
    for name, value in weights[0].items():
        np.testing.assert_allclose(weights[1][name], value, atol=1e-5)
    for tag in ("train/loss", "validation/loss"):
        one, other = (small_run.logged(x, tag) for x in (plain, parts))
        assert one and one.keys() == other.keys()
        for step, loss in one.items():
            assert other[step] == pytest.approx(loss, rel=1e-5)
    log = (tmp_path / "parts" / "train.log").read_text()
    assert "frozen except pool" in log
    assert log.count("37 computed in") == 1 and log.count("read from") == 2
    # All of it is in the file, and what was frozen is what was read.
    blocks = [load_model(x).vision_encoder.blocks[0] for x in (plain, parts)]
    source = load_model(encoder).blocks[0]
    for block in blocks:
        for one, other in zip(block.weights, source.weights, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frozen_parts": []}, "trained_parts.*frozen_parts"),
        (
            {"frozen_parts": [], "trained_parts": []},
            r"FROZEN_PARTS=\['vision_encoder'\]",
        ),
        (
            {"trained_parts": ["vision_encoder/encoder_norm"]},
            "needs a frozen vision encoder.*encoder_norm",
        ),
    ],
)
def test_what_is_not_frozen_cannot_be_cached(
    folder, encoder, tmp_path, options, message
):
    with pytest.raises(ValueError, match=message):
        _run(folder, tmp_path, encoder, features="cached", **options)
    assert not [*tmp_path.iterdir()]


def test_augmented_images_cannot_be_cached(folder, encoder, tmp_path):
    data = small_run.data(folder, flip=True)
    with pytest.raises(ValueError, match="unset FLIP, train/CaptionDataset"):
        _run(folder, tmp_path, encoder, features="cached", train_data=data)
    with pytest.raises(ValueError, match="FEATURES.*Received: BagOfTokens"):
        _run(
            folder,
            tmp_path,
            encoder,
            features="cached",
            trained_parts=[],
            model=lambda: tiny.make_bag_of_tokens(40),
        )


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ({"patch_size": 16}, {}, r"patch_size.*\(8, 8\).*\(16, 16\)"),
        ({"num_heads": 4}, {}, "num_heads.*2 in the file, 4 in the model"),
        ({"pooling": "tok"}, {"trained_parts": []}, "pooling.*gap.*tok"),
        # Its head is not trained, so it must be there.
        ({"pooling": "map"}, {"trained_parts": []}, "pooling.*gap.*map"),
    ],
    ids=str,
)
def test_another_image_tower_is_refused(
    folder, encoder, tmp_path, sizes, options, message
):
    if "pooling" not in sizes:
        sizes = {"pooling": "map", **sizes}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        _run(
            folder,
            tmp_path,
            encoder,
            model=lambda: _model(folder, **sizes),
            **options,
        )
