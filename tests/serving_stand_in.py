"""Stand-in for tensorflow_model_server that serves a SavedModel, for tests.

    python tests/serving_stand_in.py MODEL

serves the model of MODEL/models.config with the server's defaults:

- XLA is turned off, so a graph with one of its ops does not run.
- The highest version is loaded (session loader, tag `serve`, tensors by the
  names in the signatures) and its warm-up requests are run, at most 1000. If
  that fails at the start there is no server (the real one tries five times
  more, a minute apart); later on, the version before is served on.
- Every second it looks for versions that came or went.
- Messages may have 2 GiB. A REST request may take 30 s, a gRPC request as long
  as its deadline says.

It prints a line of JSON with the addresses of gRPC and REST, and serves until
its standard input ends. Under the model's name requests are put together as
batching_parameters.txt says, under NAME-unbatched they are not. Nothing of this
project can be imported in it, nor Keras.

Followed are, of tensorflow/serving: main.cc, server.h (defaults),
file_system_storage_path_source.cc (versions), saved_model_warmup_util.cc,
predict_util.cc (inputs and outputs); see also serving_batching.py and
serving_rest.py. Values go to the session unchecked, as in C++.
"""

import concurrent.futures
import ctypes
import json
import pathlib
import re
import sys
import threading

import grpc
import serving_batching
import serving_rest
import tensorflow as tf
import tensorflow_text  # noqa: F401  The server links its ops.
from google.protobuf import text_format
from serving_batching import INVALID_ARGUMENT, RequestError
from tensorflow.core.protobuf import config_pb2
from tensorflow.python.client import pywrap_tf_session
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    predict_pb2,
    prediction_log_pb2,
    prediction_service_pb2_grpc,
)
from tensorflow_serving.config import model_server_config_pb2

NOT_FOUND, FAILED_PRECONDITION, UNIMPLEMENTED = 5, 9, 12
MAX_MESSAGE_BYTES = 2**31 - 1
MAX_WARMUP_RECORDS = 1000
POLL_SECONDS = 1.0


def turn_xla_off():
    """Turns off XLA, as the server without --xla_cpu_compilation_enabled.

    This holds for the whole process, permanently.
    """
    (library,) = pathlib.Path(tf.sysconfig.get_lib()).glob(
        "libtensorflow_cc.so.?"
    )
    ctypes.CDLL(str(library))._ZN10tensorflow21DisableXlaCompilationEv()


class Servable:
    """One loaded version.

    Attributes:
        version: Its number.
        functions: A dict: signature -> function of inputs (a dict of arrays)
            and a timeout in seconds or None to a dict of outputs.
        queues: The same, but requests are put together.
        warmed_up: How many requests the version was warmed up with.
    """

    def __init__(self, path, parameters):
        self.version = int(path.name)
        self.session = tf.compat.v1.Session(graph=tf.Graph())
        with self.session.graph.as_default():
            meta = tf.compat.v1.saved_model.loader.load(
                self.session, ["serve"], str(path)
            )
        self.signatures = meta.signature_def
        self.functions = {
            name: self._function(signature)
            for name, signature in self.signatures.items()
            if not name.startswith("__")
        }
        scheduler = serving_batching.Scheduler(parameters)
        self.queues = {
            name: scheduler.queue(function)
            for name, function in self.functions.items()
        }
        self.warmed_up = self._warm_up(
            path / "assets.extra" / "tf_serving_warmup_requests"
        )

    def _function(self, signature):
        """Runs the graph on a dict, by the names of the signature.

        `Session.run` would check shapes in Python, which the server does not.
        """

        def output_of(info):
            tensor = self.session.graph.get_tensor_by_name(info.name)
            return tensor._as_tf_output()

        feeds = {k: output_of(v) for k, v in signature.inputs.items()}
        fetches = {k: output_of(v) for k, v in signature.outputs.items()}

        def function(inputs, timeout=None):
            options = config_pb2.RunOptions()
            options.timeout_in_ms = int(1e3 * (timeout or 0))
            buffer = pywrap_tf_session.TF_NewBufferFromString(
                options.SerializeToString()
            )
            try:
                outputs = self.session._call_tf_sessionrun(
                    buffer,
                    {feeds[key]: value for key, value in inputs.items()},
                    [*fetches.values()],
                    [],
                    None,
                )
            except tf.errors.OpError as error:
                raise RequestError(error.error_code, error.message) from None
            finally:
                pywrap_tf_session.TF_DeleteBuffer(buffer)
            return dict(zip(fetches, outputs))

        self.session._extend_graph()
        return function

    def _warm_up(self, file):
        """Runs the recorded requests, through the queues like all others."""
        count = 0
        if not file.exists():
            return count
        for record in tf.compat.v1.io.tf_record_iterator(str(file)):
            log = prediction_log_pb2.PredictionLog.FromString(record)
            if log.WhichOneof("log_type") != "predict_log":
                raise RequestError(UNIMPLEMENTED, "only predict_log is done")
            self.predict(log.predict_log.request, self.queues)
            count += 1
            if count > MAX_WARMUP_RECORDS:
                raise RequestError(
                    INVALID_ARGUMENT,
                    "Number of warmup records exceeds the maximum "
                    f"({MAX_WARMUP_RECORDS}) at {file}",
                )
        return count

    def predict(self, request, functions, timeout=None):
        """PredictRequest to PredictResponse."""
        name = request.model_spec.signature_name or "serving_default"
        if name not in functions:
            raise RequestError(
                FAILED_PRECONDITION,
                f'Serving signature key "{name}" not found.',
            )
        _check_names(self.signatures[name], request)
        inputs = {
            key: tf.make_ndarray(value) for key, value in request.inputs.items()
        }
        outputs = functions[name](inputs, timeout)
        response = predict_pb2.PredictResponse()
        response.model_spec.name = request.model_spec.name
        response.model_spec.signature_name = name
        response.model_spec.version.value = self.version
        for alias in request.output_filter or outputs:
            value = tf.make_tensor_proto(outputs[alias])
            response.outputs[alias].CopyFrom(value)
        return response


