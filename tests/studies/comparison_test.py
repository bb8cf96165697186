"""A study from its cells to the report, with programs that only pretend."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from cappa_tf.saving.run_lock import RunLock
from cappa_tf.studies import cell as cells
from cappa_tf.studies import comparison, results, runners
from cappa_tf.studies.results import lower_is_better
from cappa_tf.studies.study import Method, Study, Transfer
from cappa_tf.studies.table import Entry, mean_and_deviation
from cappa_tf.training.reporting.summaries import Summaries
from cappa_tf.utils import files
from tools import compare as compare_tool

pytest.importorskip("matplotlib", reason="pip install '.[study]'")


def make(**kwargs):
    given = {
        "name": "A <small> study",
        "methods": [
            Method(name="ours", gin_files=["ours.gin"]),
            Method(name="theirs", gin_files=["theirs.gin"]),
        ],
        "batch_size": 4,
        "images": 40,
        "seeds": 2,
        "evaluation": ["evaluation.gin"],
        "reference": "theirs",
        "transfer": [Transfer(name="probe", gin_files=["probe.gin"])],
    }
    return Study(**given | kwargs)


class Programs:
    """Writes the files that tools/train.py and tools/evaluate.py write."""

    def __init__(self):
        self.calls = []
        self.broken = None

    def __call__(self, tool, arguments, log):
        given = dict(a[2:].split("=", 1) for a in arguments)
        folder = given.get("workdir") or given["output"]
        self.calls.append((tool, os.path.relpath(folder, "cells")))
        files.write_text(log, "starting\nValueError: no data\n")
        if self.broken and self.broken in folder:
            return 1
        good = 0.75 if "ours" in folder else 0.5
        if tool == "train":
            files.makedirs(folder)
            metrics = {"step": 10, "top_1": good, "interrupted": None}
            files.write_json(os.path.join(folder, "results.json"), metrics)
        else:
            metrics = {"metrics": {"10_shot": good}}
            files.write_json(os.path.join(folder, "fewshot.json"), metrics)
            items = {
                "10_shot": [1.0] * int(8 * good) + [0.0] * int(8 * (1 - good))
            }
            path = os.path.join(folder, "fewshot.items.json")
            files.write_json(path, items)
        return 0


@pytest.fixture
def programs(monkeypatch):
    """In place of processes; cells run in this one, one after the other."""
    programs = Programs()
    monkeypatch.setattr(cells, "_call", programs)
    monkeypatch.setattr(
        runners, "_run", lambda folder, **options: cells.run(folder)
    )
    return programs


def compare(tmp_path, study=None, **kwargs):
    lines = []
    rows = comparison.compare(
        study or make(),
        str(tmp_path),
        flops_of=lambda *_: 1e9,
        log=lines.append,
        **kwargs,
    )
    return rows, lines


def test_a_study_ends_in_a_report(tmp_path, programs):
    study = make(metrics=["fewshot/10_shot", "top_1", "top_one"])
    rows, lines = compare(tmp_path, study)
    assert [row.state for row in rows] == ["done"] * 4
    assert len(programs.calls) == 4 * 3
    table = (tmp_path / "table.md").read_text().splitlines()
    assert table[0] == "| method | seeds | fewshot/10_shot | top_1 |"
    assert table[2].startswith("| ours | 2 of 2 | 0.75 ± 0 (p ")
    assert table[3] == "| theirs | 2 of 2 | 0.5 ± 0 | 0.5 ± 0 |"
    assert "\n".join(table) in lines
    assert "No run has the metric 'top_one' of the study" in lines
    content = json.loads((tmp_path / "report.json").read_text())
    ours, theirs = content["table"]
    assert ours["metrics"]["fewshot/10_shot"]["mean"] == 0.75
    assert ours["metrics"]["probe/top_1"]["mean"] == 0.75
    difference = ours["metrics"]["fewshot/10_shot"]["difference"]
    assert difference["mean"] == pytest.approx(0.25)
    assert difference["items"] == 8
    # Nothing but scores of items can be compared item by item.
    assert ours["metrics"]["top_1"]["difference"] is None
    assert theirs["metrics"]["fewshot/10_shot"]["difference"] is None
    page = (tmp_path / "report.html").read_text()
    assert "A &lt;small&gt; study" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert "ours,0" in (tmp_path / "cells.csv").read_text()


@pytest.mark.parametrize(
    ("mean", "deviation", "seeds", "text"),
    [
        (0.75123, 0.01234, 2, "0.751 ± 0.012"),
        (25_600.0, 3_200.0, 2, "25,600 ± 3,200"),
        (99.9, None, 1, "99.9 (1 of 2 seeds)"),
        (0.045, 8.5e-18, 2, "0.045 ± 0"),
    ],
)
def test_numbers_of_the_table(mean, deviation, seeds, text):
    assert mean_and_deviation(Entry(mean, deviation, seeds), 2) == text


def test_what_is_done_is_not_done_again(tmp_path, programs):
    compare(tmp_path)
    done = len(programs.calls)
    compare(tmp_path)
    assert len(programs.calls) == done
    compare(tmp_path, again=["ours-seed1"])
    assert len(programs.calls) == done + 3


def test_a_cell_resumes_after_its_last_complete_stage(tmp_path, programs):
    programs.broken = "ours-seed0/evaluation"
    rows, _ = compare(tmp_path)
    assert rows[0].state == "failed"
    programs.broken, programs.calls = None, []
    rows, _ = compare(tmp_path)
    assert [tool for tool, _ in programs.calls] == ["evaluate"]
    assert rows[0].state == "done"


def test_a_cell_that_fails_is_a_row_that_says_so(tmp_path, programs):
    programs.broken = "ours-seed0/run"
    rows, lines = compare(tmp_path)
    assert [row.state for row in rows] == ["failed"] + ["done"] * 3
    assert rows[0].message == "train: ValueError: no data"
    assert any("ours-seed0: failed train: ValueError" in line for line in lines)
    page = (tmp_path / "report.html").read_text()
    assert "ours-seed0: train: ValueError: no data" in page
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["table"][0]["metrics"]["fewshot/10_shot"]["seeds"] == 1


def test_the_command_fails_if_a_cell_did(tmp_path, programs, monkeypatch):
    programs.broken = "ours-seed0/run"
    rows, _ = compare(tmp_path)
    monkeypatch.setattr(compare_tool, "compare", lambda options: rows)
    with pytest.raises(SystemExit, match="1 of 4 cells failed: ours-seed0"):
        compare_tool.main(["compare"])
    monkeypatch.setattr(compare_tool, "compare", lambda options: rows[1:])
    compare_tool.main(["compare"])


def test_a_cell_of_other_arguments_is_refused(tmp_path, programs):
    compare(tmp_path)
    with pytest.raises(ValueError, match="--again=ours-seed0"):
        compare(tmp_path, make(images=80))


def test_another_evaluation_keeps_the_runs(tmp_path, programs):
    compare(tmp_path)
    programs.calls = []
    compare(tmp_path, make(evaluation=["more.gin"]))
    assert [tool for tool, _ in programs.calls] == ["evaluate"] * 4
    programs.calls = []
    other = Transfer(name="probe", gin_files=["other.gin"])
    compare(tmp_path, make(evaluation=["more.gin"], transfer=[other]))
    assert [tool for tool, _ in programs.calls] == ["train"] * 4


def test_a_second_program_on_the_study_is_refused(tmp_path, programs):
    with (
        RunLock(str(tmp_path)),
        pytest.raises(ValueError, match="another run is using"),
    ):
        compare(tmp_path)
    assert not programs.calls


def test_the_message_of_a_log_is_not_its_progress_bar(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text(
        "  7%|7 | 186/2500 [01:30<12:46]\rSIGTERM at step 186: saved\n"
        "  7%|7 | 186/2500 [01:31<12:46]\r 7%|7 | 186/2500\n\n"
    )
    assert cells._last_line(str(path)) == "SIGTERM at step 186: saved"


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="cores cannot be bound here"
)
class TestProcesses:
    """`--processes`, with as many cores as it says."""

    @pytest.fixture(autouse=True)
    def cores(self, monkeypatch):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3, 4, 6, 7})

    def test_cells_share_the_cores_and_run_at_the_same_time(
        self, tmp_path, programs, monkeypatch
    ):
        both = threading.Barrier(2, timeout=60)
        given = []

        def run(folder, options):
            both.wait()
            given.append(tuple(options))
            return cells.run(folder)

        monkeypatch.setattr(runners, "_run", run)
        rows, _ = compare(tmp_path, processes=2)
        assert [row.state for row in rows] == ["done"] * 4
        assert set(given) == {("--cores=1,3",), ("--cores=4,6,7",)}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"processes": 6}, "at most the 5 CPU cores"),
            ({"processes": 0}, "processes"),
            ({"processes": 2, "devices": ["0"]}, "give one of them"),
            ({"processes": 2, "runner": "none"}, "goes with runner='local'"),
            ({"slurm_options": ["--gres=gpu:1"]}, "goes with runner='slurm'"),
        ],
    )
    def test_what_cannot_be_shared_is_refused(
        self, tmp_path, programs, options, message
    ):
        with pytest.raises(ValueError, match=message):
            compare(tmp_path, **options)
        assert not programs.calls


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="cores cannot be bound here"
)
def test_the_programs_of_a_cell_run_on_its_cores(tmp_path, monkeypatch):
    cells.write(str(tmp_path), {"train": [], "transfer": {}, "evaluate": []})
    allowed, seen = os.sched_getaffinity(0), []

    def program(tool, arguments, log):
        command = "import os; print(*os.sched_getaffinity(0))"
        seen.append(subprocess.check_output([sys.executable, "-c", command]))
        files.write_text(log, "out of disk\n")
        return 1

    monkeypatch.setattr(cells, "_call", program)
    core = max(allowed)
    monkeypatch.setattr(sys, "argv", ["cell", f"--cores={core}", str(tmp_path)])
    try:
        with pytest.raises(SystemExit):
            cells.main()
    finally:
        os.sched_setaffinity(0, allowed)
    assert seen == [f"{core}\n".encode()]


def test_lengths_give_a_power_law(tmp_path, programs):
    compare(tmp_path, make(images=[40, 80, 160], seeds=1))
    content = json.loads((tmp_path / "report.json").read_text())
    laws = {(p["method"], p["metric"]): p for p in content["predictions"]}
    # The programs find the same whatever the length.
    law = laws["ours", "fewshot/10_shot"]
    assert law["exponents"]["FLOPs of training"] == pytest.approx(0, abs=1e-9)
    assert law["predicted"] == pytest.approx(0.75)
    assert law["flops"] == 4 * 160e9
    assert (tmp_path / "figures" / "scaling_fewshot_10_shot.png").exists()


@pytest.mark.parametrize(
    ("metric", "lower"),
    [
        ("nll_per_token", True),
        ("classification/calibration_error", True),
        ("images until scenes/micro is 0.75", True),
        ("seconds until the reference's top_1", True),
        ("fewshot/10_shot", False),
        ("cider", False),
    ],
)
def test_the_better_value_is_known_by_the_metric(metric, lower):
    assert lower_is_better(metric) == lower


def test_the_time_until_the_references_loss_is_interpolated():
    study = make(until="validation/nll")
    planned = study.cells(lambda *_: 1e9)[:3]
    curves = {
        # The same seed: the best of the reference is 2.0 after 30 s.
        "theirs-seed0": ([(1, 4.0), (2, 3.0), (3, 2.0), (4, 2.5)], 10.0),
        "ours-seed0": ([(1, 3.0), (2, 1.0)], 8.0),
        "ours-seed1": ([(1, 1.0)], 8.0),
    }
    rows = []
    for cell in planned:
        points, seconds = curves[cell.name]
        rows.append(
            results.Row(
                cell,
                "",
                curves={"validation/nll": points},
                seconds_at={step: step * seconds for step, _ in points},
            )
        )
    results.add_times(study, rows)
    found = {row.cell.name: row.metrics for row in rows}
    seconds, share = "seconds until the reference's nll", "share of the"
    share += " reference's time to nll"
    assert found["theirs-seed0"] == {seconds: 30.0, share: 1.0}
    # From 3.0 at 8 s to 1.0 at 16 s: 2.0 at 12 s.
    assert found["ours-seed0"] == {seconds: 12.0, share: 12.0 / 30.0}
    assert found["ours-seed1"] == {}


def test_seconds_are_those_of_all_processes(tmp_path):
    start, pause = time.time(), 3.0
    for steps in ((1, 2), (2, 3)):
        summaries = Summaries(str(tmp_path))
        for step in steps:
            summaries.scalars(step, {"loss": 10.0 * step + steps[0]}, "train/")
            time.sleep(0.02)
        summaries.close()
        if steps == (1, 2):
            time.sleep(pause)
    elapsed = time.time() - start
    curves, seconds = results.read_curves(str(tmp_path / "tensorboard"))
    # The step that was made twice has its second value.
    assert curves["train/loss"] == [(1, 11.0), (2, 22.0), (3, 32.0)]
    assert 0.0 <= seconds[1] < seconds[2] < seconds[3]
    # TensorFlow truncates the beginning of each of two files to a second.
    assert seconds[3] <= elapsed - pause + 2.0


def test_an_unknown_cell_is_refused(tmp_path, programs):
    with pytest.raises(ValueError, match="no cell 'mine'"):
        compare(tmp_path, only=["mine"])


def test_slurm_gets_a_script_for_the_cells_that_wait(tmp_path, programs):
    compare(tmp_path, only=["ours-seed0"])
    _, lines = compare(tmp_path, runner="slurm", slurm_options=["--gres=gpu:1"])
    script = (tmp_path / "slurm.sh").read_text()
    assert "#SBATCH --array=1-3\n" in script
    assert "#SBATCH --gres=gpu:1\n" in script
    listed = (tmp_path / "cells.txt").read_text().splitlines()
    assert len(listed) == 3 and all(os.path.isabs(path) for path in listed)
    assert any("sbatch" in line for line in lines)


def test_a_report_of_nothing_is_a_report(tmp_path, programs):
    rows, _ = compare(tmp_path, runner="none")
    assert {row.state for row in rows} == {"missing"}
    assert not programs.calls
    assert (tmp_path / "report.html").exists()
