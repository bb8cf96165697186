"""The demo over a real connection: answers, bad input, other sites."""

import base64
import concurrent.futures
import dataclasses
import io
import re
import time

import keras
import numpy as np
import pytest
import scoring
from conftest import ROOT
from demo_client import ask, png, request, running
from PIL import Image

from cappa_tf.demo.answers import ModelAnswers
from cappa_tf.demo.server import DemoServer
from cappa_tf.inference.predictor import Predictor
from cappa_tf.models.classifier import Classifier
from cappa_tf.models.vision_encoder import VisionEncoder
from cappa_tf.presets import Pretrained

LABELS = ["red circle", "blue square", "green"]
MOST_BYTES = 100_000


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return tmp_path_factory.mktemp("vocabulary")


@pytest.fixture(scope="module")
def captioner(vocabulary):
    keras.utils.set_random_seed(0)
    return Pretrained(scoring.tiny_predictor(vocabulary, batch_size=8))


@pytest.fixture(scope="module")
def server(captioner):
    with running(ModelAnswers(captioner), max_bytes=MOST_BYTES) as server:
        yield server


def test_it_says_what_the_model_can(server):
    status, _, about = request(server, "/about")
    assert status == 200
    assert about["caption"] == {
        "samplers": ["greedy", "beam", "top_p"],
        "words": True,
        "attention": True,
    }
    assert about["rank"]["labels"] and about["prompt"] is None
    assert about["max_bytes"] == MOST_BYTES


def test_a_caption_has_words_with_probabilities_and_maps(server, captioner):
    content = png()
    status, answer = ask(server, "/caption", content, name="a.png")
    assert status == 200
    (found,) = answer["captions"]
    image = captioner.predictor.preprocessing.read_bytes(content)
    (row,) = captioner.predictor.decoder.decode(image[None], ["a.png"])
    assert found["caption"] == row.caption
    assert found["log_likelihood"] == pytest.approx(row.log_likelihood, 1e-4)
    words = found["words"]
    assert [one["word"] for one in words] == row.caption.split()
    # Words and the end make up the whole caption.
    product = np.prod([one["probability"] for one in words])
    product *= 1.0 if found["end"] is None else found["end"]
    assert np.log(product) == pytest.approx(row.log_likelihood, rel=1e-3)
    kind, _, data = words[0]["heat"].partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as heat:
        opacity = np.asarray(heat)[..., 3]
        assert heat.mode == "RGBA" and max(heat.size) == 112
        assert 0 <= opacity.min() < opacity.max() <= 255 * 0.75
    assert answer["part"] == [0.0, 0.0, 1.0, 1.0]
    assert answer["preview"] is None


