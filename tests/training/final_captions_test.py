"""What a run does with its test split at the end."""

import pytest
import small_run

from cappa_tf.evaluation.captioning import evaluate_captions
from cappa_tf.inference.captions import CaptionDecoder
from cappa_tf.models.sampling import BeamSearch
from cappa_tf.saving.run_folder import load_model
from cappa_tf.training import results
from cappa_tf.training.settings import EvaluationSettings


def test_final_captions_are_searched_by_the_sampler_of_the_run(
    tmp_path, monkeypatch
):
    small_run.write_data(tmp_path)
    shown = []
    monkeypatch.setattr(
        results, "write_sheet", lambda path, rows, **_: shown.extend(rows)
    )
    sampler = BeamSearch(num_beams=3, length_penalty=0.0)
    workdir = str(tmp_path / "run")
    # Determinism is a setting of the process, which other tests share.
    small_run.run(
        tmp_path,
        workdir,
        total_steps=2,
        sampler=sampler,
        deterministic=False,
    )
    model, data = load_model(workdir), small_run.data(str(tmp_path), "val")
    beam, greedy = (
        evaluate_captions(
            CaptionDecoder(model, data.tokenizer, 4, **options), data
        )
        for options in ({"sampler": sampler}, {})
    )
    assert len(shown) == 5
    found = [row.caption for row in shown]
    assert found == [row.caption for row in beam.rows[:5]]
    # After two steps they are random words, and not the most probable ones.
    assert found != [row.caption for row in greedy.rows[:5]]


def test_an_unknown_sampler_is_refused_at_the_start():
    with pytest.raises(ValueError, match="`sampler` must be"):
        EvaluationSettings(sampler="beam")
