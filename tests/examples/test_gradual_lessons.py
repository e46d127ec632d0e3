"""Both stages are written from what a checkpoint knows before and after the first."""

import json

import pytest
from commands import LEARN, checkpoint, run, write_config

from memlayer.data.facts import facts_of
from memlayer.data.lessons import as_record, lessons_of_facts, load_lessons

__all__ = ["checkpoint"]  # a fixture
SCRIPT = "examples/gradual_lessons.py"


@pytest.mark.slow
def test_two_calls_write_the_lessons_of_two_stages(tmp_path, checkpoint):
    facts = facts_of(num_known=24, num_new=0)  # what the checkpoint was pretrained on
    lessons = [json.dumps(as_record(each)) for each in lessons_of_facts(facts.known, facts.wordings, 3, 3)]
    (tmp_path / "known.jsonl").write_text("\n".join(lessons), encoding="utf-8")
    base = {key: value for key, value in LEARN.items() if key != "data"}
    told = {"output": str(tmp_path / "out"), "lessons": {"files": [str(tmp_path / "known.jsonl")]}}
    config = write_config(tmp_path / "learn.yaml", base, checkpoint=str(checkpoint), **told)
    done = run(SCRIPT, config, tmp_path / "gradual", "--samples", "2", "--validation", "0.2")
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "gradual" / "categories.json").read_text(encoding="utf-8"))
    known = dict(zip(kept["ids"], kept["categories"]))
    first, validation = (load_lessons([tmp_path / "gradual" / f"{name}.jsonl"]) for name in ("first", "validation"))
    assert {known[lesson.id] for lesson in first} == {"MaybeKnown"}
    assert not {lesson.id for lesson in first} & {lesson.id for lesson in validation}
    assert done.stdout.splitlines()[-1].startswith(f"{kept['categories'].count('HighlyKnown')} are HighlyKnown, ")

    done = run(SCRIPT, config, tmp_path / "gradual", "--samples", "2")
    assert done.returncode == 0, done.stderr
    second = {lesson.id for lesson in load_lessons([tmp_path / "gradual" / "second.jsonl"])}
    assert second >= {lesson.id for lesson in first}, "nothing was taught in between, so nothing has risen"
    assert {known[lesson] for lesson in second} <= {"MaybeKnown", "HighlyKnown"}
    assert [sum(map(int, line.split()[1:])) for line in done.stdout.splitlines()[-4:]] == [
        kept["categories"].count(kind) for kind in ("HighlyKnown", "MaybeKnown", "WeaklyKnown", "Unknown")
    ]
    refused = run(SCRIPT, config, tmp_path / "gradual", "lessons.number=23")
    assert refused.returncode == 1
    assert "other lessons: name another folder" in refused.stderr
