"""Does what tensorflow_model_server does with a SavedModel, for tests.

    python tests/serving_stand_in.py MODEL NAME

loads the newest version below MODEL as the server does (session loader, tag
`serve`, tensors by the names in the signatures), runs its warm-up requests,
prints a line of JSON with the addresses of gRPC and REST, and serves until its
standard input ends. NAME puts requests together as batching_parameters.txt
says, NAME-unbatched does not. Nothing of this project can be imported in it.

Followed are, of tensorflow/serving: predict_util.cc (inputs and outputs),
batching_session.cc and batching_util.cc (merging, padding, splitting),
json_tensor.cc (REST). Values go to the session unchecked, as in C++.
"""

import base64
import collections
import concurrent.futures
import http.server
import json
import pathlib
import queue
import re
import sys
import threading

import grpc
import numpy as np
import tensorflow as tf
import tensorflow_text  # noqa: F401  The server links its ops.
from tensorflow.core.protobuf import config_pb2
from tensorflow_serving.apis import (
    predict_pb2,
    prediction_log_pb2,
    prediction_service_pb2_grpc,
)

Task = collections.namedtuple("Task", "inputs size future")


class RequestError(Exception):
    """An answer with a gRPC status other than OK."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


class Servable:
    """One loaded version."""

    def __init__(self, folder, name):
        versions = [p for p in folder.iterdir() if p.name.isdigit()]
        self.path = max(versions, key=lambda path: int(path.name))
        self.session = tf.compat.v1.Session(graph=tf.Graph())
        with self.session.graph.as_default():
            meta = tf.compat.v1.saved_model.loader.load(
                self.session, ["serve"], str(self.path)
            )
        self.signatures = meta.signature_def
        self._callables = {
            name: self._callable(signature)
            for name, signature in self.signatures.items()
            if not name.startswith("__")
        }
        parameters = (folder / "batching_parameters.txt").read_text()
        found = re.findall(r"(\w+) \{ value: (\d+) \}", parameters)
        values = {key: int(value) for key, value in found}
        self._batchers = {
            name: Batcher(function, values)
            for name, function in self._callables.items()
        }
        self.names = {
            name: self._batchers,
            f"{name}-unbatched": self._callables,
        }
        self.warmed_up = self._warm_up()

    def _callable(self, signature):
        """Runs the graph on a dict, by the names of the signature.

        `Session.run` would check shapes in Python, which the server does not.
        """
        names, aliases = list(signature.inputs), list(signature.outputs)
        run = self.session._make_callable_from_options(
            config_pb2.CallableOptions(
                feed=[signature.inputs[name].name for name in names],
                fetch=[signature.outputs[alias].name for alias in aliases],
            )
        )

        def function(inputs):
            try:
                outputs = run(*[inputs[name] for name in names])
            except tf.errors.OpError as error:
                raise RequestError(error.error_code, error.message) from None
            return dict(zip(aliases, outputs))

        return function

    def _warm_up(self):
        """Runs the recorded requests; a failing one stops the server."""
        file = self.path / "assets.extra" / "tf_serving_warmup_requests"
        count = 0
        for record in tf.compat.v1.io.tf_record_iterator(str(file)):
            log = prediction_log_pb2.PredictionLog.FromString(record)
            assert log.WhichOneof("log_type") == "predict_log"
            self.predict(log.predict_log.request)
            count += 1
        return count

    def predict(self, request):
        """PredictRequest to PredictResponse."""
        spec = request.model_spec
        if spec.name not in self.names:
            raise RequestError(
                5, f"Servable not found for request: Latest({spec.name})"
            )
        name = spec.signature_name or "serving_default"
        if name not in self.signatures:
            raise RequestError(9, f'Serving signature key "{name}" not found.')
        signature = self.signatures[name]
        inputs = {
            key: tf.make_ndarray(value) for key, value in request.inputs.items()
        }
        if inputs.keys() != signature.inputs.keys():
            extra = inputs.keys() - signature.inputs.keys()
            missing = signature.inputs.keys() - inputs.keys()
            raise RequestError(
                3,
                "input size does not match signature: Sent extra: {"
                + ",".join(extra)
                + "}. Missing but required: {"
                + ",".join(missing)
                + "}.",
            )
        outputs = self.names[spec.name][name](inputs)
        response = predict_pb2.PredictResponse()
        response.model_spec.CopyFrom(spec)
        response.model_spec.version.value = int(self.path.name)
        for alias, value in outputs.items():
            if not request.output_filter or alias in request.output_filter:
                response.outputs[alias].CopyFrom(tf.make_tensor_proto(value))
        return response


class Batcher:
    """Merges requests that arrive close together, as BatchingSession does."""

    def __init__(self, function, parameters):
        self._function = function
        self._max_batch_size = parameters["max_batch_size"]
        self._timeout = parameters["batch_timeout_micros"] / 1e6
        self._queue = queue.Queue()
        threading.Thread(target=self._work, daemon=True).start()

    def __call__(self, inputs):
        sizes = {value.shape[:1] for value in inputs.values()}
        if sizes == {()} or len(sizes) > 1:
            raise RequestError(
                3,
                "Batching session Run() input tensors must have equal "
                "0th-dimension size",
            )
        ((size,),) = sizes
        if size > self._max_batch_size:
            raise RequestError(
                3,
                f"Task size {size} is larger than maximum input batch size "
                f"{self._max_batch_size}",
            )
        task = Task(inputs, size, concurrent.futures.Future())
        self._queue.put(task)
        return task.future.result()

    def _work(self):
        held = None
        while True:
            tasks = [held or self._queue.get()]
            held = None
            while True:
                try:
                    task = self._queue.get(timeout=self._timeout)
                except queue.Empty:
                    break
                total = sum(t.size for t in tasks) + task.size
                if total > self._max_batch_size:
                    held = task
                    break
                tasks.append(task)
            self._run(tasks)

    def _run(self, tasks):
        try:
            merged = {
                name: merge([task.inputs[name] for task in tasks])
                for name in tasks[0].inputs
            }
            outputs = self._function(merged)
        except Exception as error:
            for task in tasks:
                task.future.set_exception(error)
            return
        start = 0
        for task in tasks:
            part = slice(start, start + task.size)
            start += task.size
            task.future.set_result({k: v[part] for k, v in outputs.items()})


def merge(values):
    """Concatenates along dimension 0, the others filled up to the largest."""
    shape = np.max([value.shape[1:] for value in values], axis=0)
    padded = []
    for value in values:
        # Filled up with the first element of the tensor.
        full = np.full((len(value), *map(int, shape)), value.flat[0], object)
        full[tuple(map(slice, value.shape))] = value
        padded.append(full)
    return np.concatenate(padded)


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    """The Predict method of the official service."""

    def __init__(self, servable):
        self._servable = servable

    def Predict(self, request, context):
        try:
            return self._servable.predict(request)
        except RequestError as error:
            codes = {code.value[0]: code for code in grpc.StatusCode}
            context.abort(codes[error.code], str(error))


class RestHandler(http.server.BaseHTTPRequestHandler):
    """POST /v1/models/NAME:predict and GET /v1/models/NAME."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        servable = self.server.servable
        if self.path.removeprefix("/v1/models/") not in servable.names:
            self._send(404, {"error": f"Could not find model at {self.path}"})
            return
        status = {"error_code": "OK", "error_message": ""}
        version = {"version": servable.path.name, "state": "AVAILABLE"}
        self._send(
            200, {"model_version_status": [version | {"status": status}]}
        )

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            self._send(200, self._predict(body))
        except RequestError as error:
            self._send({5: 404}.get(error.code, 400), {"error": str(error)})

    def _predict(self, body):
        match = re.fullmatch(
            r"/v1/models/([^/:]+)(?:/versions/\d+)?:predict", self.path
        )
        if match is None:
            raise RequestError(3, f"Malformed request: POST {self.path}")
        try:
            document = json.loads(body)
        except ValueError as error:
            raise RequestError(3, f"JSON Parse error: {error}") from None
        request = predict_pb2.PredictRequest()
        request.model_spec.name = match[1]
        name = document.get("signature_name", "serving_default")
        request.model_spec.signature_name = name
        if name not in self.server.servable.signatures:
            raise RequestError(9, f'Serving signature key "{name}" not found.')
        inputs = self.server.servable.signatures[name].inputs
        rows = "instances" in document
        read = read_rows if rows else read_columns
        for key, value in read(document, inputs).items():
            request.inputs[key].CopyFrom(tf.make_tensor_proto(value, tf.string))
        response = self.server.servable.predict(request)
        values = {
            key: write_json(key, tf.make_ndarray(value))
            for key, value in response.outputs.items()
        }
        if not rows:
            return {"outputs": values}
        keys = list(values)
        return {
            "predictions": [
                dict(zip(keys, row)) for row in zip(*values.values())
            ]
        }

    def _send(self, code, document):
        body = json.dumps(document, allow_nan=False).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def read_rows(document, inputs):
    """{"instances": [...]}: each a value, or an object of named values."""
    instances = document["instances"]
    if not isinstance(instances, list):
        raise RequestError(3, "Expecting 'instances' to be an list/array")
    if not instances:
        raise RequestError(3, "No values in 'instances' array")
    columns = {name: [] for name in inputs}
    for number, row in enumerate(instances):
        if not isinstance(row, dict) or row.keys() == {"b64"}:
            if len(inputs) > 1:
                raise RequestError(3, "instances is a plain list")
            row = {next(iter(inputs)): row}
        if row.keys() != columns.keys():
            raise RequestError(
                3,
                f"Failed to process element: {number} of 'instances' list. "
                f"keys must be equal to: {','.join(columns)}",
            )
        for name, value in row.items():
            columns[name].append(read_json(value))
    return columns


