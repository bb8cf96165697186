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

    def signatures(self):
        """Inputs of each signature of the model, a dict of lists of names.

        Raises:
            NoServerError: If the server does not tell.
        """
        try:
            found = self._ask(f"{self._url}/metadata")["metadata"]
            found = found["signature_def"]
            # What the server's JSON nests once more.
            found = found.get("signature_def", found)
            return {
                name: sorted(one.get("inputs", {}))
                for name, one in found.items()
            }
        except (
            RequestFailedError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:
            raise NoServerError(f"{self._url}/metadata: {error}") from None

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
            get_model_metadata_pb2,
            predict_pb2,
            prediction_service_pb2_grpc,
        )

        self._grpc = grpc
        self._make_tensor = tf.make_tensor_proto
        self._make_array = tf.make_ndarray
        self._request = predict_pb2.PredictRequest
        self._metadata = get_model_metadata_pb2
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

    def signatures(self):
        """Inputs of each signature of the model, as `RestClient` gives them."""
        request = self._metadata.GetModelMetadataRequest()
        request.model_spec.name = self._model
        request.metadata_field.append("signature_def")
        try:
            response = self._service.GetModelMetadata(
                request, timeout=self._timeout
            )
        except self._grpc.RpcError as error:
            raise NoServerError(
                f"{self._address}: {error.code().name}: {error.details()}"
            ) from None
        found = self._metadata.SignatureDefMap()
        response.metadata["signature_def"].Unpack(found)
        return {
            name: sorted(one.inputs)
            for name, one in found.signature_def.items()
        }


CLIENTS = {"grpc": GrpcClient, "rest": RestClient}


def ask(client, signature, inputs, texts=()):
    """Sends a request, and answers each of its images or texts.

    Args:
        client: `RestClient` or `GrpcClient`.
        signature: Name of the signature.
        inputs: As of `RestClient.predict`.
        texts: The texts to score of an image, for score and zero_shot.

    Returns:
        A dict for each image or text: `error`, or the answer (`caption` and
        `log_likelihood`; `scores`, a dict from text to log-likelihood or
        score; or `embedding`).
    """
    count = len(next(iter(inputs.values())))
    try:
        outputs = client.predict(signature, inputs)
        return [_answer(signature, outputs, i, texts) for i in range(count)]
    except RequestFailedError as error:
        message = str(error)
    except (KeyError, IndexError, TypeError) as error:
        message = f"the answer does not fit signature {signature}: {error!r}"
    return [{"error": message}] * count


def _answer(signature, outputs, i, texts):
    if not outputs["ok"][i]:
        return {"error": _text(outputs["error"][i])}
    if signature.startswith("embed"):
        return {"embedding": [float(x) for x in outputs["embedding"][i]]}
    if signature == "caption":
        return {
            "caption": _text(outputs["caption"][i]),
            "log_likelihood": float(outputs["log_likelihood"][i]),
        }
    scores = outputs["score" if signature == "zero_shot" else "log_likelihood"]
    # A server that batches may have padded columns on the right.
    numbers = [float(scores[i][j]) for j in range(len(texts))]
    return {"scores": dict(zip(texts, numbers))}


def _text(value):
    return value.decode() if isinstance(value, bytes) else str(value)
