"""The stand-in refuses what tensorflow_model_server refuses by default."""

import json
import os
import shutil
import threading
import time
import urllib.request

import numpy as np
import pytest
import tensorflow as tf

pytest.importorskip("tensorflow_serving", reason="pip install '.[serving]'")

import serving
import serving_batching
import serving_rest
import serving_stand_in
from serving_batching import RequestError
from tensorflow.compiler.tf2xla.python.xla import dynamic_update_slice
from tensorflow_serving.apis import prediction_log_pb2

CONFIG = 'model_config_list { config { name: "echo" } }'
ECHO = "/v1/models/echo:predict"


def _write_version(folder, version, warm_up=("a",), function=None):
    """A version of a model that returns its texts.

    Args:
        folder: Of the model.
        version: What the version is called.
        warm_up: Texts, one a request; None is a request without any.
        function: What the texts are put through.
    """

    def echo(texts):
        value = texts if function is None else function(texts)
        sizes = tf.strings.length(texts)[:, 0]
        return {"echo": value, "echo_bytes": texts, "sizes": sizes}

    def forever(texts):
        (size,) = tf.while_loop(
            lambda size: size >= 0, lambda size: [size * 0], [tf.size(texts)]
        )
        return {"sizes": size + tf.strings.length(texts)}

    spec = [tf.TensorSpec([None, None], tf.string, "texts")]
    functions = {
        "serving_default": tf.function(echo, input_signature=spec),
        "scalar": tf.function(
            lambda texts: {"sizes": tf.size(texts)}, input_signature=spec
        ),
        "forever": tf.function(forever, input_signature=spec),
    }
    path = folder / f"incomplete-{version}"
    tf.saved_model.save(tf.Module(), str(path), signatures=functions)
    os.makedirs(path / "assets.extra")
    file = path / "assets.extra" / "tf_serving_warmup_requests"
    with tf.io.TFRecordWriter(str(file)) as writer:
        for text in warm_up:
            log = prediction_log_pb2.PredictionLog()
            inputs = {} if text is None else {"texts": [[text]]}
            log.predict_log.request.CopyFrom(
                serving.predict_request("serving_default", "echo", **inputs)
            )
            writer.write(log.SerializeToString())
    path.rename(folder / version)


def _write_model(folder, **options):
    (folder / "models.config").write_text(CONFIG)
    (folder / "batching_parameters.txt").write_text(
        "max_batch_size { value: 3 }"
    )
    _write_version(folder, "1", **options)
    return folder


@pytest.fixture(scope="module", name="model")
def _model(tmp_path_factory):
    folder = _write_model(tmp_path_factory.mktemp("echo"))
    return serving_stand_in.Model(folder)


def _refused(code, function, *arguments):
    with pytest.raises(RequestError) as caught:
        function(*arguments)
    assert caught.value.code == code
    return str(caught.value)


def _post(model, document, path=ECHO, **options):
    return serving_rest.predict(
        model, path, json.dumps(document).encode(), **options
    )


def _states(served):
    """The error of each version of the served model; "" is available."""
    url = f"http://{served.rest}/v1/models/{serving.NAME}"
    with urllib.request.urlopen(url, timeout=60) as file:
        versions = json.load(file)["model_version_status"]
    return {v["version"]: v["status"]["error_message"] for v in versions}


def test_a_version_with_an_op_of_xla_is_not_served(served, tmp_path):
    """XLA is off in the process with the server's defaults."""

    def function(texts):
        lengths = tf.strings.length(texts)
        lengths = dynamic_update_slice(lengths, lengths[:1, :1], [0, 0])
        return tf.strings.as_string(lengths)

    _write_version(tmp_path, "9", function=function)
    shutil.move(tmp_path / "9", served.model / "9")
    end = time.monotonic() + 120
    while len(states := _states(served)) < 2 and time.monotonic() < end:
        time.sleep(0.2)
    shutil.rmtree(served.model / "9")
    assert states["1"] == ""
    assert "XLA compilation disabled" in states["9"]


@pytest.mark.parametrize(
    ("warm_up", "message"),
    [
        ((None,), "Missing but required: {texts}"),
        ("aaa", "exceeds the maximum"),
    ],
)
def test_warm_up_requests_that_fail_or_are_too_many(
    tmp_path, monkeypatch, warm_up, message
):
    monkeypatch.setattr(serving_stand_in, "MAX_WARMUP_RECORDS", 2)
    folder = _write_model(tmp_path, warm_up=warm_up)
    assert message in _refused(3, serving_stand_in.Model, folder)