def read_columns(document, inputs):
    """{"inputs": ...}: a value, or an object of named values."""
    if "inputs" not in document:
        raise RequestError(3, "Missing 'inputs' or 'instances' key")
    values = document["inputs"]
    if not isinstance(values, dict) or values.keys() == {"b64"}:
        if len(inputs) > 1:
            raise RequestError(3, "inputs is a plain value/list")
        values = {next(iter(inputs)): values}
    for name in inputs:
        if name not in values:
            raise RequestError(
                3, f"Missing named input: {name} in 'inputs' object."
            )
    return {name: read_json(values[name]) for name in inputs}


def read_json(value):
    """Strings and {"b64": ...} to bytes, in lists of any depth."""
    if isinstance(value, list):
        return [read_json(item) for item in value]
    if isinstance(value, dict) and value.keys() == {"b64"}:
        return base64.b64decode(value["b64"], validate=True)
    if isinstance(value, str):
        return value.encode()
    raise RequestError(
        3, f"JSON Value: {value} is not of expected type: string"
    )


def write_json(name, array):
    """Values of an output; bytes as base64 where the name says so."""
    if array.dtype != object:
        return array.tolist()
    if name.endswith("_bytes"):
        return [{"b64": base64.b64encode(x).decode()} for x in array]
    return [x.decode() for x in array]


def main(folder, name):
    # As on a machine that has never heard of this project.
    sys.modules["cappa_tf"] = None
    servable = Servable(pathlib.Path(folder), name)
    server = grpc.server(
        concurrent.futures.ThreadPoolExecutor(64),
        options=[("grpc.max_receive_message_length", -1)],
    )
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
        PredictionService(servable), server
    )
    port = server.add_insecure_port("localhost:0")
    server.start()
    rest = http.server.ThreadingHTTPServer(("localhost", 0), RestHandler)
    rest.servable = servable
    threading.Thread(target=rest.serve_forever, daemon=True).start()
    ready = {
        "grpc": f"localhost:{port}",
        "rest": f"localhost:{rest.server_port}",
        "warmed_up": servable.warmed_up,
    }
    print(json.dumps(ready), flush=True)
    sys.stdin.read()
    server.stop(None)


if __name__ == "__main__":
    main(*sys.argv[1:])
