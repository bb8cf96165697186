"""Clients of TensorFlow Serving's two interfaces, gRPC and REST.

They are for models that export/saved_model.py wrote. Importing this module does
not load TensorFlow, and the REST client does not need it.
"""

import base64
import json
import urllib.error
import urllib.request

from cappa_tf.utils.arguments import check_extra


class RequestFailedError(Exception):
    """A request failed; the message says why."""


class NoServerError(Exception):
    """No server can be reached; the message names the address."""


class RestClient:
    """Client over HTTP, which does not need TensorFlow.

    Args:
        address: HOST:PORT, or a URL without the path.
        model: Name of the model on the server.
        timeout: Timeout of a request in seconds.
    """

    def __init__(self, address, model, timeout):
        root = address if "://" in address else f"http://{address}"
        self._url = f"{root.rstrip('/')}/v1/models/{model}"
        self._timeout = timeout

    def connect(self):
        """Checks that the model is served.

        Raises:
            NoServerError: If it is not.
        """
        try:
            status = self._ask(self._url)["model_version_status"]
        except (RequestFailedError, KeyError, TypeError) as error:
            raise NoServerError(f"{self._url}: {error}") from None
        if not any(version["state"] == "AVAILABLE" for version in status):
            raise NoServerError(f"{self._url}: no version is available yet")

    def predict(self, signature, inputs):
        """Sends a request.

        Args:
            signature: Name of the signature.
            inputs: Dict of lists: `image_bytes` of bytes; `texts`, a list of
                strings for each image, or strings for embed_text; `prompt`, a
                string for each image.

        Returns:
            Dict of lists or arrays, the outputs of the signature.

        Raises:
            RequestFailedError: If the server does not answer, or answers with
                an error.
        """
        encoded = [
            {"b64": base64.b64encode(content).decode()}
            for content in inputs.get("image_bytes", ())
        ]
        if encoded:
            inputs = {**inputs, "image_bytes": encoded}
        body = {"signature_name": signature, "inputs": inputs}
        answer = self._ask(f"{self._url}:predict", json.dumps(body).encode())
        if not isinstance(answer.get("outputs"), dict):
            raise RequestFailedError("the answer has no outputs")
        return answer["outputs"]

    def _ask(self, url, body=None):
        request = urllib.request.Request(
            url, body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as file:
                return json.load(file)
        except urllib.error.HTTPError as error:
            raise RequestFailedError(_rest_message(error)) from None
        except urllib.error.URLError as error:
            raise RequestFailedError(f"{error.reason}") from None
        except (OSError, ValueError) as error:
            raise RequestFailedError(f"{error}") from None


def _rest_message(error):
    """The server's own message, from the JSON of an error response."""
    try:
        message = json.load(error)["error"]
    except (ValueError, KeyError, TypeError, OSError):
        message = error.reason
    return f"HTTP {error.code}: {message}"


class GrpcClient:
    """Client over gRPC, with the arguments and methods of `RestClient`."""

    def __init__(self, address, model, timeout):
        check_extra(
            "gRPC (--protocol=rest does without)",
            "serving",
            "grpc",
            "tensorflow_serving",
        )
        # TensorFlow, which they need, takes seconds to load.
        import grpc
        import tensorflow as tf
        from tensorflow_serving.apis import (
            predict_pb2,
            prediction_service_pb2_grpc,
        )

        self._grpc = grpc
        self._make_tensor = tf.make_tensor_proto
        self._make_array = tf.make_ndarray
        self._request = predict_pb2.PredictRequest
        self._address = address
        self._model = model
        self._timeout = timeout
        self._channel = grpc.insecure_channel(
            address,
            options=[
                ("grpc.max_send_message_length", -1),
                ("grpc.max_receive_message_length", -1),
            ],
        )
        self._service = prediction_service_pb2_grpc.PredictionServiceStub(
            self._channel
        )

    def connect(self):
        """Waits for the connection; raises `NoServerError` without one."""
        ready = self._grpc.channel_ready_future(self._channel)
        try:
            ready.result(timeout=min(self._timeout, 10.0))
        except self._grpc.FutureTimeoutError:
            ready.cancel()
            raise NoServerError(f"{self._address}: cannot connect") from None

    def predict(self, signature, inputs):
        """Sends a request, with arguments and result as in `RestClient`."""
        request = self._request()
        request.model_spec.name = self._model
        request.model_spec.signature_name = signature
        for name, value in inputs.items():
            request.inputs[name].CopyFrom(self._make_tensor(value))
        try:
            response = self._service.Predict(request, timeout=self._timeout)
        except self._grpc.RpcError as error:
            raise RequestFailedError(
                f"{error.code().name}: {error.details()}"
            ) from None
        return {k: self._make_array(v) for k, v in response.outputs.items()}


CLIENTS = {"grpc": GrpcClient, "rest": RestClient}