def _check_names(signature, request):
    """Raises RequestError unless inputs and outputs are the signature's."""
    wanted, sent = set(signature.inputs), set(request.inputs)
    if len(wanted) != len(sent):
        raise RequestError(
            INVALID_ARGUMENT,
            "input size does not match signature: Sent extra: {"
            + ",".join(sent - wanted)
            + "}. Missing but required: {"
            + ",".join(wanted - sent)
            + "}.",
        )
    for alias in wanted - sent:
        raise RequestError(
            INVALID_ARGUMENT,
            f"Signature input alias: {alias} not found in request and no "
            "default value provided.",
        )
    for alias in set(request.output_filter) - set(signature.outputs):
        raise RequestError(
            INVALID_ARGUMENT,
            f"output tensor alias not found in signature: {alias}",
        )


class Model:
    """The versions of the one model in models.config.

    Args:
        folder: The model's folder.

    Raises:
        RequestError: The newest version cannot be loaded or warmed up.
    """

    def __init__(self, folder):
        self._folder = pathlib.Path(folder)
        (config,) = text_format.Parse(
            (self._folder / "models.config").read_text(),
            model_server_config_pb2.ModelServerConfig(),
        ).model_config_list.config
        self.name = config.name
        self._parameters = serving_batching.read_parameters(
            (self._folder / "batching_parameters.txt").read_text()
        )
        self._seen = self._newest()
        self.servable = self._load(self._seen)
        self.failed = {}  # version -> RequestError

    def _newest(self):
        """The folder with the highest number; other names are left alone."""
        folders = [
            path
            for path in self._folder.iterdir()
            if re.fullmatch(r"-?\d+", path.name)
        ]
        return max(folders, key=lambda path: int(path.name), default=None)

    def _load(self, path):
        if path is None:
            raise RequestError(NOT_FOUND, f"{self._folder}: no version")
        try:
            return Servable(path, self._parameters)
        except (OSError, tf.errors.OpError) as error:
            code = getattr(error, "error_code", NOT_FOUND)
            raise RequestError(code, str(error)) from None

    def poll(self):
        """Loads the newest version if it is new, then swaps them."""
        newest = self._newest()
        if newest in (None, self._seen):
            return
        self._seen = newest
        if int(newest.name) == self.servable.version:
            return
        try:
            self.servable = self._load(newest)
        except RequestError as error:
            self.failed[int(newest.name)] = error

    def find(self, name, version=None):
        """The servable and its functions under a name the server knows."""
        servable = self.servable
        known = {self.name: servable.queues}
        known[f"{self.name}-unbatched"] = servable.functions
        if name not in known or version not in (None, servable.version):
            which = f"Specific({name}, {version})" if version else None
            raise RequestError(
                NOT_FOUND,
                f"Servable not found for request: {which or f'Latest({name})'}",
            )
        return servable, known[name]

    def predict(self, request, timeout=None):
        """PredictRequest to PredictResponse."""
        spec = request.model_spec
        version = spec.version.value if spec.HasField("version") else None
        servable, functions = self.find(spec.name, version)
        return servable.predict(request, functions, timeout)


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    """The methods of the official service that clients of this project call."""

    def __init__(self, model):
        self._model = model

    def Predict(self, request, context):
        try:
            return self._model.predict(request, context.time_remaining())
        except RequestError as error:
            codes = {code.value[0]: code for code in grpc.StatusCode}
            context.abort(codes[error.code], str(error))

    def GetModelMetadata(self, request, context):
        try:
            servable, _ = self._model.find(request.model_spec.name, None)
        except RequestError as error:
            context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        found = get_model_metadata_pb2.SignatureDefMap()
        for name, signature in servable.signatures.items():
            found.signature_def[name].CopyFrom(signature)
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        response.metadata["signature_def"].Pack(found)
        return response


def main(folder):
    # As on a machine without this project.
    sys.modules["cappa_tf"] = sys.modules["keras"] = None
    turn_xla_off()
    try:
        model = Model(folder)
    except RequestError as error:
        sys.exit(f"Failed to start server. Error: {error}")
    server = grpc.server(
        concurrent.futures.ThreadPoolExecutor(64),
        options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)],
    )
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
        PredictionService(model), server
    )
    port = server.add_insecure_port("localhost:0")
    server.start()
    rest = serving_rest.start(model)
    ready = {
        "grpc": f"localhost:{port}",
        "rest": f"localhost:{rest.server_port}",
        "warmed_up": model.servable.warmed_up,
        "tensorflow": tf.__version__,
    }
    print(json.dumps(ready), flush=True)
    ended = threading.Event()
    threading.Thread(target=_poll, args=(model, ended), daemon=True).start()
    sys.stdin.read()
    ended.set()
    server.stop(None)


def _poll(model, ended):
    while not ended.wait(POLL_SECONDS):
        model.poll()


if __name__ == "__main__":
    main(*sys.argv[1:])
