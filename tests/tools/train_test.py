"""The program: one command trains, a signal saves, the same command resumes."""

import json
import os
import signal
import subprocess
import sys
import time

from conftest import ROOT

TINY = {
    "DATA": "scenes",
    "HIDDEN_DIM": 16,
    "NUM_LAYERS": 1,
    "DECODER_LAYERS": 1,
    "NUM_HEADS": 2,
    "MLP_DIM": 32,
    "IMAGE_SIZE": 32,
    "BATCH_SIZE": 4,
    "TOTAL_STEPS": 100_000,
    "WARMUP_STEPS": 2,
    # Compiling takes longer than all these steps.
    "JIT_COMPILE": False,
    "DETERMINISTIC": True,
    "STEPS_PER_LOOP": 10_000,
    "LOG_STEPS": 10_000,
    "EVAL_STEPS": 100_000,
    "CHECKPOINT_STEPS": 100_000,
    "scenes.prepare.num_train": 32,
    "scenes.prepare.num_eval": 8,
}


def _start(folder, **overrides):
    """Starts tools/train.py on a tiny version of gin/quickstart.gin."""
    values = {**TINY, **overrides}
    command = [
        sys.executable,
        str(ROOT / "tools" / "train.py"),
        "--gin_file=gin/quickstart.gin",
        "--workdir=run",
    ]
    command += [f"--gin_param={k}={v!r}" for k, v in values.items()]
    environment = dict(os.environ)
    # Set for the tests; a user has not.
    environment.pop("TF_CPP_MIN_LOG_LEVEL", None)
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _wait_for(path, process):
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.25)
    raise AssertionError(f"{path} never came")


def test_sigterm_in_the_middle_of_a_loop_saves_and_resumes(tmp_path):
    process = _start(tmp_path)
    run = tmp_path / "run"
    # Written after the first step; then comes a loop of 10,000 of them.
    _wait_for(run / "operative_config-1.gin", process)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "SIGTERM at step" in output
    # Neither of TensorFlow's start, nor where gin looked for files first.
    for strange in ("absl::InitializeLog", "cuInit", ".cc:", "Path not found"):
        assert strange not in output
    line = next(x for x in output.splitlines() if "SIGTERM at" in x)
    step = int(line.split("at step ")[1].split(":")[0])
    assert 1 <= step < 10_000
    assert (run / "checkpoints" / f"step-{step}.index").exists()
    assert not (run / "results.json").exists()

    process = _start(tmp_path, TOTAL_STEPS=step + 2)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "run.lock" not in output and not (run / "run.lock").exists()
    assert f"resuming from run/checkpoints/step-{step}" in output
    results = json.loads((run / "results.json").read_text())
    assert results["step"] == step + 2
    assert 0.0 <= results["exact_match"] <= 1.0
    assert results["nll_per_token"] > 0.0
    names = set(os.listdir(run))
    assert names >= {
        "model.keras",
        "config.gin",
        "sheet.png",
        "samples.png",
        "tokenizer.model",
        "train.log",
    }
