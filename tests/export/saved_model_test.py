"""A SavedModel answers like the captioner, for any input."""

import concurrent.futures
import os
import time

import numpy as np
import pytest
import random_captioner
import tensorflow as tf
from conftest import shared_data
from PIL import Image

pytest.importorskip("tensorflow_serving", reason="pip install '.[serving]'")

import grpc
import serving

from cappa_tf.data.images import image_files
from cappa_tf.data.preprocessing import ImagePreprocessing
from cappa_tf.export.saved_model import CaptionService
from cappa_tf.inference.captions import CaptionDecoder
from cappa_tf.saving import run_folder

TEXTS = ["red circle", "green", "a longer text than the model can read", ""]


def _png(width, height, pixels=b""):
    """A PNG with a valid size in its header and invalid data after it."""
    header = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0])
    start = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4) + b"IHDR" + header
    return start + pixels


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Files of every format and of many sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.RandomState(0)
    suffixes = ("jpg", "png", "webp", "gif", "bmp")
    for number in range(20):
        height, width = random.randint(5, 80, size=2)
        low = random.randint(256, size=(2, 3, 3)).astype("uint8")
        image = Image.fromarray(low).resize((width, height))
        image.save(folder / f"{number:02d}.{suffixes[number % 5]}")
    # TensorFlow's own decoder would end the server at this one.
    frames = [image.rotate(180)]
    image.save(folder / "moving.webp", save_all=True, append_images=frames)
    with Image.open(folder / "moving.webp") as moving:
        assert moving.n_frames == 2
    return sorted(map(str, folder.iterdir()))


@pytest.fixture(scope="module")
def contents(pictures):
    return [image_files.read(path) for path in pictures]


@pytest.fixture(scope="module")
def captioner(served):
    model = run_folder.load_model(served.run)
    model.tokenizer = run_folder.load_preprocessing(served.run)[0]
    return model


