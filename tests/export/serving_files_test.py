"""Files of an export: versions and the configuration of a server."""

import io
import json
import os
import re
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

pytest.importorskip("tensorflow_serving", reason="pip install '.[serving]'")

import serving
from google.protobuf import text_format
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import prediction_log_pb2
from tensorflow_serving.config import model_server_config_pb2

from cappa_tf.export import saved_model, serving_files


def test_the_server_ran_the_warm_up_requests(served):
    file = served.model / "1" / "assets.extra" / "tf_serving_warmup_requests"
    records = [
        prediction_log_pb2.PredictionLog.FromString(record.numpy())
        for record in tf.data.TFRecordDataset(str(file))
    ]
    assert served.warmed_up == len(records)
    requests = [record.predict_log.request for record in records]
    signatures = {request.model_spec.signature_name for request in requests}
    assert signatures == {"serving_default", "caption", "score", "embed"}
    sizes = {
        request.inputs["image_bytes"].tensor_shape.dim[0].size
        for request in requests
    }
    assert sizes == {1, 3}


def test_nothing_needs_xla(served):
    """XLA ops, which a server refuses by default, and one with a GPU always.

    (tensorflow/serving/model_servers/main.cc; tensorflow/serving#2214)
    """
    graph = (served.model / "1" / "saved_model.pb").read_bytes()
    (meta,) = saved_model_pb2.SavedModel.FromString(graph).meta_graphs
    functions = meta.graph_def.library.function
    nodes = [*meta.graph_def.node, *(n for f in functions for n in f.node_def)]
    ops = {node.op for node in nodes}
    # The cache is written in the loop's body, one of the functions.
    assert {"TensorScatterUpdate", "MatMul"} <= ops
    assert [op for op in ops if op.startswith("Xla")] == []
    assert not any(
        value.attr["_XlaMustCompile"].b
        for value in [*nodes, *functions]
        if "_XlaMustCompile" in value.attr
    )


def test_files_beside_the_versions_fit_it(served):
    config = text_format.Parse(
        (served.model / "models.config").read_text(),
        model_server_config_pb2.ModelServerConfig(),
    )
    (model,) = config.model_config_list.config
    assert model.name == serving.NAME
    assert model.base_path == f"/models/{serving.NAME}"
    batching = (served.model / "batching_parameters.txt").read_text()
    # The graph would refuse larger batches, including other clients' requests.
    assert f"max_batch_size {{ value: {serving.MAX_BATCH_SIZE} }}" in batching