def test_the_highest_number_is_served(tmp_path):
    folder = _write_model(tmp_path)
    model = serving_stand_in.Model(folder)
    (folder / "incomplete-12").mkdir()
    model.poll()
    assert model.servable.version == 1
    _write_version(folder, "10", warm_up="ab")
    model.poll()
    assert (model.servable.version, model.servable.warmed_up) == (10, 2)
    (folder / "11").mkdir()
    model.poll()
    assert model.servable.version == 10 and 11 in model.failed
    predict = "/v1/models/echo/versions/{}:predict"
    body = {"instances": [["a"]]}
    assert _post(model, body, predict.format(10))
    assert "Specific(echo, 1)" in _refused(
        5, _post, model, body, predict.format(1)
    )


@pytest.mark.parametrize("name", ["echo", "echo-unbatched"])
def test_requests_end_in_time(model, name):
    """The time is the client's deadline, or the limit of REST."""
    document = {"signature_name": "forever", "instances": [["a"]]}
    path = f"/v1/models/{name}:predict"
    _refused(4, lambda: _post(model, document, path, timeout=0.2))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "Is not object"),
        ({}, "Missing 'inputs' or 'instances' key"),
        ({"inputs": [], "instances": []}, "only one of"),
        ({"signature_name": 1, "inputs": []}, "must be a string"),
        ({"signature_name": "no", "inputs": []}, "not found in signature def"),
        ({"instances": [["a"], ["b", "c"]]}, "Expecting shape"),
        ({"instances": [["a"], {"texts": ["b"]}]}, "mix"),
        ({"inputs": [["a"], ["b", "c"]]}, "unexpected size"),
        ({"inputs": [["a"], "b"]}, "incorrect level"),
        ({"inputs": [[1]]}, "expected type: string"),
        ({"inputs": [[{"b64": "?"}]]}, "base64"),
    ],
)
def test_rest_requests_that_are_wrong(model, document, message):
    assert message in _refused(3, _post, model, document)


def test_rest_answers(model):
    answer = {"echo": ["\u00e9"], "echo_bytes": [{"b64": "w6k="}], "sizes": 2}
    instances = {"instances": [["\u00e9"]]}
    assert _post(model, instances) == {"predictions": [answer]}
    columns = {key: [value] for key, value in answer.items()}
    assert _post(model, {"inputs": [["\u00e9"]]}) == {"outputs": columns}
    numbers = {"only": np.array([1.5, np.nan], np.float32)}
    # As the server does, though it is not JSON.
    text = json.dumps(serving_rest.write_outputs(numbers, rows=True))
    assert text == '{"predictions": [1.5, NaN]}'


def test_outputs_without_a_batch_do_not_go_through_batching(model):
    document = {"signature_name": "scalar", "inputs": [["a"]]}
    assert "0th dimension" in _refused(9, _post, model, document)
    unbatched = "/v1/models/echo-unbatched:predict"
    assert _post(model, document, unbatched) == {"outputs": 1}


def test_what_a_batch_is_made_of():
    """Filled up only where asked for; never beyond the size or the queue."""
    short, long = (np.array([row], object) for row in (["a"], ["b", "c"]))
    merged = serving_batching.merge([short, long], 2, pad=True)
    rows = [["a", "a"], ["b", "c"], ["b", "c"], ["b", "c"]]
    assert merged.tolist() == rows
    _refused(9, serving_batching.merge, [short, long], 0, False)
    _refused(3, serving_batching.merge, [short[:, :0], long], 0, True)
    _refused(13, serving_batching.merge, [short[0], long], 0, True)
    with pytest.raises(ValueError, match="not a batching parameter"):
        serving_batching.read_parameters("max_batch_size: {")
    with pytest.raises(ValueError, match="Last entry in allowed_batch_sizes"):
        serving_batching.read_parameters("allowed_batch_sizes: 4")

    running, go_on, sizes = threading.Event(), threading.Event(), []

    def function(inputs, timeout):
        sizes.append(len(inputs["x"]))
        running.set()
        go_on.wait()
        return inputs

    parameters = serving_batching.read_parameters(
        "max_batch_size { value: 4 }\nmax_enqueued_batches { value: 1 }\n"
        "num_batch_threads { value: 1 }\n"
        "allowed_batch_sizes: 1\nallowed_batch_sizes: 4"
    )
    queue = serving_batching.Scheduler(parameters).queue(function)

    def ask(count, answers=None):
        found = queue({"x": np.arange(count)})["x"].tolist()
        return found if answers is None else answers.append(found)

    assert "Task size 5" in _refused(3, ask, 5)
    answers = []
    threads = [
        threading.Thread(target=ask, args=(count, answers))
        for count in (1, 2, 1)
    ]
    threads[0].start()
    running.wait()
    for thread in threads[1:]:
        thread.start()
    while not queue.batches or len(queue.batches[0]) < 2:
        time.sleep(0.001)
    assert "queue" in _refused(14, ask, 2)
    go_on.set()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [[0], [0], [0, 1]] and sizes == [1, 4]
