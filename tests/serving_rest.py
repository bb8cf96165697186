"""REST interface of the stand-in server.

Followed are, of tensorflow/serving: http_rest_api_util.cc (paths),
http_server.cc (status codes), get_model_status_impl.cc and json_tensor.cc, for
inputs of strings, which are all that this project's exports take.
"""

import base64
import http.server
import json
import re
import threading

import numpy as np
import tensorflow as tf
from google.protobuf import json_format
from serving_batching import INVALID_ARGUMENT, RequestError
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    predict_pb2,
    status_pb2,
)

TIMEOUT = 30.0  # seconds
# By the code of gRPC; all others are 500.
HTTP_STATUS = {3: 400, 4: 504, 5: 404, 8: 429, 9: 400, 11: 400, 12: 501}
HTTP_STATUS |= {14: 503}


def start(model):
    """Serves requests at a free port, in its own threads.

    Args:
        model: `serving_stand_in.Model`.

    Returns:
        The HTTP server.
    """
    server = http.server.ThreadingHTTPServer(("localhost", 0), RestHandler)
    server.model = model
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def predict(model, path, body, timeout=TIMEOUT):
    """The answer, a dict, to a POST."""
    match = re.fullmatch(
        r"(?i)/v1/models/([^/:]+)(?:/versions/(\d+))?:predict", path
    )
    if match is None:
        raise RequestError(INVALID_ARGUMENT, f"Malformed request: POST {path}")
    request = predict_pb2.PredictRequest()
    request.model_spec.name = match[1]
    if match[2]:
        request.model_spec.version.value = int(match[2])
    document = parse(body)
    name = document.get("signature_name", "")
    request.model_spec.signature_name = name
    servable, _ = model.find(match[1], match[2] and int(match[2]))
    if (name or "serving_default") not in servable.signatures:
        raise RequestError(
            INVALID_ARGUMENT,
            f'Serving signature name: "{name}" not found in signature def',
        )
    signature = servable.signatures[name or "serving_default"]
    inputs, rows = read_inputs(document, signature.inputs)
    for key, value in inputs.items():
        proto = tf.make_tensor_proto(value, tf.string, value.shape)
        request.inputs[key].CopyFrom(proto)
    outputs = model.predict(request, timeout).outputs
    outputs = {key: tf.make_ndarray(value) for key, value in outputs.items()}
    return write_outputs(outputs, rows)


def status(model, path):
    """The answer to a GET: the states of a model, or its signatures."""
    match = re.fullmatch(
        r"(?i)/v1/models/([^/:]+)(?:/versions/(\d+))?(/metadata)?", path
    )
    if match is None:
        raise RequestError(INVALID_ARGUMENT, f"Malformed request: GET {path}")
    servable, _ = model.find(match[1], match[2] and int(match[2]))
    if match[3]:
        signatures = get_model_metadata_pb2.SignatureDefMap()
        for key, value in servable.signatures.items():
            signatures.signature_def[key].CopyFrom(value)
        spec = {"name": match[1], "version": str(servable.version)}
        document = json_format.MessageToDict(
            signatures, preserving_proto_field_name=True
        )
        return {"model_spec": spec, "metadata": {"signature_def": document}}
    response = get_model_status_pb2.GetModelStatusResponse()
    states = get_model_status_pb2.ModelVersionStatus.State
    for version, error in {servable.version: None, **model.failed}.items():
        response.model_version_status.add(
            version=version,
            state=states.AVAILABLE if error is None else states.END,
            status=status_pb2.StatusProto(
                error_code=getattr(error, "code", 0),
                error_message=str(error or ""),
            ),
        )
    return json_format.MessageToDict(
        response, always_print_fields_with_no_presence=True
    )


