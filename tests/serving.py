"""A small captioner, exported and served in a separate process."""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import grpc
import numpy as np
import tensorflow as tf
import tiny
from conftest import ROOT
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from cappa_tf.export import saved_model
from cappa_tf.saving import run_folder

NAME = "tiny"
UNBATCHED = "tiny-unbatched"
MAX_BATCH_SIZE = 12
MAX_TEXTS = 100
MAX_PIXELS = 1_000_000


@dataclasses.dataclass
class Served:
    """A run, its export, and the process that serves it."""

    run: str
    model: pathlib.Path
    grpc: str
    rest: str
    warmed_up: int
    tensorflow: str
    process: subprocess.Popen

    def is_alive(self):
        return self.process.poll() is None

    def predict(self, signature, name=NAME, timeout=60, **inputs):
        """Sends a request with the official protos; returns arrays."""
        request = predict_request(signature, name, **inputs)
        with grpc.insecure_channel(self.grpc) as channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            return arrays(stub.Predict(request, timeout=timeout))


def predict_request(signature, name=NAME, **inputs):
    """An official PredictRequest."""
    request = predict_pb2.PredictRequest()
    request.model_spec.name = name
    request.model_spec.signature_name = signature
    for key, value in inputs.items():
        shape = None if np.size(value) else np.shape(value)
        request.inputs[key].CopyFrom(
            tf.make_tensor_proto(value, tf.string, shape)
        )
    return request


def arrays(response):
    """The outputs of a PredictResponse."""
    return {k: tf.make_ndarray(v) for k, v in response.outputs.items()}


def write_run(folder):
    """The folder of a run whose captions differ from image to image."""
    vocabulary = folder / "vocabulary"
    vocabulary.mkdir()
    data = tiny.Data(vocabulary)
    model = tiny.make_model(tiny.vocabulary(vocabulary)[1])
    model.build()
    for number, variable in enumerate(model.trainable_variables):
        if len(variable.shape) > 1:
            draws = tf.random.stateless_normal(variable.shape, [0, number])
            fan_in = np.prod(variable.shape[:-1])
            variable.assign(2.0 * draws / np.sqrt(fan_in))
    run = str(folder / "run")
    run_folder.open_workdir(run)
    run_folder.describe_run(run, model, data)
    run_folder.save_model(run, model)
    return run


def service(run, **options):
    """The `CaptionService` of a run."""
    tokenizer, preprocessing = run_folder.load_preprocessing(run)
    limits = {
        "max_batch_size": MAX_BATCH_SIZE,
        "max_texts": MAX_TEXTS,
        "max_pixels": MAX_PIXELS,
    }
    return saved_model.CaptionService(
        run_folder.load_model(run),
        tokenizer,
        preprocessing,
        **limits | options,
    )


@contextlib.contextmanager
def serve(run, model, python=sys.executable):
    """Starts the stand-in without access to this project.

    Args:
        run: Folder of the run.
        model: Folder of its export.
        python: The interpreter, with TensorFlow and TensorFlow Text.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["TF_CPP_MIN_LOG_LEVEL"] = "3"
    script = ROOT / "tests" / "serving_stand_in.py"
    with subprocess.Popen(
        [python, str(script), str(model)],
        cwd=model,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        line = process.stdout.readline()
        assert line, "the server did not start"
        yield Served(run, model, process=process, **json.loads(line))
        process.stdin.close()
        process.wait(timeout=30)
