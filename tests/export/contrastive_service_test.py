"""A SavedModel of two towers answers like the model, whatever it is sent."""

import io

import numpy as np
import pytest
import tensorflow as tf
import tiny
from PIL import Image
from random_contrastive import make_contrastive
from tensorflow.core.protobuf import saved_model_pb2

pytest.importorskip("tensorflow_serving", reason="pip install '.[serving]'")
from cappa_tf.data.preprocessing import ImagePreprocessing
from cappa_tf.data.tokenizer import Tokenizer
from cappa_tf.export import request_images, saved_model, serving_files

LABELS = ["red circle", "blue square", "", "green left"]


def png(seed):
    pixels = np.random.default_rng(seed).integers(256, size=(20, 30, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.astype("uint8")).save(file, "PNG")
    return file.getvalue()


IMAGES = [png(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path, _ = tiny.vocabulary(tmp_path_factory.mktemp("vocabulary"))
    return Tokenizer(path, max_length=6)


def make_service(tokenizer, bias):
    """A model with the sigmoid loss if it has a bias, and its service."""
    model = make_contrastive(vocabulary=tokenizer.vocabulary_size, bias=bias)
    service = saved_model.ContrastiveService(
        model,
        tokenizer,
        ImagePreprocessing(16),
        max_batch_size=5,
        max_texts=150,
    )
    return model, service


@pytest.fixture(scope="module")
def served(tokenizer, tmp_path_factory):
    """(model, the loaded SavedModel, its folder)."""
    model, service = make_service(tokenizer, bias=False)
    folder = tmp_path_factory.mktemp("served")
    path = saved_model.export_saved_model(folder, service)
    return model, tf.saved_model.load(path), folder


def ask(loaded, signature, **inputs):
    inputs = {k: tf.constant(v, tf.string) for k, v in inputs.items()}
    answer = loaded.signatures[signature](**inputs)
    return {name: value.numpy() for name, value in answer.items()}


def decoded():
    """Pixels uint8 [3, 16, 16, 3] of IMAGES."""
    preprocessing = ImagePreprocessing(16)
    return tf.stack([preprocessing.decode(tf.constant(x)) for x in IMAGES])


def embeddings(model, tokenizer):
    """Those of IMAGES and of LABELS, by the model itself."""
    pixels = tf.cast(decoded(), tf.float32) / 127.5 - 1.0
    return model.embed_images(pixels), model.embed_texts(tokenizer(LABELS))


def test_answers_are_the_models(served, tokenizer):
    model, loaded, _ = served
    images, texts = embeddings(model, tokenizer)
    found = ask(loaded, "embed_image", image_bytes=IMAGES)
    np.testing.assert_allclose(found["embedding"], images, atol=1e-5)
    found = ask(loaded, "embed_text", texts=LABELS)
    np.testing.assert_allclose(found["embedding"], texts, atol=1e-5)
    assert found["ok"].all()
    found = ask(loaded, "zero_shot", image_bytes=IMAGES, texts=[LABELS])
    similarity = images @ tf.transpose(texts)
    np.testing.assert_allclose(found["similarity"], similarity, atol=1e-5)
    scale, _ = model.contrastive_head.scale_and_bias
    expected = tf.nn.softmax(scale * similarity)
    np.testing.assert_allclose(found["score"], expected, atol=1e-4)


@pytest.fixture
def decoding_at_once(monkeypatch):
    """The graph that decodes images takes long to build."""
    monkeypatch.setattr(
        request_images,
        "decode_request",
        lambda *_: (decoded(), tf.constant([""] * len(IMAGES))),
    )


def test_the_score_of_a_sigmoid_loss_is_each_labels_own(
    tokenizer, decoding_at_once
):
    model, service = make_service(tokenizer, bias=True)
    found = service.zero_shot(tf.constant(IMAGES), tf.constant([LABELS]))
    logits = model.contrastive_head.logits(*embeddings(model, tokenizer))
    expected = tf.sigmoid(logits)
    np.testing.assert_allclose(found["score"], expected, atol=1e-4)


def test_own_labels_in_any_order_and_number(served):
    """A row's answer is its own, whatever a server put beside it."""
    _, loaded, _ = served
    alone = ask(loaded, "zero_shot", image_bytes=IMAGES[:1], texts=[LABELS])
    # A server fills up the fewer labels of a request by repeating one.
    own = [LABELS + LABELS[:1] * 2, [f"{x} red" for x in "abcdef"]]
    found = ask(loaded, "zero_shot", image_bytes=IMAGES[:2], texts=own)
    for name in ("score", "similarity"):
        np.testing.assert_allclose(
            found[name][0, :4], alone[name][0], atol=1e-5
        )
        np.testing.assert_array_equal(found[name][0, 4], found[name][0, 0])
    # More different labels than a pass embeds.
    words = ["red", "green", "blue", "circle", "square"]
    many = [f"{a} {b} {c}" for a in words for b in words for c in words]
    found = ask(loaded, "zero_shot", image_bytes=IMAGES[:1], texts=[many])
    few = ask(loaded, "zero_shot", image_bytes=IMAGES[:1], texts=[many[-3:]])
    np.testing.assert_allclose(
        found["similarity"][:, -3:], few["similarity"], atol=1e-5
    )


def test_what_is_bad_is_flagged_and_the_others_answered(served):
    _, loaded, _ = served
    good = ask(loaded, "zero_shot", image_bytes=IMAGES, texts=[LABELS])
    images = [IMAGES[0], b"text in place of bytes", IMAGES[2]]
    found = ask(loaded, "zero_shot", image_bytes=images, texts=[LABELS])
    assert found["ok"].tolist() == [True, False, True]
    assert found["error"][1].startswith(b"image_bytes: not a JPEG")
    for name in ("score", "similarity"):
        assert not found[name][1].any()
        np.testing.assert_allclose(
            found[name][[0, 2]], good[name][[0, 2]], atol=1e-5
        )
    texts = [["red", b"caf\xe9"], ["red", "caf\u00e9"]]
    found = ask(loaded, "zero_shot", image_bytes=IMAGES[:2], texts=texts)
    assert found["ok"].tolist() == [False, True]
    found = ask(loaded, "embed_text", texts=texts[0])
    assert found["error"].tolist() == [b"", b"texts: a text is not UTF-8"]
    assert not found["embedding"][1].any() and found["embedding"][0].any()


@pytest.mark.parametrize(
    ("signature", "inputs", "name"),
    [
        ("embed_image", {"image_bytes": []}, "image_bytes"),
        ("embed_text", {"texts": []}, "texts"),
        ("embed_text", {"texts": ["a"] * 6}, "1 to 5 texts"),
        ("zero_shot", {"image_bytes": IMAGES, "texts": [["a"]] * 2}, "texts"),
        ("zero_shot", {"image_bytes": IMAGES, "texts": [["a"] * 151]}, "texts"),
    ],
)
def test_a_malformed_request_names_the_input(served, signature, inputs, name):
    with pytest.raises(tf.errors.InvalidArgumentError, match=name):
        ask(served[1], signature, **inputs)


def test_a_server_can_run_it(served):
    """Its graph has no op of XLA, and its warm-up requests are answered."""
    _, loaded, folder = served
    graph = (folder / "1" / "saved_model.pb").read_bytes()
    (meta,) = saved_model_pb2.SavedModel.FromString(graph).meta_graphs
    functions = meta.graph_def.library.function
    nodes = [*meta.graph_def.node, *(n for f in functions for n in f.node_def)]
    assert not [node.op for node in nodes if node.op.startswith("Xla")]
    from tensorflow_serving.apis import prediction_log_pb2

    file = folder / "1" / serving_files.WARMUP
    signatures = set()
    for record in tf.data.TFRecordDataset(str(file)):
        log = prediction_log_pb2.PredictionLog.FromString(record.numpy())
        request = log.predict_log.request
        assert request.model_spec.name == "contrastive"
        name = request.model_spec.signature_name
        signatures.add(name)
        if name == "serving_default":
            continue  # It is embed_image.
        inputs = {k: tf.make_ndarray(v) for k, v in request.inputs.items()}
        assert ask(loaded, name, **inputs)["ok"][0]
    assert signatures == {*loaded.signatures}


def test_a_captioner_with_a_text_tower_has_all_signatures(
    tokenizer, decoding_at_once
):
    model = tiny.make_contrastive_captioner(tokenizer.vocabulary_size)
    model.build()
    make = saved_model.service_class(model)
    service = make(model, tokenizer, ImagePreprocessing(16), max_length=3)
    names = ["caption", "score", "embed", "embed_image", "embed_text"]
    assert [*service.functions()] == [*names, "zero_shot"]
    weights = {id(weight) for weight in service.weights}
    assert len(weights) == len(model.weights)
    images, texts = embeddings(model, tokenizer)
    found = service.zero_shot(tf.constant(IMAGES), tf.constant([LABELS]))
    similarity = images @ tf.transpose(texts)
    np.testing.assert_allclose(found["similarity"], similarity, atol=1e-5)
    for other, kind in (
        (make_contrastive(), saved_model.ContrastiveService),
        (tiny.make_model(40), saved_model.CaptionService),
    ):
        assert saved_model.service_class(other) is kind


def test_texts_longer_than_the_model_reads_are_refused(tokenizer):
    longer = Tokenizer(tokenizer.path, max_length=7)
    with pytest.raises(ValueError, match="6 tokens.*max_length=7"):
        saved_model.ContrastiveService(
            make_contrastive(vocabulary=tokenizer.vocabulary_size),
            longer,
            ImagePreprocessing(16),
        )