class RestHandler(http.server.BaseHTTPRequestHandler):
    """POST /v1/models/NAME:predict, GET /v1/models/NAME and .../metadata."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self._answer(lambda: status(self.server.model, self.path))

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(lambda: predict(self.server.model, self.path, body))

    def _answer(self, function):
        try:
            code, document = 200, function()
        except RequestError as error:
            code = HTTP_STATUS.get(error.code, 500)
            document = {"error": str(error)}
        body = json.dumps(document, ensure_ascii=False)
        body = body.encode(errors="surrogateescape")
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def parse(body):
    """The JSON object of a request."""
    try:
        document = json.loads(body)
    except ValueError as error:
        raise _invalid(f"JSON Parse error: {error}") from None
    if not isinstance(document, dict):
        raise _invalid(f"JSON Value: {document} Is not object")
    if not isinstance(document.get("signature_name", ""), str):
        raise _invalid("'signature_name' key must be a string value.")
    return document


def read_inputs(document, names):
    """Arrays of bytes by the names of the inputs, and whether by rows."""
    if "instances" in document:
        if "inputs" in document:
            raise _invalid("expecting only one of 'inputs' or 'instances'")
        return _read_rows(document["instances"], names), True
    if "inputs" not in document:
        raise _invalid("Missing 'inputs' or 'instances' key")
    return _read_columns(document["inputs"], names), False


def write_outputs(outputs, rows):
    """The answer: a dict of lists, or a list of dicts; one value bare."""
    values = {name: _write(name, array) for name, array in outputs.items()}
    if not rows:
        (only, *others) = values.values()
        return {"outputs": values if others else only}
    if len({array.shape[:1] for array in outputs.values()}) > 1:
        raise _invalid("a tensor has inconsistent batch size")
    predictions = [dict(zip(values, row)) for row in zip(*values.values())]
    if len(values) == 1:
        predictions = [value for row in predictions for value in row.values()]
    return {"predictions": predictions}


def _invalid(message):
    return RequestError(INVALID_ARGUMENT, message)


def _is_object(value):
    return isinstance(value, dict) and not _is_base64(value)


def _is_base64(value):
    return (
        isinstance(value, dict)
        and value.keys() == {"b64"}
        and isinstance(value["b64"], str)
    )


def _read_rows(instances, names):
    """{"instances": [...]}: each a value, or an object of named values."""
    if not isinstance(instances, list):
        raise _invalid("Expecting 'instances' to be an list/array")
    if not instances:
        raise _invalid("No values in 'instances' array")
    named = _is_object(instances[0])
    if not named and len(names) > 1:
        raise _invalid("instances is a plain list, but expecting objects")
    columns = {name: [] for name in names}
    for number, row in enumerate(instances):
        if _is_object(row) != named:
            raise _invalid(f"Expecting no mix of values at item {number}")
        row = row if named else {next(iter(names)): row}
        if row.keys() != columns.keys():
            raise _invalid(
                f"Failed to process element: {number} of 'instances' list. "
                f"keys must be equal to: {','.join(names)}"
            )
        for name, value in row.items():
            array = _array(value)
            if columns[name] and columns[name][0].shape != array.shape:
                raise _invalid(
                    f"Failed to process element: {number} key: {name}. "
                    f"Expecting shape {columns[name][0].shape} but got: "
                    f"{array.shape}"
                )
            columns[name].append(array)
    return {name: np.stack(arrays) for name, arrays in columns.items()}


def _read_columns(values, names):
    """{"inputs": ...}: a value, or an object of named values."""
    if not _is_object(values):
        if len(names) > 1:
            raise _invalid("inputs is a plain value/list, but expecting object")
        values = {next(iter(names)): values}
    for name in names:
        if name not in values:
            raise _invalid(f"Missing named input: {name} in 'inputs' object.")
    return {name: _array(values[name]) for name in names}


def _array(value):
    """Nested lists of strings and {"b64": ...} as an array of bytes."""
    shape, probe = [], value
    while isinstance(probe, list):
        shape.append(len(probe))
        probe = probe[0] if probe else None
    flat = []

    def fill(value, level):
        if not isinstance(value, list):
            if level != len(shape):
                raise _invalid(f"JSON Value found at incorrect level: {level}")
            flat.append(_bytes(value))
        elif level >= len(shape) or len(value) != shape[level]:
            raise _invalid(f"Encountered list of unexpected size: {len(value)}")
        else:
            for item in value:
                fill(item, level + 1)

    fill(value, 0)
    array = np.empty(len(flat), object)
    array[:] = flat
    return array.reshape(shape)


def _bytes(value):
    if _is_base64(value):
        try:
            return base64.b64decode(value["b64"], validate=True)
        except ValueError:
            raise _invalid("Unable to base64 decode") from None
    if isinstance(value, str):
        return value.encode()
    raise _invalid(f"JSON Value: {value} is not of expected type: string")


def _write(name, array):
    """Values of an output; bytes as base64 where the name says so.

    Other strings are written as they are, UTF-8 or not, and numbers that are
    not finite as NaN and Infinity.
    """
    if array.dtype != object:
        return array.tolist()
    if array.ndim:
        return [_write(name, np.asarray(item, object)) for item in array]
    value = array.item()
    if name.endswith("_bytes"):
        return {"b64": base64.b64encode(value).decode()}
    return value.decode(errors="surrogateescape")
