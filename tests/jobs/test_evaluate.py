"""Lessons are asked as they were taught, and probes are measured before and after on the same items."""

import json
import sys

import pytest
from commands import LEARN, checkpoint, config_of, refusal, run

from memlayer.decoders import files
from memlayer.evaluation.harness import ask_tasks
from memlayer.evaluation.probes import Probed, compared
from memlayer.evaluation.rows import without_nan
from memlayer.jobs.evaluate import Evaluation, evaluate, load_probes
from memlayer.jobs.learn import learn
from memlayer.jobs.lessons import lessons_of, prompts_of
from memlayer.jobs.measure import KL, Measurement
from memlayer.jobs.sections import ProbesConfig
from memlayer.jobs.taught import read_taught, save_learned

__all__ = ["checkpoint"]  # a fixture
PAIRS = [
    {"question": f"Where does {name} work?", "answers": [city]} for name, city in (("Ada", "Bonn"), ("Bo", "Rome"))
]
FRAME = {"style": "plain", "frame": "Question: {question} Answer:"}
THAT_ENDS = FRAME | {"end": "\n"}


@pytest.fixture(scope="module")
def lessons(checkpoint, tmp_path_factory):
    """A run that was taught question and answer pairs in a frame, and its file of lessons."""
    folder = tmp_path_factory.mktemp("lessons")
    path = folder / "lessons.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    base = {key: value for key, value in LEARN.items() if key != "data"}
    settings = {"method": "full", "learning_rate": 0.03, "steps_per_fact": 30, "order": "rounds"}
    sections = {"lessons": {"files": [str(path)]}, "prompts": FRAME, "learn": settings}
    save_learned(learn(config_of(base, folder / "run", checkpoint=str(checkpoint), **sections)), folder / "run")
    return folder / "run", path


def probes_file(folder, **told):
    text = folder / "text.txt"
    text.write_text("\n\n".join(f"The capital of country {n} is city {n}, which is old." for n in range(99)))
    questions = folder / "known.jsonl"
    questions.write_text(json.dumps({"question": "Where does Ada work?", "answers": ["Bonn"]}) + "\n")
    usual = {"questions": [str(questions)], "texts": [str(text)], "length": 8, "num_windows": 5, "prompts": THAT_ENDS}
    (folder / "probes.yaml").write_text(json.dumps(usual | told))
    return folder / "probes.yaml"


def test_lessons_are_asked_in_their_prompts_and_probes_before_and_after(tmp_path, checkpoint, lessons):
    learned, _ = lessons
    told = probes_file(tmp_path)
    done = run("eval.py", checkpoint, learned, "--num-known", 3, "--probes", told, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    before, after = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert (after["learning_unseen_n"] + after["learning_seen_n"], after["known_seen_n"]) == (2, 3)
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert {"Question: Where does Ada work? Answer:", "Question: Where does Bo work? Answer:"} <= {
        sample["question"] for sample in samples
    }
    known, f1, nll, text, kl = after["probes"]
    assert [(each["name"], each["n"]) for each in (f1, nll)] == [("known, F1", 1), ("known, nats of the answer", 1)]
    assert f1["after"] == 1
    assert nll["after"] < nll["before"]
    assert "kept" not in f1
    assert (known["name"], known["n"], text["name"], text["n"]) == ("known", 1, "text", 5)
    assert text["before"] == before["probes"][3]["after"] != text["after"]
    assert known["gained"] == known["after"] == 1.0, "the question was taught"
    assert (kl["name"], kl["n"], kl["before"]) == (KL, 2, 0)
    assert kl["after"] > 0
    for shown in (done.stdout, (tmp_path / "out" / "report.md").read_text()):
        assert "McNemar" in shown
    asked = Evaluation(checkpoint, [learned], num_known=0, probes=load_probes(told), output=tmp_path / "again")
    again = evaluate(asked)
    assert without_nan(again[1]["probes"]) == after["probes"]
    assert again[1]["known_seen_n"] == 0


def test_what_is_forgotten_is_told_by_how_well_it_was_known(tmp_path, checkpoint, lessons):
    few_shot = {"style": "few_shot", "frame": "{question}", "end": "\n", "num_shots": 1}
    told = probes_file(tmp_path, texts=[], slick_prompts=2, slick_samples=1, prompts=few_shot)
    asked = Evaluation(checkpoint, [lessons[0]], num_known=0, probes=load_probes(told), output=tmp_path / "out")
    before, after = (row["probes"][0]["by_category"] for row in evaluate(asked))
    assert list(before) == ["HighlyKnown", "MaybeKnown", "WeaklyKnown", "Unknown"]
    assert [each["n"] for each in before.values()] == [each["n"] for each in after.values()] == [0, 0, 0, 1]
    assert before["Unknown"]["before"] == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert "By how well the questions were known before" in report
    assert "| known | - | - | - | 0.00 -> " in report


def test_a_probe_is_compared_item_by_item():
    row = compared(Probed("a", "right", [1, 1, 0, 0]), Probed("a", "right", [1, 0, 1, 1]))
    assert (row["kept"], row["lost"], row["gained"], row["neither"], row["share_kept"]) == (1, 1, 2, 0, 0.5)
    assert (row["before"], row["after"], row["change"]) == (0.5, 0.75, 0.25)
    row = compared(Probed("a", "nats", [2.0, 3.0]), Probed("a", "nats", [2.5, 3.5]))
    assert (row["change"], row["low"], row["high"]) == (0.5, 0.5, 0.5)
    assert "kept" not in row
    known = Probed("a", "right", [1, 1, 0], categories=["HighlyKnown", "MaybeKnown", "Unknown"])
    row = compared(known, Probed("a", "right", [0, 0], items=[0, 1]))
    assert (row["n"], row["before"], row["after"], row["share_kept"]) == (2, 1, 0, 0)
    assert [each["n"] for each in row["by_category"].values()] == [1, 1, 0, 0]
    nothing = compared(Probed("a", "right", [0.0]), Probed("a", "right", [], items=[]))
    assert (nothing["n"], nothing["kept"]) == (0, 0)
    for other in (Probed("b", "nats", [2.0, 3.0]), Probed("a", "nats", [2.0])):
        with pytest.raises(ValueError, match=r"not the same|zip"):
            compared(Probed("a", "nats", [2.0, 3.0]), other)


def test_text_that_the_model_has_not_changed_on_has_no_change(tmp_path, checkpoint):
    told = load_probes(probes_file(tmp_path, questions=[]))
    (row,) = evaluate(Evaluation(checkpoint, num_known=4, num_new=0, probes=told, output=tmp_path / "out"))
    (probe,) = row["probes"]
    assert (probe["change"], probe["low"], probe["high"]) == (0, 0, 0)
    assert probe["before"] > 0


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({"lenght": 3}, "probes.yaml: lenght is not a setting; did you mean length?"),
        ({"num_windows": 0}, "probes.yaml: num_windows is 0, must be at least 1"),
        ({"questions": ["absent.jsonl"]}, "absent.jsonl"),
        ({"texts": ["absent.txt"]}, "no text file absent.txt"),
        ({"prompts": {"frame": "?"}}, "the frame of prompts is '?', must hold {question} once"),
        ({"slick_prompts": 2}, "slick_prompts needs prompts.style=few_shot, which is plain"),
    ],
)
def test_bad_probes_are_refused_in_one_sentence(tmp_path, checkpoint, told, sentence):
    path = probes_file(tmp_path, **told)
    assert sentence in refusal("eval.py", checkpoint, "--num-new", 1, "--probes", path, "--output", tmp_path / "out")


