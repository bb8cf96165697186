"""Cells on a local Ray cluster, one of which is killed with its worker."""

import pytest

from cappa_tf.studies import runners

pytest.importorskip("ray", reason="pip install '.[ray]'")


def test_a_killed_cell_runs_again_and_a_broken_one_is_reported(tmp_path):
    # Inside the test, so that Ray sends its code to the workers.
    def run(folder):
        import os
        import pathlib
        import signal

        attempts = pathlib.Path(folder) / "attempts"
        attempts.write_text(
            attempts.read_text() + "x" if attempts.exists() else "x"
        )
        if folder.endswith("broken"):
            raise ValueError("no data")
        if folder.endswith("killed") and len(attempts.read_text()) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"state": "done", "message": None, "seconds": {}}

    folders = [tmp_path / name for name in ("whole", "killed", "broken")]
    for folder in folders:
        folder.mkdir()
    found = {}
    runners.run_ray(
        [str(folder) for folder in folders],
        lambda folder, status: found.update({folder: status}),
        run=run,
    )
    whole, killed, broken = (found[str(folder)] for folder in folders)
    assert whole["state"] == killed["state"] == "done", found
    assert (tmp_path / "killed" / "attempts").read_text() == "xx"
    assert broken["state"] == "failed"
    assert broken["message"] == "ValueError: no data"