def test_beams_and_samples(server):
    beam = {"sampler": "beam", "sampling": {"beams": 2}, "num_captions": 2}
    status, answer = ask(server, "/caption", png(), **beam)
    assert status == 200 and len(answer["captions"]) == 2
    sampled = {"sampler": "top_p", "sampling": {"temperature": 3, "top_p": 1}}
    texts = [
        ask(server, "/caption", png(), **sampled, seed=seed, name="a.png")[1]
        for seed in (1, 1, 2, 3)
    ]
    first, again, *others = (str(x["captions"][0]["caption"]) for x in texts)
    assert first == again and {*others} != {first}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sampler": "best"}, "sampler"),
        ({"sampler": "beam", "sampling": {"top_p": 0.5}}, "beam uses"),
        ({"sampler": "top_p", "sampling": {"top_p": 0}}, "`p`"),
        ({"num_captions": 3}, "as many beams"),
        ({"num_captions": 99}, "from 0 to 8. Received: num_captions=99"),
        ({"prompt": "caption:"}, "trained without prompts"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_what_the_model_cannot_do_is_said(server, options, message):
    """Among them a prompt, of which this model was taught none."""
    status, answer = ask(server, "/caption", png(), **options)
    assert status == 422 and message in answer["error"]


def test_labels_are_ranked(server, captioner):
    content = png(1)
    status, answer = ask(
        server, "/rank", content, labels=[*LABELS, LABELS[0]], template="{}"
    )
    (wanted,) = captioner.classify([content], LABELS, ["{}"])
    assert status == 200 and answer["kind"] == "log-likelihood in nats"
    assert [one["label"] for one in answer["labels"]] == [*wanted]
    for one in answer["labels"]:
        assert one["score"] == pytest.approx(wanted[one["label"]], rel=1e-4)
    assert sum(one["share"] for one in answer["labels"]) == pytest.approx(1.0)
    status, answer = ask(server, "/rank", content)
    assert status == 422 and "at least one label" in answer["error"]
    status, answer = ask(server, "/rank", content, labels=["a"], template="b")
    assert status == 422 and "{} once" in answer["error"]


def test_a_taught_prompt_is_answered(captioner, monkeypatch):
    monkeypatch.setattr(captioner.model, "prompts", ("red {question}", "left"))
    with running(ModelAnswers(captioner)) as server:
        prompt = request(server, "/about")[2]["prompt"]
        assert prompt["templates"] == ["red {question}", "left"]
        assert prompt["required"]
        status, answer = ask(server, "/caption", png(), prompt="left")
        assert status == 200
        assert answer["captions"][0]["prompt"] == "left"
        status, answer = ask(server, "/rank", png(), labels=LABELS[:1])
        assert status == 422 and "needs one" in answer["error"]
        status, answer = ask(server, "/caption", png(), prompt="up")
        assert status == 422 and "other prompts" in answer["error"]


def test_a_bad_file_is_a_message_for_it_alone(server):
    for content in (b"", b"\xff\xd8\xff no image"):
        status, answer = ask(server, "/caption", content)
        assert status == 422 and answer["error"]
    assert ask(server, "/caption", png())[0] == 200


def test_a_file_that_browsers_do_not_show_comes_back_as_one(server):
    file = io.BytesIO()
    Image.new("RGB", (1200, 300), "red").save(file, "TIFF", compression="jpeg")
    status, answer = ask(server, "/caption", file.getvalue(), preview=True)
    assert status == 200
    data = answer["preview"].removeprefix("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(data))) as shown:
        assert shown.size == (800, 200)


def test_a_map_lies_over_what_the_model_sees(captioner, server, monkeypatch):
    """The middle of an image whose sides are cropped, upright or not."""
    predictor = captioner.predictor
    cropping = dataclasses.replace(
        predictor.preprocessing,
        resize="resize_small_central_crop",
        resize_small=20,
    )
    monkeypatch.setattr(predictor, "preprocessing", cropping)
    image, exif = Image.new("RGB", (40, 80)), Image.Exif()
    exif[0x0112] = 6  # Turned by 90 degrees it is 80 wide and 40 high.
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    answer = ask(server, "/caption", file.getvalue())[1]
    # Resized to 40 x 20, of which 16 x 16 are used.
    np.testing.assert_allclose(answer["part"], [0.3, 0.1, 0.4, 0.8])


def test_too_large_a_file_is_refused(server):
    body = b"{}\n" + bytes(MOST_BYTES + 1)
    status, _, answer = request(server, "/caption", body)
    assert status == 413 and "larger than 0.1 MB" in answer["error"]
    # Refused by its length, but read, so that the answer arrives.
    status, _, answer = request(server, "/caption", bytes(1_500_000))
    assert status == 413 and "larger than 0.1 MB" in answer["error"]


def test_many_at_once_are_answered_in_batches(captioner, server, monkeypatch):
    batches = []
    decoder, waiting = captioner.decoder, server.answers._batches

    def counted(count, **options):
        # The first batch takes so long that others wait.
        while not batches and len(waiting._waiting) < 32 - count:
            time.sleep(0.01)
        batches.append(count)
        return decoder(count, **options)

    monkeypatch.setattr(captioner, "decoder", counted)
    contents = [png(seed) for seed in range(32)]
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        found = list(
            pool.map(lambda one: ask(server, "/caption", one), contents)
        )
    assert [status for status, _ in found] == [200] * 32
    assert sum(batches) == 32 and 1 < max(batches) <= 8
    wanted = captioner.caption(contents)
    assert [one["captions"][0]["caption"] for _, one in found] == wanted


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:8808"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Transfer-Encoding": "chunked", "Content-Length": "3"}, 411),
        # What a browser sends for the page itself.
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200),
        ({"Host": "[::1]:8808"}, 200),
    ],
)
def test_only_its_own_page_may_ask(server, headers, status):
    body = b"{}\n" + png()
    found, _, answer = request(server, "/caption", body, headers)
    assert found == status, answer
    assert ("error" in answer) == (status != 200)


