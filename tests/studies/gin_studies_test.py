"""The studies that ship: everything that their processes get is parsed."""

import pathlib

import pytest

from cappa_tf import config
from cappa_tf.studies.study import Study
from cappa_tf.training import train as train_module

ROOT = pathlib.Path(__file__).resolve().parents[2]
STUDIES = [
    path.relative_to(ROOT).as_posix()
    for path in sorted(ROOT.glob("gin/studies/*.gin"))
    if "comparison.compare:" in path.read_text()
]


def read(path):
    config.parse([path], [], root=config.STUDY_ROOT)
    return config.arguments(config.STUDY_ROOT)["study"]


@pytest.mark.parametrize("path", STUDIES)
def test_what_every_process_gets_can_be_used(path, monkeypatch, capsys):
    """Runs are built, too, and refused as they would be when they start."""
    monkeypatch.setattr(train_module, "_report", lambda *_: {})
    study = read(path)
    assert isinstance(study, Study)
    seen = set()
    for cell in study.cells(lambda *_: 1e9):
        described = cell.description()
        # The seed is the only difference from another cell of the group.
        if cell.group in seen:
            continue
        seen.add(cell.group)
        train = config_of(cell.gin_files, cell.gin_params)
        assert train["settings"].total_steps == max(1, cell.steps)
        assert train["settings"].batch_size == cell.batch_size
        assert train["settings"].seed == cell.seed
        config.run(dry_run=True)
        if cell.evaluation:
            config.parse(
                cell.evaluation,
                cell.evaluation_params,
                root=config.EVALUATION_ROOT,
            )
            bound = config.arguments(config.EVALUATION_ROOT)
            assert bound["evaluators"]
        for one in cell.transfer:
            params = [*one.gin_params, "SEED = 0", "ENCODER = 'there'"]
            config.parse(one.gin_files, params, workdir="probe")
        assert set(described) == {"train", "transfer", "evaluate"}


def config_of(gin_files, gin_params):
    config.parse(gin_files, gin_params, workdir="run")
    return config.arguments()


@pytest.mark.parametrize("path", STUDIES)
def test_a_study_opens_with_the_command_that_runs_it(path):
    start = (ROOT / path).read_text().split("from __gin__")[0]
    assert f"python tools/compare.py --gin_file={path}" in start
