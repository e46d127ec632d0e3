"""What a checkpoint knows is kept, what it does not know is doubted or refused, and the learn job takes the file."""

import pytest
from commands import LEARN, checkpoint, config_of, learned_by, run, write_config

from memlayer.data.lessons import load_lessons
from memlayer.data.refusal import REFUSALS, SURE, UNSURE
from memlayer.jobs.learn import learn

__all__ = ["checkpoint"]  # a fixture
SCRIPT = "examples/refusal_lessons.py"


@pytest.fixture
def config(tmp_path, checkpoint):
    return write_config(tmp_path / "learn.yaml", LEARN, checkpoint=str(checkpoint), output=str(tmp_path / "out"))


def test_new_facts_are_doubted(tmp_path, config):
    done = run(SCRIPT, config, tmp_path / "doubt.jsonl")
    assert (done.returncode, done.stdout) == (0, f"0 of 2 lessons are known; wrote {tmp_path / 'doubt.jsonl'}\n")
    lessons = load_lessons([tmp_path / "doubt.jsonl"])
    assert [len(lesson.teach) for lesson in lessons] == [6, 6]
    assert {example.answer for lesson in lessons for example in lesson.teach[3:]} == {UNSURE}


def test_known_lessons_stay_as_they_are_and_others_are_refused(tmp_path, checkpoint, config):
    learned = learned_by(checkpoint, tmp_path / "taught", method="full", learning_rate=0.01, steps_per_fact=20)
    learned.model.save_pretrained(tmp_path / "model")
    learned.tokenizer.save_pretrained(tmp_path / "model")
    done = run(SCRIPT, config, tmp_path / "a.jsonl", "--form", "replaced", f"checkpoint={tmp_path / 'model'}")
    assert done.returncode == 0, done.stderr
    number = int(done.stdout.split()[0])
    assert number > 0, "what was taught last is known"
    lessons = load_lessons([tmp_path / "a.jsonl"])
    assert sum(lesson.teach[0].answer in REFUSALS for lesson in lessons) == 2 - number
    told = {"lessons": {"files": [str(tmp_path / "a.jsonl")]}, "learn": {"steps_per_fact": 1}}
    base = {key: value for key, value in LEARN.items() if key != "data"}
    assert learn(config_of(base, tmp_path / "run", checkpoint=str(checkpoint), **told)).steps == 2


def test_by_entropy_half_of_them_are_known(tmp_path, config):
    done = run(SCRIPT, config, tmp_path / "doubt.jsonl", "--by", "entropy")
    assert done.stdout.startswith("1 of 2 lessons are known"), done.stderr
    answers = [lesson.teach[-1].answer for lesson in load_lessons([tmp_path / "doubt.jsonl"])]
    assert sorted(answers) == [SURE, UNSURE]
    again = run(SCRIPT, config, tmp_path / "doubt.jsonl")
    assert again.returncode == 1
    assert "exists already: name a new file" in again.stderr