@pytest.mark.parametrize("path", ["/", "/about"])
def test_the_page_is_not_for_other_names(server, path):
    found, _, answer = request(server, path, headers={"Host": "evil.example"})
    assert found == 403 and server.url in answer["error"]


@pytest.mark.parametrize("body", [b"", b"{}", b"[]\n", b"[" * 9999, b"\xff\n"])
def test_a_malformed_request_is_refused(server, body):
    status, _, answer = request(server, "/caption", body)
    assert status == 422 and "line of JSON" in answer["error"]


def test_nothing_else_is_served(server):
    for path in ("/page.html", "/../server.py", "/%2e%2e/server.py", "//x"):
        assert request(server, path)[0] == 404
    assert request(server, "/train", b"{}\n")[0] == 404


def test_the_page_refers_to_no_other_host(server):
    policy = request(server, "/")[1]["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    sources = re.findall(r"(?:'[\w-]+'|\w+:)", policy)
    assert {*sources} <= {"'none'", "'self'", "blob:", "data:"}
    for path in ("/", "/page.css", "/page.js"):
        status, headers, content = request(server, path)
        assert status == 200
        assert headers["X-Content-Type-Options"] == "nosniff"
        # Comments of JavaScript begin with two slashes, too.
        assert not re.search(rb"https?:|url\(|[\"'(=]//|@import", content)
    # Scripts and styles inline would need an exception in the policy.
    page = request(server, "/")[2]
    assert not re.search(rb"<style|<script>|\bon\w+=|style=", page)


def test_a_bug_is_told_apart_from_bad_input(captioner, server, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyError("a secret of the program")

    monkeypatch.setattr(captioner, "decoder", fail)
    status, answer = ask(server, "/caption", png())
    assert status == 500
    assert "secret" not in answer["error"] and "terminal" in answer["error"]


def test_a_contrastive_model_only_ranks(vocabulary):
    predictor = scoring.contrastive_predictor(vocabulary, batch_size=2)
    with running(ModelAnswers(Pretrained(predictor))) as server:
        about = request(server, "/about")[2]
        assert about["caption"] is None and about["prompt"] is None
        assert about["rank"]["template"] == "a photo of a {}"
        status, answer = ask(server, "/caption", png())
        assert status == 422 and "captions images" in answer["error"]
        status, answer = ask(server, "/rank", png(), labels=LABELS)
        assert status == 200 and answer["kind"] == "cosine"
        assert len(answer["labels"]) == 3
        status, answer = ask(server, "/rank", png(), labels=["a"], prompt="b")
        assert status == 422 and "without prompts" in answer["error"]


def test_a_classifier_ranks_its_own_classes():
    sizes = {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "mlp_dim": 32}
    encoder = VisionEncoder(patch_size=8, image_size=16, **sizes)
    model = Classifier(encoder, 3)
    model.build()
    predictor = Predictor(model, None, scoring.PREPROCESSING, 1)
    pretrained = Pretrained(predictor, {"classes": ["ant", "bee", "cat"]})
    with running(ModelAnswers(pretrained)) as server:
        rank = request(server, "/about")[2]["rank"]
        assert not rank["labels"] and rank["kind"] == "probability"
        status, answer = ask(server, "/rank", png())
        assert status == 200
        found = {one["label"]: one["score"] for one in answer["labels"]}
        assert {*found} == {"ant", "bee", "cat"}
        assert sum(found.values()) == pytest.approx(1.0, rel=1e-5)
    alone = Pretrained(Predictor(encoder, None, scoring.PREPROCESSING))
    with pytest.raises(ValueError, match="The demo needs a model that can"):
        ModelAnswers(alone)


def test_a_port_in_use_is_one_line(server):
    with pytest.raises(OSError, match=f"port {server.server_port} .* in use"):
        DemoServer(server.server_port)


def test_the_page_is_in_the_folder_that_travels():
    names = {path.name for path in ROOT.glob("cappa_tf/demo/page/*")}
    assert names == {"page.html", "page.css", "page.js"}
