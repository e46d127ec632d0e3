"""Trials: what is there is not done again, what changed is, and two at a time give what one gives."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from commands import LEARN, checkpoint, config_of, run, write_config

from memlayer.decoders import files
from memlayer.evaluation.rows import CONTROL
from memlayer.jobs.compare import (
    ANSWERS,
    PROBES,
    Trial,
    choose,
    compare,
    read_measured,
    row,
    run_trial,
    run_trials,
    trial_is_done,
    write_measured,
)
from memlayer.jobs.config import load_config
from memlayer.jobs.measure import KL

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
        assert read_measured(ours.folder) == read_measured(theirs.folder)
    assert read_measured(trials[1].folder) != read_measured(trials[2].folder), "the strengths make a difference"
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
    measured = read_measured(there.folder)
    changed = replace(there, config=replace(there.config, learn=replace(there.config.learn, num_rows=5)))
    fresh = trial(there.config.checkpoint, tmp_path / "fresh")
    with pytest.raises(ValueError, match=r"learn\.num_rows was 4, is 5"):
        run_trials([fresh, changed], workers=1, progress=print)
    assert not fresh.folder.exists()
    assert read_measured(there.folder) == measured


def test_a_trial_that_fails_leaves_nothing_behind(tmp_path, checkpoint):
    failing = trial(checkpoint, tmp_path / "run")
    config = replace(failing.config, learn=replace(failing.config.learn, num_rows=65))
    with pytest.raises(ValueError, match="num_rows is 65"):
        run_trial(replace(failing, config=config))
    assert not list(failing.folder.iterdir())


@pytest.mark.parametrize("workers", [1, 2])
def test_a_trial_that_fails_is_named_when_all_others_are_done(tmp_path, checkpoint, workers):
    trials = [trial(checkpoint, tmp_path / str(rate), rate=rate) for rate in (1.0, 5.0, 20.0)]
    config = trials[1].config
    trials[1] = replace(trials[1], config=replace(config, learn=replace(config.learn, num_rows=65)))
    reported = []
    sentence = r"^sparse memory lr 5\.0: num_rows is 65, .*; the other trials of the 3 are done and stay$"
    with pytest.raises(ValueError, match=sentence):
        run_trials(trials, workers=workers, progress=reported.append)
    assert [trial_is_done(each) for each in trials] == [True, False, True]
    assert sorted(map(repr, reported)) == sorted(map(repr, trials[::2]))


def test_a_trial_that_fails_does_not_stop_later_seeds(tmp_path, comparison):
    path = comparison(compare={"num_validation": 0})
    told = yaml.safe_load(path.read_text())
    told["methods"]["full"] = told["methods"]["sparse memory"] | {
        "learning_rates": [1],
        "settings": ["learn.num_rows=65"],
    }
    path.write_text(yaml.safe_dump(told))
    sentence = r"^seed 0: full lr 1: num_rows is 65, .* 4 are done and stay; seed 1: full lr 1: num_rows is 65, .*"
    with pytest.raises(ValueError, match=sentence):
        compare(load_config(path))
    done = {file.parent.name for file in (tmp_path / "out" / "trials" / "seed1").rglob(ANSWERS)}
    assert done == {CONTROL, "sparse memory lr 1", "sparse memory lr 20"}
    assert not (tmp_path / "out" / "report.md").exists()


def test_what_was_measured_is_read_back_as_it_was_written(tmp_path, one_by_one):
    measured = read_measured(one_by_one[2].folder)
    write_measured(measured, tmp_path)
    assert read_measured(tmp_path) == measured
    for name in (ANSWERS, PROBES):
        assert (tmp_path / name).read_bytes() == (one_by_one[2].folder / name).read_bytes()
    measured.answers[0] = replace(measured.answers[0], prediction="a\u2028b\x85c\rd")
    write_measured(measured, tmp_path)
    assert read_measured(tmp_path) == measured


def test_a_row_compares_a_trial_with_the_control(one_by_one):
    before = read_measured(one_by_one[0].folder)
    control, _, strong = (row(each, before) for each in one_by_one)
    assert control["parameters_changed"] == 0
    assert control["forgetting_seen"] == 0
    assert strong["parameters_changed"] > 0
    assert strong["known_seen_before"] == control["known_seen_after"] > 0
    assert (strong["method"], strong["strength"], strong["chosen"]) == ("sparse memory", "lr 20.0", False)


def test_how_far_a_model_went_on_what_it_was_taught_grows_with_the_strength(one_by_one):
    before = read_measured(one_by_one[0].folder)
    assert row(one_by_one[0], before)["probes"] == []
    weak, strong = (row(each, before)["probes"] for each in one_by_one[1:])
    assert [each["name"] for each in weak + strong] == [KL, KL]
    assert weak[0]["before"] == 0 < weak[0]["after"] < strong[0]["after"]


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


@pytest.fixture
def comparison(checkpoint, tmp_path):
    """A comparison of two methods over two seeds with a question set and a text as probes; ``change`` alters it."""
    learn = write_config(tmp_path / "learn.yaml", LEARN, output="-", learn={"num_rows": 16})
    full = write_config(tmp_path / "full.yaml", LEARN, output="-", learn={"method": "full"})
    asked = [{"question": f"Who lives in city {n}?", "answers": [f"person {n}"]} for n in range(3)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
    (tmp_path / "text.txt").write_text("\n\n".join(f"The capital of country {n} is city {n}." for n in range(30)))
    told = {
        "job": "compare",
        "output": str(tmp_path / "out"),
        "checkpoint": str(checkpoint),
        "note": "Three facts each, for a test.",
        "methods": {
            "sparse memory": {"config": str(learn), "learning_rates": [1, 20]},
            "full": {"config": str(full), "learning_rates": [1e-3, 0.03], "settings": ["learn.order=rounds"]},
        },
        "data": {"num_known": 24},
        "compare": {"seeds": 2, "num_validation": 2, "num_test": 3, "first_test": 10, "known_test": [0, 8]},
        "probes": {"questions": [str(tmp_path / "asked.jsonl")], "texts": [str(tmp_path / "text.txt")], "length": 8},
    }
    told["compare"]["workers"] = 1  # several have a test of their own
    told["probes"] |= {"num_windows": 4, "prompts": {"style": "plain", "frame": "{question}"}}

    def change(**sections):
        merged = {
            key: value | sections.get(key, {}) if isinstance(value, dict) else value for key, value in told.items()
        }
        (tmp_path / "compare.yaml").write_text(yaml.safe_dump(merged, sort_keys=False))
        return tmp_path / "compare.yaml"

    return change


def test_a_comparison_teaches_every_method_the_same_and_goes_on_where_it_was(tmp_path, comparison):
    path = comparison(compare={"num_validation": 0})
    done = run("train.py", path, timeout=250)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(each["method"], each["strength"]) for each in results["rows"]] == [
        (CONTROL, ""),
        *(("sparse memory", f"lr {rate}") for rate in ("1", "20")),
        *(("full", f"lr {rate}") for rate in ("0.001", "0.03")),
    ]
    trials = {path.parent for path in (tmp_path / "out" / "trials").rglob("config.yaml")}
    assert len(trials) == 2 * 5, "two seeds, five trials each"
    taught = {path: load_config(path / "config.yaml").data for path in trials}
    assert {(data.first_new, data.num_new) for data in taught.values()} == {(10, 3), (13, 3)}
    for each in results["rows"]:
        assert (each["num_seeds"], each["learning_seen_n"], each["known_seen_n"]) == (2, 3, 8)
        asked, _, _, text, *kl = each["probes"]
        assert (asked["name"], asked["n"], text["name"], text["n"]) == ("asked", 3, "text", 4)
        assert len(kl) == (each["method"] != CONTROL)
    report = (tmp_path / "out" / "report.md").read_text()
    assert done.stdout.startswith("Three facts each, for a test.\n")
    assert "Three facts each, for a test." in report
    assert "over seeds" in report
    for shown in (done.stdout, report):
        assert "McNemar" in shown
    shutil.rmtree(one := tmp_path / "out" / "trials" / "seed1" / "test" / "full lr 0.03")
    for name in ("config.yaml", "results.json", "report.md", "pareto.png", "samples.jsonl"):
        (tmp_path / "out" / name).unlink()
    there = {path: (path / ANSWERS).stat().st_mtime_ns for path in trials - {one}}
    assert run("train.py", path).returncode == 0
    assert there == {path: (path / ANSWERS).stat().st_mtime_ns for path in trials - {one}}
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [without_seconds(each) for each in again["rows"]] == [without_seconds(each) for each in results["rows"]]
    assert "holds this result already" in run("train.py", path).stdout


def test_a_method_that_trains_nothing_is_compared_at_strengths_of_its_own(comparison, tmp_path):
    learned = {"method": "retrieval", "statements": 2, "questions": 1}
    settings = write_config(tmp_path / "retrieval.yaml", LEARN | {"learn": learned}, output="-")
    path = comparison(compare={"seeds": 1, "num_validation": 0}, probes={"known_only": True})
    told = yaml.safe_load(path.read_text())
    told["methods"] = {"retrieval": {"config": str(settings), "strengths": [0.2, 1.5]}}
    path.write_text(yaml.safe_dump(told))
    compare(load_config(path))
    control, always, never = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [each["strength"] for each in (always, never)] == ["min_share 0.2", "min_share 1.5"]
    assert always["parameters_changed"] == never["parameters_changed"] == 0
    kl = [each["probes"][-1] for each in (always, never)]
    assert [each["name"] for each in kl] == [KL, KL]
    assert kl[0]["after"] > 0 == kl[1]["after"], "a lesson that is never shown changes nothing"
    assert never["learning_unseen"] == control["learning_unseen"]
    assert (tmp_path / "out" / "trials" / "seed0" / "test" / "retrieval min_share 0.2" / "store").is_dir()


def without_seconds(row):
    return {key: value for key, value in row.items() if not key.startswith("seconds")}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"compare": {"first_validation": 11}}, "validation takes 11 to 13 and the test 10 and up"),
        ({"compare": {"known_test": [3]}}, "compare.known_test is [3], must be the first and the last"),
        ({"compare": {"known_test": [20, 25]}}, "known facts up to number 25 are asked for, there are 24"),
        ({"data": {"num_new": 3}}, "data.num_new is set: compare.first_test and compare.num_test say what is taught"),
        ({"methods": {"full": {"config": "absent.yaml", "learning_rates": [1]}}}, "methods.full.config is absent.yaml"),
        (
            {"methods": {"full": {"config": "configs/pretrain.yaml", "learning_rates": [1]}}},
            "of job pretrain: name one",
        ),
        ({"methods": {"full": {"config": "configs/learn_full.yaml", "learning_rates": [1, 1]}}}, "each once"),
        (
            {"methods": {"full": {"config": "configs/learn_full.yaml", "strengths": [1]}}},
            "methods.full.strengths: full is varied in learn.learning_rate, by learning_rates",
        ),
        (
            {"methods": {"full": {"config": "configs/learn_full.yaml"}}},
            "learning_rates of configs/learn_full.yaml are []",
        ),
        ({"methods": {"a/b": {"config": "configs/learn_full.yaml", "learning_rates": [1]}}}, "not with a slash"),
        ({"methods": {CONTROL: {"config": "configs/learn_full.yaml", "learning_rates": [1]}}}, "not 'do nothing'"),
        ({"probes": {"questions": ["absent.jsonl"]}}, "absent.jsonl"),
        ({"probes": {"length": 97}}, "length of the probes is 97, the model has 96 positions"),
        ({"probes": {"prompts": {"frame": "{question} " + "! " * 99}}}, "the model has 96 positions"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused_before_anything_is_taught(comparison, tmp_path, changes, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(sentence)):
        compare(load_config(comparison(**changes)))
    assert not (tmp_path / "out" / "trials").exists()


def test_after_learning_only_what_was_known_is_asked_if_told_so(comparison, tmp_path):
    one = {"methods": {"full": None}, "compare": {"seeds": 1, "num_validation": 0}, "probes": {"known_only": True}}
    path = comparison(**one)
    told = yaml.safe_load(path.read_text())
    del told["methods"]["full"]
    path.write_text(yaml.safe_dump(told))
    compare(load_config(path))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    control, *others = (each["probes"][0] for each in results["rows"])
    assert control["n"] == 3
    assert {each["n"] for each in others} == {control["kept"]} == {0}
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| asked | 0 | - | - | none was known before | - | - | - | - |" in report
    assert "nan" not in report
