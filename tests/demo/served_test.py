"""The demo of a model behind TensorFlow Serving: what its signatures give."""

import pytest

pytest.importorskip("tensorflow_serving", reason="pip install '.[serving]'")

import serving
from demo_client import ask, png, request, running

from cappa_tf.demo.answers import ServedAnswers
from cappa_tf.export import serving_clients

LABELS = ["red circle", "blue, azure", "green"]


@pytest.fixture(scope="module", params=["rest", "grpc"])
def server(served, request):
    client = serving_clients.CLIENTS[request.param](
        getattr(served, request.param), serving.NAME, 60.0
    )
    client.connect()
    with running(ServedAnswers(client, "tiny")) as server:
        yield server


def test_it_offers_what_the_signatures_give(server):
    about = request(server, "/about")[2]
    assert about["caption"]["samplers"] == ["greedy"]
    assert not about["caption"]["words"] and not about["caption"]["attention"]
    assert about["rank"]["labels"] and about["prompt"] is None


def test_answers_are_those_of_the_server(server, served):
    content = png(3)
    status, answer = ask(server, "/caption", content)
    assert status == 200
    (found,) = answer["captions"]
    wanted = served.predict("caption", image_bytes=[content])
    assert found["caption"] == wanted["caption"][0].decode()
    assert found["log_likelihood"] == pytest.approx(
        float(wanted["log_likelihood"][0]), rel=1e-5
    )
    assert found["words"] is None
    status, answer = ask(server, "/rank", content, labels=LABELS)
    wanted = served.predict("score", image_bytes=[content], texts=[LABELS])
    wanted = dict(zip(LABELS, wanted["log_likelihood"][0].tolist()))
    assert status == 200
    for one in answer["labels"]:
        assert one["score"] == pytest.approx(wanted[one["label"]], rel=1e-5)
    ranked = sorted(LABELS, key=lambda label: -wanted[label])
    assert [one["label"] for one in answer["labels"]] == ranked


def test_what_it_does_not_offer_is_refused(server):
    for options, message in (
        ({"sampler": "beam"}, "greedily only"),
        ({"prompt": "caption:"}, "without prompts"),
    ):
        status, answer = ask(server, "/caption", png(), **options)
        assert status == 422 and message in answer["error"]
    status, answer = ask(server, "/caption", b"\xff\xd8\xff no image")
    assert status == 422 and "decoded" in answer["error"]
    status, answer = ask(server, "/rank", png())
    assert status == 422 and "at least one label" in answer["error"]


class Client:
    """In place of a client of a contrastive model with the softmax loss."""

    def __init__(self, signatures):
        self._signatures = signatures

    def signatures(self):
        return self._signatures

    def predict(self, signature, inputs):
        assert signature == "zero_shot"
        (texts,) = inputs["texts"]
        self.texts = texts
        scores = [1 / (2 + i) for i in range(len(texts))]
        return {"ok": [True], "error": [""], "score": [scores]}


def test_labels_of_a_contrastive_model_become_its_texts():
    client = Client({"zero_shot": ["image_bytes", "texts"], "embed_text": []})
    with running(ServedAnswers(client, "towers")) as server:
        about = request(server, "/about")[2]
        assert about["caption"] is None
        template = about["rank"]["template"]
        status, answer = ask(
            server, "/rank", png(), labels=["Dog!", "cat"], template=template
        )
    assert status == 200 and client.texts == ["a photo of a dog"] + [
        "a photo of a cat"
    ]
    assert answer["labels"][0] == {"label": "Dog!", "score": 0.5, "share": 0.5}


def test_a_model_without_such_signatures_is_refused():
    with pytest.raises(ValueError, match="signature caption, score or"):
        ServedAnswers(Client({"embed": ["image_bytes"]}), "encoder")
