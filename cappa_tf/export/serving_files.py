"""Files for TensorFlow Serving: warm-up requests, batching, manifests.

MODEL/VERSION/assets.extra/tf_serving_warmup_requests
                            run by the server before it accepts requests
MODEL/models.config         --model_config_file
MODEL/batching_parameters.txt
                            --batching_parameters_file
MODEL/docker-compose.yaml   `docker compose up` in that folder
MODEL/kubernetes.yaml       `kubectl apply`

Reference: tensorflow/serving, session_bundle_config.proto (batching),
saved_model_warmup_util.h, model_server_config.proto.
"""

import os
import re
import string

import numpy as np
import tensorflow as tf

from cappa_tf.utils import files
from cappa_tf.utils.arguments import check_extra

# The newest released server as of 2026; it runs models written with the
# TensorFlow version of this project.
IMAGE = "tensorflow/serving:2.20.0"
WARMUP = os.path.join("assets.extra", "tf_serving_warmup_requests")
# How long a request waits for others to share its batch; short compared to the
# generation of a caption, about as long as the encoding of an image.
BATCH_TIMEOUT_MICROS = 5_000
# Maximum number of queued batches, beyond which the server answers UNAVAILABLE.
MAX_ENQUEUED_BATCHES = 100
BATCH_THREADS = 4

_MODELS = """\
model_config_list {
  config {
    name: "$name"
    base_path: "/models/$name"
    model_platform: "tensorflow"
  }
}
"""

# The server pads requests that have fewer texts by repeating one, and the
# response has as many extra columns; tools/serving_client.py drops them.
_BATCHING = """\
max_batch_size { value: $max_batch_size }
batch_timeout_micros { value: $timeout }
max_enqueued_batches { value: $enqueued }
num_batch_threads { value: $threads }
pad_variable_length_inputs: true
"""

_COMPOSE = """\
# docker compose up, in this folder. 8500 is gRPC, 8501 REST.
services:
  $name:
    image: $image
    command:
      - --model_config_file=/models/$name/models.config
      - --enable_batching=true
      - --batching_parameters_file=/models/$name/batching_parameters.txt
    ports:
      - "8500:8500"
      - "8501:8501"
    volumes:
      - .:/models/$name:ro
    restart: unless-stopped
"""

_KUBERNETES = """\
# kubectl apply -f kubernetes.yaml, with the contents of this folder on the
# volume that the claim $name-model binds.
apiVersion: apps/v1
kind: Deployment
metadata:
  name: $name
  labels:
    app: $name
spec:
  replicas: 1
  selector:
    matchLabels:
      app: $name
  template:
    metadata:
      labels:
        app: $name
    spec:
      containers:
        - name: serving
          image: $image
          args:
            - --model_config_file=/models/$name/models.config
            - --enable_batching=true
            - --batching_parameters_file=/models/$name/batching_parameters.txt
          ports:
            - name: grpc
              containerPort: 8500
            - name: rest
              containerPort: 8501
          # Answers 200 only when a version is loaded and warmed up.
          readinessProbe:
            httpGet:
              path: /v1/models/$name/metadata
              port: rest
            periodSeconds: 5
          # The ports open after loading, which is slow for a large model.
          startupProbe:
            tcpSocket:
              port: grpc
            periodSeconds: 5
            failureThreshold: 120
          livenessProbe:
            tcpSocket:
              port: grpc
          resources:
            requests:
              cpu: "2"
              memory: $memory
          volumeMounts:
            - name: model
              mountPath: /models/$name
              readOnly: true
      volumes:
        - name: model
          persistentVolumeClaim:
            claimName: $name-model
            readOnly: true
---
apiVersion: v1
kind: Service
metadata:
  name: $name
spec:
  selector:
    app: $name
  ports:
    - name: grpc
      port: 8500
      targetPort: grpc
    - name: rest
      port: 8501
      targetPort: rest
"""


def check_name(name):
    """Checks that a name is valid in URLs and in Kubernetes.

    Raises:
        ValueError: If it is not.
    """
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,50}[a-z0-9])?", name):
        raise ValueError(
            "`name` must consist of lower-case letters, digits and dashes, as "
            "it is part of URLs and of Kubernetes names. "
            f"Received: name={name!r}"
        )


def check_protos():
    """Checks that the protos of warm-up records are installed.

    Raises:
        ImportError: If they are not.
    """
    check_extra("A model for a server", "serving", "tensorflow_serving")


def write_warmup(path, service, name):
    """Writes the requests that a server runs while it loads a version.

    Args:
        path: Folder of the version.
        service: The `Service` in it.
        name: Name of the model on the server.
    """
    file = os.path.join(path, WARMUP)
    os.makedirs(os.path.dirname(file), exist_ok=True)
    with tf.io.TFRecordWriter(file) as writer:
        for record in warmup_records(service, name):
            writer.write(record.SerializeToString())


def warmup_records(service, name):
    """List of `PredictionLog`s that call every signature.

    Each is called with one image, and with several of which one is bad.
    """
    from tensorflow_serving.apis import prediction_log_pb2

    image = _noise(service.image_size)
    records = []
    for images in ([image], [image, image, b"not an image"]):
        texts = np.array([["a photo", "a longer text"]] * len(images), object)
        values = {
            ("image_bytes", 1): images,
            ("texts", 1): texts[:, 0],
            ("texts", 2): texts,
        }
        for signature, function in service.signatures().items():
            specs = function.input_signature
            if any(spec.name == "prompt" for spec in specs):
                prompt = [service.example_prompt] * len(images)
                values["prompt", 1] = prompt
            inputs = {
                spec.name: values[spec.name, spec.shape.rank] for spec in specs
            }
            record = prediction_log_pb2.PredictionLog()
            request = record.predict_log.request
            request.model_spec.name = name
            request.model_spec.signature_name = signature
            for key, value in inputs.items():
                request.inputs[key].CopyFrom(tf.make_tensor_proto(value))
            records.append(record)
    return records


def _noise(size):
    """A JPEG of random pixels."""
    pixels = np.random.RandomState(0).randint(256, size=(*size, 3))
    return tf.io.encode_jpeg(pixels.astype("uint8")).numpy()


def write_configuration(output, service, name):
    """Writes the files beside the versions, replacing earlier ones.

    Args:
        output: The model's folder.
        service: The model's `Service`.
        name: Name of the model on the server.
    """
    values = {
        "name": name,
        "image": IMAGE,
        "max_batch_size": service.max_batch_size,
        "timeout": BATCH_TIMEOUT_MICROS,
        "enqueued": MAX_ENQUEUED_BATCHES,
        "threads": BATCH_THREADS,
        # The weights twice (a version and its successor), and working memory.
        "memory": f"{2 * service.num_bytes // 2**20 + 2048}Mi",
    }
    contents = {
        "models.config": _MODELS,
        "batching_parameters.txt": _BATCHING,
        "docker-compose.yaml": _COMPOSE,
        "kubernetes.yaml": _KUBERNETES,
    }
    for file_name, template in contents.items():
        content = string.Template(template).substitute(values)
        files.write_text(os.path.join(output, file_name), content)
