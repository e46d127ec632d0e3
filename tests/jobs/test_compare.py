"""Trials: what is there is not done again, what changed is, and two at a time give what one gives."""

import shutil
from dataclasses import replace

import pytest
import torch
from commands import LEARN, checkpoint, config_of

from memlayer.decoders import files
from memlayer.evaluation.report import CONTROL
from memlayer.jobs.compare import (
    ANSWERS,
    Trial,
    choose,
    read_answers,
    row,
    run_trial,
    run_trials,
    trial_is_done,
    write_answers,
)

__all__ = ["checkpoint"]  # a fixture
KNOWN = (0, 12)


def trial(base, folder, method="sparse memory", rate=1.0):
    settings = {"learning_rate": rate}
    config = config_of(LEARN, folder, checkpoint=str(base), learn=settings)
    return Trial(method, "" if method == CONTROL else f"lr {rate}", config, KNOWN)


def test_a_trial_that_would_save_checkpoints_is_refused_before_any_is_run(checkpoint, tmp_path):
    """Resumed, it would be timed from the middle."""
    one = trial(checkpoint, tmp_path / "one")
    saving = {"save_strategy": "steps", "save_steps": 1}
    other = replace(one, config=replace(one.config, trainer=one.config.trainer | saving))
    with pytest.raises(ValueError, match="save_strategy is 'steps': a trial of a comparison is timed"):
        run_trials([one, other], workers=1, progress=print)
    assert not one.folder.exists()


@pytest.fixture(scope="module")
def one_by_one(checkpoint, tmp_path_factory):
    """The control and two strengths, run in this process."""
    folder = tmp_path_factory.mktemp("one by one")
    trials = [trial(checkpoint, folder / "control", CONTROL)]
    trials += [trial(checkpoint, folder / str(rate), rate=rate) for rate in (1.0, 20.0)]
    for each in trials:
        run_trial(each)
    return trials


def copy_of(one, folder):
    """The same trial, as done in another folder."""
    shutil.copytree(one.folder, folder)
    return replace(one, config=replace(one.config, output=str(folder)))


def test_two_at_a_time_give_the_answers_of_one_by_one_and_only_what_is_missing_is_run(tmp_path, checkpoint, one_by_one):
    trials = [trial(checkpoint, tmp_path / "control", CONTROL)]
    trials += [trial(checkpoint, tmp_path / str(rate), rate=rate) for rate in (1.0, 20.0)]
    run_trial(trials[0])
    there = (trials[0].folder / ANSWERS).stat().st_mtime_ns
    reported = []
    run_trials(trials, workers=2, progress=reported.append)
    assert sorted(map(repr, reported)) == sorted(map(repr, trials))
    assert (trials[0].folder / ANSWERS).stat().st_mtime_ns == there
    for ours, theirs in zip(trials, one_by_one, strict=True):
        assert read_answers(ours.folder) == read_answers(theirs.folder)
    assert read_answers(trials[1].folder) != read_answers(trials[2].folder), "the strengths make a difference"
    written = [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    run_trials(trials, workers=2, progress=reported.append)
    assert written == [path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert len(reported) == 2 * len(trials)


def test_a_trial_is_done_only_with_the_same_config_questions_and_base(tmp_path, checkpoint, one_by_one):
    done = one_by_one[1]
    assert trial_is_done(done)
    config = replace(done.config, learn=replace(done.config.learn, steps_per_fact=3))
    with pytest.raises(ValueError, match=r"of another run \(learn.steps_per_fact was 2, is 3\)"):
        trial_is_done(replace(done, config=config))
    with pytest.raises(ValueError, match="SHA-256 of questions was"):
        trial_is_done(replace(done, known=(0, 13)))
    base = shutil.copytree(checkpoint, tmp_path / "base")
    moved = replace(done, config=replace(done.config, checkpoint=str(base)))
    assert trial_is_done(moved), "the same model under another name"
    model, tokenizer = files.load(base)
    torch.nn.init.zeros_(next(model.parameters()))
    files.save(model, tokenizer, base)
    with pytest.raises(ValueError, match="SHA-256 of checkpoint was"):
        trial_is_done(moved)


def test_a_trial_that_does_not_fit_its_folder_is_refused_before_any_is_run(tmp_path, one_by_one):
    there = copy_of(one_by_one[1], tmp_path / "run")
    answers = read_answers(there.folder)
    changed = replace(there, config=replace(there.config, learn=replace(there.config.learn, num_rows=5)))
    fresh = trial(there.config.checkpoint, tmp_path / "fresh")
    with pytest.raises(ValueError, match=r"learn\.num_rows was 4, is 5"):
        run_trials([fresh, changed], workers=1, progress=print)
    assert not fresh.folder.exists()
    assert read_answers(there.folder) == answers


def test_a_trial_that_fails_leaves_nothing_behind(tmp_path, checkpoint):
    failing = trial(checkpoint, tmp_path / "run")
    config = replace(failing.config, learn=replace(failing.config.learn, num_rows=65))
    with pytest.raises(ValueError, match="num_rows is 65"):
        run_trial(replace(failing, config=config))
    assert not list(failing.folder.iterdir())


def test_answers_are_read_back_as_they_were_written(tmp_path, one_by_one):
    answers = read_answers(one_by_one[2].folder)
    write_answers(answers, tmp_path)
    assert read_answers(tmp_path) == answers
    assert (tmp_path / ANSWERS).read_bytes() == (one_by_one[2].folder / ANSWERS).read_bytes()


def test_a_row_compares_a_trial_with_the_control(one_by_one):
    before = read_answers(one_by_one[0].folder)
    control, _, strong = (row(each, before) for each in one_by_one)
    assert control["parameters_changed"] == 0
    assert control["forgetting_seen"] == 0
    assert strong["parameters_changed"] > 0
    assert strong["known_seen_before"] == control["known_seen_after"] > 0
    assert (strong["method"], strong["strength"], strong["chosen"]) == ("sparse memory", "lr 20.0", False)


def measured(method, strength, learning, known):
    return {"method": method, "strength": strength, "learning_unseen": learning, "known_seen_after": known}


def test_the_strength_that_learned_most_is_chosen_and_of_equals_the_one_that_forgot_least():
    rows = [
        measured("a", "weak", 0.4, 0.9),
        measured("a", "strong", 0.6, 0.1),
        measured("a", "too strong", 0.5, 0.2),
        measured("b", "weak", 0.3, 0.5),
        measured("b", "middle", 0.3, 0.7),
        measured("b", "strong", 0.3, 0.6),
    ]
    assert choose(rows) == choose(rows[::-1]) == {"a": "strong", "b": "middle"}