@pytest.fixture(scope="module")
def broken(contents):
    """Bytes that are not a usable image, and their error messages."""
    unknown = "not a JPEG, PNG, GIF, BMP or WebP image"
    undecodable = "image cannot be decoded"
    reasons = {
        b"text in place of bytes": unknown,
        b"": unknown,
        contents[0][: len(contents[0]) // 2]: undecodable,
        _png(40, 40): undecodable,
        _png(60_000, 60_000): "more than 1000000 pixels",
    }
    return {k: f"image_bytes: {reason}" for k, reason in reasons.items()}


def _preprocessing(run):
    return run_folder.load_preprocessing(run)[1]


def _rows_of_the_tool(run, paths):
    """The output of tools/caption.py for each file."""
    captioner = run_folder.load_model(run)
    tokenizer, _ = run_folder.load_preprocessing(run)
    decoder = CaptionDecoder(captioner, tokenizer, 32)
    rows = decoder.caption_files(paths, _preprocessing(run))
    return [row for _, row, _ in rows]


def _same_captions(served, paths, least_distinct):
    rows = _rows_of_the_tool(served.run, paths)
    files = [image_files.read(path) for path in paths]
    for start in range(0, len(paths), 8):
        answer = served.predict("caption", image_bytes=files[start : start + 8])
        for i, row in enumerate(rows[start : start + 8]):
            assert answer["ok"][i] and not answer["error"][i]
            assert answer["caption"][i].decode() == row.caption, row.key
            assert answer["log_likelihood"][i] == pytest.approx(
                row.log_likelihood, abs=1e-3
            )
    assert len({row.caption for row in rows}) >= least_distinct


def test_captions_are_those_of_the_tool(served, pictures):
    _same_captions(served, pictures, least_distinct=8)


def test_captions_of_photos_are_those_of_the_tool(served):
    folder = shared_data("flickr8k/images")
    paths = image_files.find_pictures([str(folder)])[:100]
    _same_captions(served, paths, least_distinct=10)


def test_photos_are_turned(served, tmp_path):
    """Reads like tools/caption.py, which stores a rotated file again."""
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255
    upright, lying = tmp_path / "upright.png", tmp_path / "lying.jpg"
    Image.fromarray(pixels).save(upright)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(np.rot90(pixels).copy())
    turned.save(lying, exif=exif, quality=100)
    contents = [path.read_bytes() for path in (upright, lying)]
    contents.append(contents[1].replace(b"Exif", b"Exit"))
    first, second, third = served.predict("embed", image_bytes=contents)[
        "embedding"
    ]
    np.testing.assert_allclose(second, first, atol=0.05)
    assert np.abs(third - first).max() > 0.2


def test_caption_is_the_default(served, contents):
    named = served.predict("caption", image_bytes=contents[:3])
    default = served.predict("", image_bytes=contents[:3])
    assert named.keys() == default.keys()
    for key, value in named.items():
        if key != "log_likelihood":
            assert value.tolist() == default[key].tolist()


def test_scores_are_the_captioners(served, captioner, pictures, contents):
    preprocessing = _preprocessing(served.run)
    images = np.stack([preprocessing.read(path) for path in pictures[:3]])
    expected = captioner.score(images, TEXTS).numpy()
    shared = served.predict(
        "score",
        name=serving.UNBATCHED,
        image_bytes=contents[:3],
        texts=[TEXTS],
    )
    np.testing.assert_allclose(shared["log_likelihood"], expected, atol=1e-3)
    own = np.array([TEXTS, TEXTS[::-1], TEXTS[2:] + TEXTS[:2]], object)
    answer = served.predict("score", image_bytes=contents[:3], texts=own)
    order = [[0, 1, 2, 3], [3, 2, 1, 0], [2, 3, 0, 1]]
    np.testing.assert_allclose(
        answer["log_likelihood"],
        np.take_along_axis(expected, np.array(order), axis=1),
        atol=1e-3,
    )
    assert answer["ok"].all()


def test_scores_do_not_depend_on_the_passes(served, captioner, contents):
    """More texts than a pass holds, and not a multiple of it."""
    texts = [f"{'red ' * (i % 4)}square" for i in range(70)]
    answer = served.predict("score", image_bytes=contents[:1], texts=[texts])
    few = served.predict("score", image_bytes=contents[:1], texts=[texts[:4]])
    expected = np.tile(few["log_likelihood"], 18)[:, :70]
    np.testing.assert_allclose(answer["log_likelihood"], expected, atol=1e-3)


@pytest.mark.parametrize("ratio", [1.0, (0.0, 1.0)])
def test_a_captioner_trained_in_parallel_scores_so(ratio):
    captioner = random_captioner.make_captioner(
        masked_pred_prob=1.0, masking_ratio=ratio
    )
    size = captioner.vision_encoder.image_size
    service = CaptionService(captioner, None, ImagePreprocessing(size))
    images = random_captioner.make_images()
    labels = np.array([[[5, 7, 1, 0], [9, 1, 0, 0]]] * len(images), np.int32)
    np.testing.assert_allclose(
        service._score(tf.constant(images), tf.constant(labels)),
        captioner.score_own_texts(images, labels, "parallel"),
        rtol=1e-5,
    )


def test_embeddings_are_the_encoders(served, captioner, pictures, contents):
    preprocessing = _preprocessing(served.run)
    images = np.stack([preprocessing.read(path) for path in pictures[:3]])
    expected = captioner.vision_encoder(images)["pre_logits"]
    answer = served.predict("embed", image_bytes=contents[:3])
    np.testing.assert_allclose(answer["embedding"], expected, atol=1e-4)


@pytest.mark.parametrize("signature", ["caption", "score", "embed"])
def test_bad_images_are_flagged_and_the_others_answered(
    served, contents, broken, signature
):
    mixed = [contents[0], *broken, contents[1]]

    def ask(images):
        texts = {"texts": [TEXTS] * len(images)} if signature == "score" else {}
        return served.predict(signature, image_bytes=images, **texts)

    answer, good = ask(mixed), ask(contents[:2])
    assert answer["ok"].tolist() == [True, *[False] * len(broken), True]
    errors = [error.decode() for error in answer["error"]]
    assert errors == ["", *broken.values(), ""]
    for key in good.keys() - {"ok", "error"}:
        ends = answer[key][[0, -1]]
        if key == "caption":
            assert ends.tolist() == good[key].tolist()
        else:
            np.testing.assert_allclose(ends, good[key], atol=1e-3)
        assert not answer[key][1:-1].any()


def test_an_image_alone_may_be_bad(served, broken):
    for content, error in broken.items():
        answer = served.predict("caption", image_bytes=[content])
        assert answer["error"].tolist() == [error.encode()]


def test_a_text_that_is_not_utf8_is_flagged(served, contents):
    texts = np.array([["red", b"caf\xe9"], ["red", "caf\u00e9"]], object)
    answer = served.predict("score", image_bytes=contents[:2], texts=texts)
    assert answer["ok"].tolist() == [False, True]
    assert answer["error"][0] == b"texts: a text is not UTF-8"


MALFORMED = {
    "no image": ("caption", {}, "image_bytes"),
    "none of them": ("caption", {"image_bytes": []}, "image_bytes"),
    "too many": ("embed", {"image_bytes": [b"x"] * 10_000}, "image_bytes"),
    "a bare image": ("caption", {"image_bytes": b"x"}, "image_bytes"),
    "no texts": ("score", {"image_bytes": [b"x"]}, "texts"),
    "no text": ("score", {"image_bytes": [b"x"], "texts": [[]]}, "texts"),
    "too many texts": (
        "score",
        {"image_bytes": [b"x"], "texts": [["a"] * 101]},
        "texts",
    ),
    "texts of another batch": (
        "score",
        {"image_bytes": [b"x"] * 3, "texts": [["a"]] * 2},
        "texts",
    ),
    "texts without a batch": (
        "score",
        {"image_bytes": [b"x"], "texts": ["a"]},
        "texts",
    ),
    "an unknown input": (
        "caption",
        {"image_bytes": [b"x"], "pixels": [b"x"]},
        "pixels",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_request_names_the_input(served, contents, case):
    signature, inputs, name = MALFORMED[case]
    with pytest.raises(grpc.RpcError) as caught:
        served.predict(signature, name=serving.UNBATCHED, **inputs)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert name in caught.value.details()
    # A server that batches may have another message, and must also survive.
    with pytest.raises(grpc.RpcError):
        served.predict(signature, **inputs)
    assert served.is_alive()
    assert served.predict("caption", image_bytes=contents[:1])["ok"].all()


def _answers(served, contents):
    """The answer for each file on its own."""
    return {
        "caption": [
            served.predict("caption", image_bytes=[content])
            for content in contents
        ],
        "embed": [
            served.predict("embed", image_bytes=[content])
            for content in contents
        ],
        "score": [
            served.predict("score", image_bytes=[content], texts=[TEXTS])
            for content in contents
        ],
    }


def _client(served, contents, expected, seed, seconds):
    """Sends requests until a deadline; returns (requests, wrong answers)."""
    random = np.random.RandomState(seed)
    asked, wrong = 0, []
    end = time.monotonic() + seconds
    with grpc.insecure_channel(served.grpc) as channel:
        stub = serving.prediction_service_pb2_grpc.PredictionServiceStub(
            channel
        )
        while time.monotonic() < end:
            signature = random.choice(["caption", "caption", "embed", "score"])
            rows = random.randint(len(contents), size=random.randint(1, 9))
            inputs = {"image_bytes": [contents[row] for row in rows]}
            texts = random.permutation(len(TEXTS))[: random.randint(1, 5)]
            if signature == "score":
                inputs["texts"] = [[TEXTS[t] for t in texts]] * len(rows)
            answer = serving.arrays(
                stub.Predict(
                    serving.predict_request(signature, **inputs), timeout=60
                )
            )
            asked += 1
            for i, row in enumerate(rows):
                right = expected[signature][row]
                if not _is_right(signature, answer, i, right, texts):
                    wrong.append((signature, row, answer))
    return asked, wrong


def _is_right(signature, answer, i, right, texts):
    if answer["ok"][i] != right["ok"][0]:
        return False
    if answer["error"][i] != right["error"][0]:
        return False
    if signature == "embed":
        pair = answer["embedding"][i], right["embedding"][0]
    elif signature == "score":
        # Columns on the right are padding from a batch with more texts.
        got = answer["log_likelihood"][i][: len(texts)]
        pair = got, right["log_likelihood"][0][texts]
    else:
        if answer["caption"][i] != right["caption"][0]:
            return False
        pair = answer["log_likelihood"][i], right["log_likelihood"][0]
    return np.allclose(*pair, atol=1e-3)


@pytest.mark.parametrize(
    "seconds", [4, pytest.param(60, marks=pytest.mark.slow)]
)
def test_concurrent_clients_get_their_own_answers(
    served, contents, broken, seconds
):
    files = [*contents[:10], next(iter(broken))]
    expected = _answers(served, files)
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        results = list(
            pool.map(
                lambda seed: _client(served, files, expected, seed, seconds),
                range(32),
            )
        )
    assert sum(asked for asked, _ in results) >= 64
    assert [wrong for _, some in results for wrong in some] == []
    assert served.is_alive()


def test_a_real_server(contents):
    """Against a real `tensorflow_model_server`, if there is one.

    SERVING_ADDRESS is its gRPC address, SERVING_MODEL the model's name.
    """
    address = os.environ.get("SERVING_ADDRESS")
    if address is None:
        pytest.skip("no real server: set SERVING_ADDRESS=host:port (gRPC)")
    name = os.environ.get("SERVING_MODEL", "captioner")
    with grpc.insecure_channel(address) as channel:
        stub = serving.prediction_service_pb2_grpc.PredictionServiceStub(
            channel
        )

        def ask(signature, **inputs):
            request = serving.predict_request(signature, name, **inputs)
            return serving.arrays(stub.Predict(request, timeout=60))

        images = [contents[0], b"no image", contents[1]]
        answer = ask("caption", image_bytes=images)
        assert answer["ok"].tolist() == [True, False, True]
        assert answer["error"][1].startswith(b"image_bytes: ")
        scores = ask("score", image_bytes=images, texts=[TEXTS] * 3)
        assert scores["log_likelihood"].shape == (3, len(TEXTS))
        assert ask("embed", image_bytes=images)["ok"].tolist()[1] is False
        with pytest.raises(grpc.RpcError):
            ask("caption", image_bytes=[b"x"] * 10_000)
        with pytest.raises(grpc.RpcError, match="image_bytes"):
            ask("caption")
        assert ask("caption", image_bytes=images[:1])["ok"].all()
