"""The console: the program's own lines, without TensorFlow's messages."""

import json
import logging as levels
import os
import signal
import subprocess
import sys

import pytest
import tensorflow as tf
from absl import logging
from conftest import ROOT

from cappa_tf.utils import console


@pytest.fixture
def written(capsys, monkeypatch):
    """Output of absl's handler since the last call, from level INFO on."""
    handler = logging.get_absl_handler()
    # Where another test made it write before is not looked at here.
    monkeypatch.setattr(handler.python_handler, "stream", sys.stderr)
    filters = [*handler.python_handler.filters]
    before = [*levels.root.handlers]
    verbosity = logging.get_verbosity()
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    yield lambda: capsys.readouterr().err
    logging.set_verbosity(verbosity)
    levels.root.handlers[:] = before
    handler.python_handler.filters[:] = filters


def write_what_tensorflow_logs_about(tmp_path):
    """A checkpoint and a SavedModel: messages of absl and of its own logger."""
    module = tf.Module()
    module.weight = tf.Variable(1.0)
    tf.train.Checkpoint(module=module).save(tmp_path / "checkpoint")
    tf.saved_model.save(module, str(tmp_path / "model"))


def test_messages_of_tensorflow_are_hidden(written, tmp_path):
    write_what_tensorflow_logs_about(tmp_path)
    before = written()
    assert "Sharding callback" in before
    assert "Assets written" in before
    console.hide_tensorflow_info()
    write_what_tensorflow_logs_about(tmp_path)
    assert written() == ""


def test_warnings_of_tensorflow_and_our_messages_are_not(written):
    console.hide_tensorflow_info()
    tf.get_logger().warning("a warning")
    logging.info("decoding images once")
    text = written()
    assert "a warning" in text
    assert "decoding images once" in text


# Of TensorFlow 2.18 to 2.21, with and without a GPU.
NEWS = (
    "WARNING: All log messages before absl::InitializeLog() is called are "
    "written to STDERR",
    "I0000 00:00:1795665247.305868    7471 cudart_stub.cc:31] Could not find "
    "cuda drivers on your machine, GPU will not be used.",
    "I0000 00:00:1795667058.500658   24773 cpu_feature_guard.cc:227] This "
    "TensorFlow binary is optimized to use available CPU instructions.",
    "To enable the following instructions: AVX2 FMA, in other operations, "
    "rebuild TensorFlow with the appropriate compiler flags.",
    "E0000 00:00:1795665249.235516    7471 cuda_platform.cc:52] failed call "
    "to cuInit: INTERNAL: CUDA error: Failed call to cuInit: UNKNOWN ERROR "
    "(303)",
    "2026-11-26 03:54:07.112233: I tensorflow/core/util/port.cc:153] oneDNN "
    "custom operations are on.",
    "E0000 00:00:1731.4 99 cuda_dnn.cc:8310] Unable to register cuDNN factory: "
    "Attempting to register factory for plugin cuDNN when one has already "
    "been registered",
    "W0000 00:00:1731.4 99 computation_placer.cc:177] computation placer "
    "already registered. Please check linkage and avoid linking the same "
    "target more than once.",
    "E0000 00:00:1731.4 99 node_def_util.cc:682] NodeDef mentions attribute "
    "use_unbounded_threadpool which is not in the op definition: Op<name=M>",
    "E0000 00:00:1795758348.137932     456 util.cc:131] oneDNN supports "
    "DT_BFLOAT16 only on platforms with AVX-512. Falling back to the default "
    "Eigen-based implementation if present.",
    "I0000 00:00:1731.4 99 gpu_device.cc:2020] Created device /job:localhost",
)
WORDS = (
    "E0000 00:00:1731.4 99 cuda_platform.cc:52] failed call to cuInit: "
    "INTERNAL: CUDA error: CUDA_ERROR_UNKNOWN: unknown error",
    "W0000 00:00:1731.4 99 bfc_allocator.cc:497] Allocator (GPU_0_bfc) ran "
    "out of memory",
    "F0000 00:00:1731.4 99 cpu_feature_guard.cc:9] The TensorFlow library was "
    "compiled to use AVX instructions",
    "2026-11-26 03:54:07.1: E tensorflow/core/x.cc:1] I tensorflow/y.cc:2] no",
    "terminate called after throwing an instance of 'std::bad_alloc'",
    "I1126 03:54:21.607618 140397 memory.py:90] decoding 32 images once",
    "Fatal Python error: Aborted",
)