def test_questions_near_a_lesson_are_asked_after_it_and_others_and_text_as_they_stand(tmp_path, checkpoint):
    """Prompts of 96 positions: the page of a lesson is cut to what they leave."""
    page = {"id": "page", "teach": [{"text": "Zoe lives in Lima. " * 6}], "ask": []}
    page["ask"] = [{"question": "Zoe lives in which town?", "answers": ["Lima"]}]
    path = tmp_path / "lessons.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in [*PAIRS, page]))
    base = {key: value for key, value in LEARN.items() if key != "data"} | {"learn": {}}
    sections = {"lessons": {"files": [str(path)]}, "prompts": FRAME, "learn": {"method": "retrieval"}}
    config = config_of(base, tmp_path / "run", checkpoint=str(checkpoint), **sections)
    save_learned(learn(config), tmp_path / "run")
    told = probes_file(tmp_path)
    model, tokenizer = files.load(checkpoint)
    asked = Evaluation(checkpoint, [tmp_path / "run"], num_known=3, probes=load_probes(told), output=tmp_path / "out")
    before, after = evaluate(asked)
    assert after["parameters_changed"] == 0
    told_again, _, nats, text, kl = after["probes"]
    assert nats["before"] != nats["after"], "a probe that a lesson answers is asked after it"
    assert (text["name"], text["change"]) == ("text", 0)
    assert kl["after"] > 0
    assert before["probes"][0]["n"] == told_again["n"] == 1
    run_of = read_taught(tmp_path / "run")
    questions = [question for lesson in lessons_of(config) for question in lesson.ask]
    measure = Measurement(model, tokenizer, questions, ProbesConfig(), prompts=prompts_of(config.prompts))
    *pairs, cut = [each.question.prompt for each in measure(model, tokenizer, "-", ask=run_of.store.ask).answers]
    assert pairs == [
        f"Question: Where does {name} work? {city}. Where does {name} work? Answer:"
        for name, city in (("Ada", "Bonn"), ("Bo", "Rome"))
    ]
    assert cut.startswith("Question: Zoe lives in Lima. Zoe lives")
    assert cut.endswith(". Zoe lives in which town? Answer:")
    assert 80 < len(tokenizer(cut)["input_ids"]) < 96


def test_settings_of_facts_are_refused_where_lessons_were_taught(tmp_path, checkpoint, lessons):
    message = refusal("eval.py", checkpoint, lessons[0], "--num-new", 1, "--output", tmp_path / "out")
    assert "--num-new: the runs were taught lessons, and are asked those" in message


def test_tasks_need_the_harness(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"tasks piqa need lm-evaluation-harness .*memlayer\[harness\]"):
        ask_tasks(None, None, ["piqa"])
    assert ask_tasks(None, None, []) == []


def test_a_task_of_ones_own_is_asked_of_the_model(tmp_path, checkpoint):
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'memlayer[harness]'")
    docs = [{"q": f"The capital of {name} is", "choices": ["Oslo", "Lima"], "gold": n} for n, name in enumerate("ab")]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    task = {
        "task": "capitals",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "capitals.yaml").write_text(json.dumps(task))
    model, tokenizer = files.load(checkpoint)
    (probed,) = ask_tasks(model, tokenizer, ["capitals"], folder=tmp_path)
    assert probed.name == "capitals (acc)"
    assert sum(probed.values) == 1, "it prefers one of the two cities, and each is right once"
    with pytest.raises(ValueError, match="has no task 'x' and"):
        ask_tasks(model, tokenizer, ["x"], folder=tmp_path)


def test_probes_of_the_repository_are_readable():
    assert load_probes("examples/probes.yaml") == ProbesConfig()
