"""eval.py as a user runs it: what it writes is what the functions say, and what does not fit is refused at once."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from commands import LEARN, TINY, checkpoint, config_of, refusal, run, write_config

from memlayer.data.facts import facts_of
from memlayer.data.qa import known_questions, new_questions
from memlayer.decoders import files
from memlayer.evaluation.forgetting import scores
from memlayer.evaluation.qa import answer_questions
from memlayer.evaluation.rows import CONTROL, COSTS, result_row
from memlayer.jobs.learn import learn
from memlayer.jobs.pretrain import pretrain
from memlayer.jobs.taught import load_learned, save_learned

__all__ = ["checkpoint"]  # a fixture
WRITTEN = ["pareto.png", "report.md", "results.json", "samples.jsonl"]


@pytest.fixture(scope="module")
def learned(checkpoint, tmp_path_factory):
    """One run that wrote a patch and one that wrote a model, of the same checkpoint and facts."""
    folders = {}
    for method, rate in (("sparse_memory", 3.0), ("full", 0.03)):
        folders[method] = tmp_path_factory.mktemp("learned") / method
        settings = {"method": method, "learning_rate": rate, "steps_per_fact": 8}
        config = config_of(LEARN, folders[method], checkpoint=str(checkpoint), learn=settings)
        save_learned(learn(config), folders[method])
    return folders


def ask(model, tokenizer, config):
    """The scores that eval.py should report, one question at a time."""
    facts = facts_of(**asdict(config.data))
    questions = known_questions(facts.known, facts.wordings) + new_questions(facts.new, facts.wordings)
    return scores(answer_questions(model, tokenizer, questions, batch_size=1))


def rows_of(folder):
    return json.loads((folder / "results.json").read_text())["rows"]


def assert_row(row, before, after, **rest):
    """The measured numbers of a row are those of these scores."""
    expected = result_row(row["method"], row["strength"], before, after, seed=row["seed"], **rest)
    for key, value in expected.items():
        assert row[key] == (pytest.approx(value) if isinstance(value, float) else value), key


def test_a_checkpoint_alone_is_asked_what_it_was_pretrained_on(tmp_path, checkpoint):
    done = run("eval.py", checkpoint, "--num-new", 3, "--first-new", 5, "--output", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == WRITTEN
    (row,) = rows_of(tmp_path / "report")
    config = config_of(LEARN, tmp_path / "asked", data={"num_new": 3, "first_new": 5})
    expected = ask(*files.load(checkpoint), config)
    assert expected["known_seen"]["exact_match"] > 0.5, "the checkpoint knows what it was pretrained on"
    assert_row(row, expected, expected)
    assert row["method"] == CONTROL
    assert CONTROL in done.stdout
    samples = [json.loads(line) for line in (tmp_path / "report" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == sum(group["n"] for group in expected.values())


def test_runs_are_compared_with_their_checkpoint_on_what_they_were_taught(tmp_path, checkpoint, learned):
    done = run("eval.py", checkpoint, *learned.values(), "--output", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    control, *rows = rows_of(tmp_path / "report")
    config = config_of(LEARN, tmp_path / "asked")
    before = ask(*files.load(checkpoint), config)
    assert_row(control, before, before)
    assert [row["method"] for row in rows] == list(learned)
    for row, folder in zip(rows, learned.values(), strict=True):
        after = ask(*load_learned(checkpoint, folder), config)
        assert after != before
        assert_row(row, before, after, costs=took(folder))
        assert row["method"] in done.stdout
    runs = [json.loads(line)["run"] for line in (tmp_path / "report" / "samples.jsonl").read_text().splitlines()]
    assert sorted(set(runs)) == sorted(map(str, learned.values()))


def took(folder):
    record = json.loads((folder / "learned.json").read_text())
    return {key: record[key] for key in COSTS}


def test_facts_and_wordings_of_ones_own_are_taught_and_asked(tmp_path, checkpoint):
    wordings = {
        "capital": {
            "name": "capital of a country",
            "statements": ["The capital of [X] is [Y]", "[X] is governed from [Y]", "[X] has as its capital [Y]"],
            "questions": ["What is the capital of [X]?", "From where is [X] governed?"],
        }
    }
    (tmp_path / "wordings.json").write_text(json.dumps(wordings))
    facts = [("Norway", ["Oslo"]), ("Peru", ["Lima"])]
    lines = [json.dumps({"subject": s, "relation": "capital", "answers": a}) for s, a in facts]
    (tmp_path / "facts.jsonl").write_text("\n".join(lines))
    data = {"facts": str(tmp_path / "facts.jsonl"), "wordings": str(tmp_path / "wordings.json"), "num_known": None}
    path = write_config(
        tmp_path / "learn.yaml",
        LEARN,
        output=str(tmp_path / "out"),
        checkpoint=str(checkpoint),
        data=data,
        learn={"method": "full", "learning_rate": 0.02, "steps_per_fact": 25},
    )
    assert run("train.py", path).returncode == 0
    done = run("eval.py", checkpoint, tmp_path / "out", "--output", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    samples = [json.loads(line) for line in (tmp_path / "report" / "samples.jsonl").read_text().splitlines()]
    asked = {sample["question"]: sample for sample in samples if sample["group"] == "new"}
    assert set(asked) == {
        "The capital of Norway is",
        "The capital of Peru is",
        "From where is Norway governed?",
        "From where is Peru governed?",
    }
    assert asked["The capital of Peru is"]["prediction_before"] != "Lima"
    assert asked["The capital of Peru is"]["prediction_after"] == "Lima", "the fact taught last"
    assert len(samples) > len(asked), "known facts are still those of the checkpoint"


def test_known_facts_taught_anew_are_asked_for_their_old_answers_apart(tmp_path, checkpoint):
    """A model that learned gives their old answer no longer, and that is no forgetting."""
    known = facts_of(**asdict(config_of(LEARN, tmp_path / "asked").data)).known
    lines = [
        json.dumps({"subject": subject, "relation": fact.relation, "answers": ["Kyoto"]})
        for fact, subject in ((known[0], known[0].subject.upper()), (known[5], known[5].subject))
    ]
    (tmp_path / "facts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    settings = {"method": "full", "learning_rate": 0.02, "steps_per_fact": 25}
    data = {"facts": str(tmp_path / "facts.jsonl"), "num_known": None}
    paths = {"output": str(tmp_path / "out"), "checkpoint": str(checkpoint)}
    done = run("train.py", write_config(tmp_path / "learn.yaml", LEARN, **paths, data=data, learn=settings))
    assert f"2 of 2 facts to teach are known to {checkpoint} already, {known[0].key!r} for one" in done.stderr
    done = run("eval.py", checkpoint, tmp_path / "out", "--output", tmp_path / "report")
    assert done.returncode == 0, done.stderr
    assert "old answer" in done.stdout
    _, row = rows_of(tmp_path / "report")
    assert (row["known_seen_n"], row["old_answer_seen_n"], row["learning_seen_n"]) == (22, 2, 2)
    samples = [json.loads(line) for line in (tmp_path / "report" / "samples.jsonl").read_text("utf-8").splitlines()]
    old = {sample["fact"]: sample for sample in samples if (sample["group"], sample["wording"]) == ("replaced", "seen")}
    assert set(old) == {known[0].key, known[5].key}
    assert [sample["answers"] for sample in old.values()] == [list(known[0].answers), list(known[5].answers)]
    assert row["old_answer_seen_after"] == sum(sample["exact_match_after"] for sample in old.values()) / 2


def test_new_facts_are_asked_alone(tmp_path, checkpoint, learned):
    command = [checkpoint, learned["full"], "--num-known", 0, "--output", tmp_path / "report"]
    done = run("eval.py", *command)
    assert done.returncode == 0, done.stderr
    assert "not asked" in done.stdout
    for row in rows_of(tmp_path / "report"):
        assert (row["known_seen_n"], row["known_seen_after"], row["learning_seen_n"]) == (0, None, 2)


def test_what_is_no_learning_run_is_named(tmp_path, checkpoint):
    message = refusal("eval.py", checkpoint, checkpoint, "--output", tmp_path / "report")
    assert message == f"{checkpoint} is not what job learn writes: learned.json is missing"


def test_new_facts_of_a_file_are_asked_of_a_checkpoint_that_knows_others(tmp_path, checkpoint):
    (tmp_path / "facts.jsonl").write_text(json.dumps({"subject": "Ada Quill", "relation": "P19", "answers": ["Lima"]}))
    arguments = ["--facts", tmp_path / "facts.jsonl", "--num-known", 0, "--output", tmp_path / "report"]
    done = run("eval.py", checkpoint, *arguments)
    assert done.returncode == 0, done.stderr
    (row,) = rows_of(tmp_path / "report")
    assert (row["known_seen_n"], row["learning_seen_n"]) == (0, 1)


@pytest.mark.parametrize("method", ["sparse_memory", "full"])
def test_a_run_of_another_checkpoint_is_refused_before_any_question(tmp_path, checkpoint, learned, method):
    """Whatever it wrote, a patch or a whole model: their difference would count as forgetting."""
    other = pretrain(config_of(TINY, tmp_path / "other", seed=1))
    message = refusal("eval.py", other, learned[method], "--output", tmp_path / "report")
    sentence = "{} was not taught to the model that is in {}: it began with {}, as that was then"
    assert message == sentence.format(learned[method], other, checkpoint)
    assert not (tmp_path / "report" / "results.json").exists()
    with pytest.raises(ValueError, match="was not taught to the model that is in"):
        load_learned(other, learned[method])


def own_facts(folder, *answers):
    """A facts file in ``folder`` with a fact an answer, for the relation that is worded there."""
    subjects = ("Shop Ada", "Shop Bea", "Shop Cleo")
    lines = [
        json.dumps({"subject": subject, "relation": "city", "answers": [answer]})
        for subject, answer in zip(subjects, answers)
    ]
    (folder / "facts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    statements = ["The city of [X] is [Y]", "[X] is in [Y]", "You find [X] in [Y]"]
    entry = {"name": "city", "statements": statements, "questions": ["Where is [X]?", "In what city is [X]?"]}
    (folder / "wordings.json").write_text(json.dumps({"city": entry}), encoding="utf-8")
    return {"facts": str(folder / "facts.jsonl"), "wordings": str(folder / "wordings.json"), "num_known": None}


@pytest.mark.parametrize("changed", ["facts", "wordings"])
def test_facts_that_changed_after_teaching_are_refused(tmp_path, checkpoint, changed):
    data = own_facts(tmp_path, "Bonn", "Kiel")
    config = config_of(LEARN, tmp_path / "out", checkpoint=str(checkpoint), data=data)
    save_learned(learn(config), tmp_path / "out")
    file = Path(data[changed])
    text = file.read_text(encoding="utf-8").replace("Kiel", "Ulm").replace("Where", "And where")
    file.write_text(text, encoding="utf-8")
    message = refusal("eval.py", checkpoint, tmp_path / "out", "--output", tmp_path / "report")
    sentence = "the {} in {} are not what {} was taught: bring that file back, or teach again"
    assert message == sentence.format(changed, file, tmp_path / "out")


def test_a_run_that_does_not_say_what_it_was_taught_from_is_refused(tmp_path, checkpoint, learned):
    shutil.copytree(learned["full"], tmp_path / "old")
    record = json.loads((tmp_path / "old" / "learned.json").read_text())
    del record["sha256"]
    (tmp_path / "old" / "learned.json").write_text(json.dumps(record))
    message = refusal("eval.py", checkpoint, tmp_path / "old", "--output", tmp_path / "report")
    assert message == f"{tmp_path / 'old'} does not say which checkpoint and facts it was taught from: teach again"


def test_folders_in_the_wrong_order_are_told_so(tmp_path, checkpoint, learned):
    for folders in ([learned["full"]], [learned["full"], checkpoint]):
        message = refusal("eval.py", *folders, "--output", tmp_path / "report")
        assert message == f"{learned['full']} was written by a learning run: name the model that it was taught to first"


def test_a_device_that_is_not_there_is_refused(tmp_path, checkpoint):
    for device in ("abacus", "cuda:77"):
        assert f"--device {device}: " in refusal("eval.py", checkpoint, "--num-new", 2, "--device", device)


def test_a_model_of_nan_is_not_scored(tmp_path, checkpoint):
    shutil.copytree(checkpoint, tmp_path / "nan")
    model, tokenizer = files.load(checkpoint)
    model.model.norm.weight.data[3] = float("nan")
    files.save(model, tokenizer, tmp_path / "nan")
    message = refusal("eval.py", tmp_path / "nan", "--num-new", 2, "--output", tmp_path / "report")
    assert message == f"the model in {tmp_path / 'nan'} holds numbers that are not finite"


def test_an_output_that_cannot_be_written_is_refused_before_any_question(tmp_path, checkpoint):
    (tmp_path / "file").write_text("in the way")
    message = refusal("eval.py", checkpoint, "--num-new", 2, "--output", tmp_path / "file")
    assert message == f"cannot write to output {tmp_path / 'file'}: File exists"
    assert (tmp_path / "file").read_text() == "in the way"


def test_an_incomplete_run_is_refused(tmp_path, checkpoint, learned):
    for missing in ("config.yaml", "learned.json", "patch"):
        folder = tmp_path / missing
        shutil.copytree(learned["sparse_memory"], folder)
        shutil.rmtree(folder / missing) if missing == "patch" else (folder / missing).unlink()
        assert str(folder) in refusal("eval.py", checkpoint, folder, "--output", tmp_path / "report")


def test_runs_that_were_taught_different_facts_are_not_compared(tmp_path, checkpoint, learned):
    other = tmp_path / "other"
    config = config_of(LEARN, other, checkpoint=str(checkpoint), data={"first_new": 7})
    save_learned(learn(config), other)
    message = refusal("eval.py", checkpoint, learned["full"], other, "--output", tmp_path / "report")
    assert message == f"{other} was taught other facts than {learned['full']}: evaluate it apart"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-new", 0], "there is no new fact to ask about: --num-new is 0"),
        (["--num-new", 99999], "new facts 0 to 99999 asked for, the file has"),
        (["--facts", "absent.jsonl"], "absent.jsonl: the file cannot be read"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(tmp_path, checkpoint, arguments, message):
    assert message in refusal("eval.py", checkpoint, *arguments, "--output", tmp_path / "report")
    assert not (tmp_path / "report" / "results.json").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--batch-size", 0], "batch_size must be at least 1, got 0"),
        (["--max-new-tokens", 1], "max_new_tokens is 1: the longest answer, of fact"),
    ],
)
def test_a_batch_of_no_questions_and_answers_cut_short_are_refused(tmp_path, checkpoint, option, message):
    done = run("eval.py", checkpoint, "--num-new", 2, *option, "--output", tmp_path / "report")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith(f"eval.py: {message}")


def test_a_missing_checkpoint_is_refused(tmp_path):
    assert str(tmp_path / "absent") in refusal("eval.py", tmp_path / "absent", "--output", tmp_path / "report")