def test_manifests_start_the_server_on_these_files(served):
    yaml = pytest.importorskip("yaml", reason="pip install '.[interop]'")
    compose = yaml.safe_load((served.model / "docker-compose.yaml").read_text())
    deployment, service = yaml.safe_load_all(
        (served.model / "kubernetes.yaml").read_text()
    )
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    (composed,) = compose["services"].values()
    assert container["args"] == composed["command"]
    assert container["image"] == composed["image"]
    mount = f"/models/{serving.NAME}"
    assert container["volumeMounts"][0]["mountPath"] == mount
    assert composed["volumes"] == [f".:{mount}:ro"]
    for path in re.findall(rf"={mount}/(\S+)", " ".join(composed["command"])):
        assert (served.model / path).is_file()
    probe = container["readinessProbe"]["httpGet"]["path"]
    url = f"http://{served.rest}{probe}"
    with urllib.request.urlopen(url, timeout=60) as answer:
        signatures = json.load(answer)["metadata"]["signature_def"]
    assert "caption" in signatures["signature_def"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == labels
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    assert ports == {"grpc": 8500, "rest": 8501}


def _only_make_the_folder(module, path, signatures):
    os.mkdir(path)


@pytest.mark.parametrize("step", ["write_warmup", "write_configuration"])
def test_a_version_is_there_whole_or_not_at_all(
    served, tmp_path, monkeypatch, step
):
    def full_disk(path, *_):
        assert os.path.isdir(path)
        raise OSError("No space left on device")

    service = serving.service(served.run)
    monkeypatch.setattr(tf.saved_model, "save", _only_make_the_folder)
    monkeypatch.setattr(serving_files, step, full_disk)
    with pytest.raises(OSError, match="No space left"):
        saved_model.export_saved_model(tmp_path, service)
    assert os.listdir(tmp_path) == []


def test_versions_count_up_and_are_never_replaced(
    served, tmp_path, monkeypatch
):
    # The test is about the path it is written to.
    monkeypatch.setattr(tf.saved_model, "save", _only_make_the_folder)
    service = serving.service(served.run)

    def export(**options):
        path = saved_model.export_saved_model(tmp_path, service, **options)
        return os.path.relpath(path, tmp_path)

    assert export() == "1"
    assert export(version=7) == "7"
    assert export() == "8"
    with pytest.raises(ValueError, match="version=7, but .*7 exists"):
        export(version=7)
    with pytest.raises(ValueError, match="`version` must be an integer >= 1"):
        export(version=0)
    with pytest.raises(ValueError, match="`name` must consist of lower-case"):
        export(name="Cap/tioner")


def test_saved_model_cli_runs_it(served, tmp_path):
    """The command of TensorFlow, with TensorFlow Text's ops loaded."""
    inputs = tmp_path / "images.npy"
    picture = io.BytesIO()
    Image.new("RGB", (30, 20), (200, 30, 60)).save(picture, "PNG")
    content = picture.getvalue()
    np.save(inputs, np.array([content]))
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "import tensorflow_text\n"
            "from tensorflow.python.tools import saved_model_cli\n"
            "saved_model_cli.main()",
            "run",
            f"--dir={served.model / '1'}",
            "--tag_set=serve",
            "--signature_def=caption",
            f"--inputs=image_bytes={inputs}",
            f"--outdir={tmp_path}",
        ],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "Result for output key caption" in result.stdout
    answer = served.predict("caption", image_bytes=[content])
    np.testing.assert_allclose(
        np.load(tmp_path / "log_likelihood.npy"),
        answer["log_likelihood"],
        atol=1e-3,
    )


def _environment(folder, version):
    """The interpreter of a new virtual environment, filled from PyPI."""
    python = folder / "bin" / "python"
    names = ("tensorflow", "tensorflow-text", "tensorflow-serving-api")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet"]
        + [f"{name}=={version}.*" for name in names],
        check=True,
    )
    return str(python)


@pytest.mark.slow
def test_the_servers_tensorflow_answers_alike(served, tmp_path):
    """TensorFlow and TensorFlow Text of the newest server, and little else.

    SERVING_PYTHON is an interpreter that has them and tensorflow-serving-api;
    without it, a virtual environment is made.
    """
    version = serving_files.IMAGE.partition(":")[2].rpartition(".")[0]
    python = os.environ.get("SERVING_PYTHON")
    python = python or _environment(tmp_path / "venv", version)
    draw = np.random.RandomState(0)
    images = [b"not an image"]
    for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP") * 2:
        low = Image.fromarray(draw.randint(256, size=(2, 3, 3)).astype("uint8"))
        picture = io.BytesIO()
        low.resize((40, 30)).save(picture, name)
        images.append(picture.getvalue())
    with serving.serve(served.run, served.model, python) as server:
        assert server.tensorflow.startswith(f"{version}.")
        assert server.warmed_up == served.warmed_up
        for signature in ("caption", "score", "embed"):
            inputs = {"image_bytes": images}
            if signature == "score":
                inputs["texts"] = [["red circle", "green", ""]] * len(images)
            wanted = served.predict(signature, **inputs)
            answer = server.predict(signature, **inputs)
            assert answer.keys() == wanted.keys()
            assert answer["ok"].tolist() == [False] + [True] * 10
            for key, value in answer.items():
                if value.dtype == np.float32:
                    np.testing.assert_allclose(value, wanted[key], atol=1e-3)
                else:
                    assert value.tolist() == wanted[key].tolist()
            if signature == "caption":
                assert len(set(answer["caption"].tolist())) > 3


def test_limits_are_checked(served):
    with pytest.raises(ValueError, match="at most the decoder's 8"):
        serving.service(served.run, max_length=9)
    with pytest.raises(ValueError, match="`max_length` must be"):
        serving.service(served.run, max_length=0)
    with pytest.raises(ValueError, match="`max_batch_size` must be"):
        serving.service(served.run, max_batch_size=0)
