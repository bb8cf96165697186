"""The step is one program with static shapes, as a TPU requires."""

import os
import re

import processes
import pytest
import small_run

# The program passed to XLA's compiler, one file per compilation.
_DUMPED = "before_optimizations.txt"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Texts of all step programs that a run of 20 steps compiled."""
    folder = tmp_path_factory.mktemp("compiled")
    small_run.write_data(str(folder / "data"))
    dump = folder / "dump"
    process = processes.Process(
        small_run.compiled_run,
        str(folder / "data"),
        str(folder / "run"),
        log=folder / "log.txt",
        environment={
            "XLA_FLAGS": f"--xla_dump_to={dump} --xla_dump_hlo_as_text "
            # Only what goes into the compiler is looked at.
            "--xla_backend_optimization_level=0"
        },
    )
    assert process.wait() == 0, process.output
    names = [n for n in os.listdir(dump) if n.endswith(_DUMPED)]
    texts = [(dump / name).read_text() for name in sorted(names)]
    steps = [text for text in texts if "__update_" in text.split("\n")[0]]
    assert steps, [text.split("\n")[0] for text in texts]
    return steps


def _text_lengths(program):
    """Lengths L of the labels [A, B / A, K, L] of a program."""
    return set(re.findall(r"s32\[2,2,1,(\d+)\]", program))


def test_compiles_once_for_each_text_length(compiled):
    lengths = [_text_lengths(program) for program in compiled]
    assert all(len(found) == 1 for found in lengths), lengths
    seen = {length for found in lengths for length in found}
    assert len(compiled) == len(seen)
    assert 2 <= len(seen) <= 3 and seen <= {"3", "5", "8"}


def test_whole_step_is_inside(compiled):
    """Loss, gradients, microbatches and optimizer are one program."""
    for program in compiled:
        # The microbatches; chunks of the loss, forward and backward.
        assert program.count(" while(") >= 3
        # New values of weights and optimizer state replace the old ones.
        assert program.split("\n")[0].count("alias") > 100


def test_no_host_no_open_shape_no_doubles(compiled):
    for program in compiled:
        for word in ("infeed", "outfeed", " send(", " recv(", "callback"):
            assert word not in program, word
        assert "custom-call" not in program
        assert not re.search(r"\[[\d,]*<=", program)
        assert "f64[" not in program
