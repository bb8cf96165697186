"""The cells of a study: what is matched, and what is refused."""

import pytest

from cappa_tf.studies.study import Method, Size, Study, Transfer


def method(name, **kwargs):
    return Method(name=name, gin_files=[f"{name}.gin"], **kwargs)


def study(**kwargs):
    given = {
        "name": "test",
        "methods": [method("a"), method("b")],
        "batch_size": 10,
        "images": 1_000,
        "seeds": 2,
    }
    return Study(**given | kwargs)


def costs(files, params):
    """FLOPs per image: those of b are four times those of a."""
    del params
    return {"a.gin": 100, "b.gin": 400}[files[0]]


def test_every_method_sees_the_same_images():
    cells = study().cells(costs)
    assert [c.name for c in cells] == [
        "a-seed0",
        "b-seed0",
        "a-seed1",
        "b-seed1",
    ]
    assert {c.images for c in cells} == {1_000}
    assert [c.flops for c in cells[:2]] == [1e5, 4e5]
    assert "TOTAL_STEPS = 100" in cells[0].gin_params
    assert "SEED = 1" in cells[2].gin_params
    assert "BATCH_SIZE = 10" in cells[0].gin_params


def test_matched_by_flops_every_method_spends_the_same():
    cells = study(matched_by="flops").cells(costs)
    assert [c.images for c in cells[:2]] == [1_000, 250]
    assert cells[0].flops == cells[1].flops
    with pytest.raises(ValueError, match="cannot be counted"):
        study(matched_by="flops").cells(lambda *_: None)


def test_matched_by_time_a_faster_method_sees_more_images():
    methods = [method("a", time=2.0), method("b", time=0.5)]
    cells = study(methods=methods, matched_by="time").cells(costs)
    assert [c.images for c in cells[:2]] == [1_000, 4_000]
    with pytest.raises(ValueError, match="no `time`.*'time' with 'c'"):
        study(methods=[methods[0], method("c")], matched_by="time").cells(
            lambda *_: None
        )


def test_a_method_may_have_another_batch_and_sees_as_many_images():
    methods = [method("a"), method("b", gin_params=["BATCH_SIZE = 40"])]
    a, b = study(methods=methods, seeds=1).cells(costs)
    assert (a.steps, b.steps) == (100, 25)
    assert a.images == b.images


def test_random_weights_are_evaluated_without_training():
    methods = [method("a"), method("b", untrained=True)]
    cell = study(methods=methods, seeds=1).cells(costs)[1]
    assert cell.images == cell.flops == 0
    assert {"LEARNING_RATE = 0.0", "TOTAL_STEPS = 1"} < set(cell.gin_params)


def test_sizes_and_lengths_are_crossed():
    sizes = [
        Size(name="s", gin_files=["s.gin"]),
        Size(name="b", gin_params=["HIDDEN_DIM = 8"]),
    ]
    cells = study(sizes=sizes, images=[100, 200], seeds=1).cells(costs)
    assert len(cells) == 8
    assert cells[0].name == "a-s-100-seed0"
    assert cells[0].gin_files == ("a.gin", "s.gin")
    assert "HIDDEN_DIM = 8" in cells[2].gin_params
    # Methods are compared at the same size and length.
    assert len({c.contrast for c in cells}) == 4


def test_a_transfer_starts_from_each_cell_with_its_seed():
    probe = Transfer(name="probe", gin_files=["probe.gin"])
    cell = study(transfer=[probe]).cells(costs)[2]
    assert cell.description()["transfer"] == {
        "probe": ["--gin_file=probe.gin", "--gin_param=SEED = 1"]
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": []}, "`methods`"),
        ({"methods": [method("a"), method("a")]}, "different names"),
        ({"images": 5}, "at least `batch_size`"),
        ({"seeds": [-1]}, "`seeds`"),
        ({"seeds": 0}, "`seeds`"),
        ({"reference": "c"}, "`reference`"),
        ({"matched_by": "steps"}, "`matched_by`"),
    ],
)
def test_a_study_that_cannot_be_run_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        study(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "a/b"}, "names a folder"),
        ({"gin_files": []}, "must name a file"),
        ({"series": "share"}, "go together"),
    ],
)
def test_a_method_that_cannot_be_run_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Method(**{"name": "a", "gin_files": ["a.gin"], **given})


def test_a_batch_size_that_is_not_a_number_is_named():
    methods = [method("a", gin_params=["BATCH_SIZE = %OTHER"])]
    with pytest.raises(ValueError, match="BATCH_SIZE = %OTHER"):
        study(methods=methods).cells(costs)