def test_news_of_native_code_are_told_from_words_for_people():
    for line in NEWS:
        assert not console.is_for_people(line.encode()), line
    for line in WORDS:
        assert console.is_for_people(line.encode()), line


def _start(body, tmp_path, **environment):
    """Starts a tool whose main() is `body`, without TensorFlow."""
    path = tmp_path / "tool.py"
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    path.write_text(
        "import json, os, sys\nfrom cappa_tf.utils import console\n"
        f"def main(argv):\n{lines}"
        "console.run(main, lambda: None)\n",
        encoding="utf-8",
    )
    inherited = {k: v for k, v in os.environ.items() if k[:3] != "TF_"}
    return subprocess.Popen(
        [sys.executable, str(path)],
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_crash_keeps_its_last_words_and_the_news_go(tmp_path):
    said = "\n".join([*NEWS, *WORDS, ""])
    body = (
        f"os.write(2, {said!r}.encode())\n"
        "print('mine', file=sys.stderr)\n"
        "os.abort()"
    )
    process = _start(body, tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGABRT
    lines = err.decode().splitlines()
    assert "mine" in lines
    assert not set(NEWS) & set(lines) and set(WORDS) <= {*lines}


def test_who_asks_for_the_news_gets_them(tmp_path):
    body = f"os.write(2, {NEWS[1]!r}.encode())"
    process = _start(body, tmp_path, TF_CPP_MIN_LOG_LEVEL="0")
    assert process.communicate(timeout=60)[1].decode() == NEWS[1]


def test_a_tool_makes_the_settings_of_the_cpu_before_tensorflow(tmp_path):
    body = (
        "assert 'tensorflow' not in sys.modules\n"
        "print(os.environ['TF_CPU_ALLOCATOR_USE_BFC'])"
    )
    out, err = _start(body, tmp_path).communicate(timeout=60)
    assert (out, err) == (b"true\n", b"")


def test_no_tool_loads_tensorflow_before_it_is_started():
    """The settings would come too late."""
    code = (
        "import pathlib, runpy, sys\n"
        "from cappa_tf.utils import console\n"
        "def run(main, define_flags):\n"
        "    assert 'tensorflow' not in sys.modules, path\n"
        "    started.append(path.name)\n"
        "console.run, started = run, []\n"
        "for path in sorted(pathlib.Path('tools').glob('*.py')):\n"
        "    runpy.run_path(str(path), run_name='__main__')\n"
        "print(*started)"
    )
    started = subprocess.check_output(
        [sys.executable, "-c", code], cwd=ROOT, text=True
    ).split()
    tools = {path.name for path in (ROOT / "tools").glob("*.py")}
    assert set(started) == tools - {"__init__.py"}


def test_a_reader_that_has_gone_ends_the_program_quietly(tmp_path):
    body = (
        "with console.errors_as_lines('tool'):\n"
        "    for i in range(100_000):\n"
        "        print(i)"
    )
    process = _start(body, tmp_path)
    assert process.stdout.readline() == b"0\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141


def test_names_that_a_locale_cannot_write_are_escaped(tmp_path):
    body = (
        "print('写真 caf\\udce9')\n"
        "print(console.json_line({'a': '写真 \\U0001f600'}))\n"
        "print('the rest')"
    )
    process = _start(body, tmp_path, LC_ALL="C", PYTHONUTF8="0")
    out, err = process.communicate(timeout=60)
    assert err == b"" and process.returncode == 0
    first, second, rest = out.decode("ascii").splitlines()
    assert first == r"\u5199\u771f caf\udce9"
    assert json.loads(second) == {"a": "写真 \U0001f600"}
    assert rest == "the rest"


@pytest.mark.parametrize(
    "error, text",
    [
        (ValueError("a\n  In call to configurable 'b'"), "tool: a"),
        (FileNotFoundError(2, "No such file", "x"), "tool: .*No such.*'x'"),
        (tf.errors.DataLossError(None, None, "cut"), "tool: cut"),
        (KeyboardInterrupt(), "tool: interrupted; run it again"),
    ],
)
def test_what_a_person_can_mend_is_a_line(error, text):
    match = f"^{text}$"
    with (
        pytest.raises(SystemExit, match=match),
        console.errors_as_lines("tool"),
    ):
        raise error


@pytest.mark.parametrize("error", [BrokenPipeError(), RuntimeError("a bug")])
def test_other_errors_stay_whole(error):
    with pytest.raises(type(error)), console.errors_as_lines("tool"):
        raise error
