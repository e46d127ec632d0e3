"""Terms that a learning run asks for: from which settings they are made, and with which methods they work."""

import json

import pytest
import torch
from commands import LEARN, checkpoint, config_of, learned_by
from training import batches_read

from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.jobs.learn import learn
from memlayer.jobs.taught import save_learned
from memlayer.methods import METHODS

__all__ = ["checkpoint"]  # a fixture
OTHERS = ("full", "sparse_mask")
MOVED = sorted(set(METHODS) - {"ridge"})  # by each step, so that replay has something to keep
KNOWN = {"known": [0, 10], "batch_size": 4}


@pytest.mark.parametrize(
    ("method", "target"),
    [(method, "text") for method in MOVED]
    + [("sparse_memory", "base")]
    + [pytest.param(method, "base", marks=pytest.mark.slow) for method in MOVED if method != "sparse_memory"],
)
def test_every_method_replays_beside_its_lessons(tmp_path, checkpoint, method, target):
    with batches_read() as batches:
        alone = learned_by(checkpoint, tmp_path / "alone", method=method)
    number = len(batches)
    with batches_read() as batches:
        beside = learned_by(
            checkpoint, tmp_path / "beside", method=method, terms={"replay": KNOWN | {"target": target}}
        )
    kept = -(-10 // 4) if target == "base" else 0  # what the untouched model says of ten examples
    assert len(batches) == kept + 2 * number
    assert all(len(batch) == 4 for batch in batches[kept + 1 :: 2])
    assert state_fingerprint(alone.model) != state_fingerprint(beside.model)
    assert (alone.steps, alone.examples, beside.examples) == (number, 3 * number, (3 + 4) * number)
    assert beside.tokens - alone.tokens == sum(
        int((batch != beside.tokenizer.pad_token_id).sum()) for batch in batches[kept + 1 :: 2]
    )
    if beside.patch is not None:
        (table,) = beside.patch.tables.values()
        assert len(table.rows) <= 2 * 2 * 4  # facts, steps, rows of a step: replay chooses none


@pytest.mark.parametrize("target", ["text", "gradient"])
def test_micro_batches_of_a_step_replay_as_much_as_they_weigh(tmp_path, checkpoint, target):
    """The rows of a step move alike whether it is one batch or three micro-batches with a third of the replay each."""
    # A draw of all there are: the order does not matter.
    told = {"replay": {"known": [0, 12], "batch_size": 12, "target": target, "loss_on": "answer"}}
    moved = []
    for parts in (1, 3):
        trainer = {"gradient_accumulation_steps": parts}
        learned = learned_by(checkpoint, tmp_path / str(parts), trainer=trainer, terms=told, loss_on="all")
        (table,) = learned.patch.tables.values()
        moved.append(table.rows)
    torch.testing.assert_close(*moved, rtol=1e-4, atol=1e-5)


def test_what_the_untouched_model_writes_is_replayed_and_is_the_same_again(tmp_path, checkpoint):
    told = {"replay": {"generated": 10, "length": 9, "batch_size": 5}}
    runs = []
    for name in ("one", "other"):
        with batches_read() as batches:
            learned = learned_by(checkpoint, tmp_path / name, method="full", terms=told)
        runs.append(state_fingerprint(learned.model))
        assert max(batch.shape[1] for batch in batches if len(batch) == 5) <= 10
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    "terms",
    [
        {"replay": KNOWN | {"target": "gradient", "loss_on": "answer"}},
        {"ngram": {"exempt_answers": False, "margin": 0.0, "weight": 50.0}},
        {"trust_region": {"generated": 32, "length": 9, "bound": 1e-4}},
        {"context": {"only_right": False}},
    ],
    ids=lambda terms: next(iter(terms)),
)
@pytest.mark.parametrize(
    "method",
    [
        method if method in ("sparse_memory", "lora", "ridge") else pytest.param(method, marks=pytest.mark.slow)
        for method in sorted(METHODS)
    ],
)
def test_every_term_has_its_say_in_every_method_that_it_can_serve(tmp_path, checkpoint, method, terms):
    told = {"method": method, "loss_on": "all", "learning_rate": 10.0 if method == "sparse_memory" else 1e-2}
    if method == "sparse_memory":
        told["idf_power"] = 0.0  # rows that texts read too, or the trust region has no word on them
    refused = {("lora", "trust_region"): r"learn\.method=lora steps others"}
    refused |= {
        ("ridge", "trust_region"): r"learn\.method=ridge steps what",
        ("ridge", "replay"): "no step of ridge moves",
    }
    if sentence := refused.get((method, *terms)):
        with pytest.raises(ValueError, match=sentence):
            learned_by(checkpoint, tmp_path / "refused", terms=terms, **told)
        return
    runs = [learned_by(checkpoint, tmp_path / name, terms=kept, **told) for name, kept in (("a", {}), ("b", terms))]
    assert state_fingerprint(runs[0].model) != state_fingerprint(runs[1].model)
    assert (runs[1].examples > runs[0].examples) == ("replay" in terms)


@pytest.mark.parametrize(
    "terms",
    [
        {"replay": KNOWN | {"target": "base"}},
        {"replay": KNOWN | {"target": "gradient"}},
        {
            "ngram": {"exempt_answers": False, "margin": 0.0},
            "trust_region": {"generated": 4, "length": 9, "bound": 0.01},
        },
        {"context": {"lesson_weight": 0.5, "only_right": False}},
    ],
)
@pytest.mark.parametrize("method", ["sparse_memory", *(pytest.param(m, marks=pytest.mark.slow) for m in OTHERS)])
def test_a_run_that_goes_on_replays_what_the_uninterrupted_one_does(tmp_path, checkpoint, method, terms):
    told = {"method": method, "terms": terms} | ({"learning_rate": 0.01} if method == "sparse_mask" else {})
    whole = learned_by(checkpoint, tmp_path / "whole", **told)
    trainer = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 5}
    learned_by(checkpoint, tmp_path / "part", trainer=trainer, **told)
    for folder in (tmp_path / "part").rglob("checkpoint-4"):
        for file in sorted(folder.rglob("*"), reverse=True):
            file.unlink()
        folder.rmdir()
    again = learned_by(checkpoint, tmp_path / "part", trainer=trainer, **told)
    assert again.resumed_at == 2
    assert state_fingerprint(again.model) == state_fingerprint(whole.model)


@pytest.mark.parametrize("keep_by", ["random", "herding", "teal"])
def test_of_all_that_may_be_replayed_so_many_are_kept(tmp_path, checkpoint, keep_by):
    told = {"replay": {"known": [0, 24], "generated": 6, "length": 9, "keep": 5, "keep_by": keep_by, "batch_size": 5}}
    replayed = []
    for name in ("one", "other"):
        with batches_read() as batches:
            learned_by(checkpoint, tmp_path / name, method="full", terms=told)
        drawn = [batch for batch in batches if len(batch) == 5]
        replayed.append({tuple(row[row != 3].tolist()) for batch in drawn for row in batch})
    assert len(replayed[0]) == 5, "every step draws all that are kept"
    assert replayed[0] == replayed[1]


def test_files_are_replayed_and_told_apart_when_they_change(tmp_path, checkpoint):
    path = tmp_path / "kept.jsonl"
    lines = [{"question": f"Where is number {n}?", "answers": ["Here"]} for n in range(6)]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    told = {"replay": {"files": [str(path)], "batch_size": 6}}
    with batches_read() as batches:
        first = learned_by(checkpoint, tmp_path / "run", method="full", terms=told)
    assert sum(len(batch) == 6 for batch in batches) == first.steps
    path.write_text("\n".join(map(json.dumps, lines[::-1])), encoding="utf-8")
    second = learned_by(checkpoint, tmp_path / "again", method="full", terms=told)
    assert first.sha256["replay 1"] != second.sha256["replay 1"]


@pytest.mark.parametrize(
    ("replay", "sentence"),
    [
        ({}, "learn.terms.replay has nothing to replay"),
        ({"known": [3]}, r"learn.terms.replay.known is \[3\], must be the first and the last"),
        ({"known": [0, 99]}, r"learn.terms.replay.known is \[0, 99\], there are 24 known facts"),
        ({"known": [0, 3]}, "replay of 8 examples a step, there are 3"),
        (
            {"known": [0, 9], "target": "past"},
            "learn.terms.replay.target is 'past', must be 'text' or 'base' or 'gradient'",
        ),
        ({"known": [0, 9], "keep": 3}, "replay of 8 examples a step, there are 3"),
        ({"known": [0, 9], "keep": 0}, "learn.terms.replay.keep is 0, must be at least 1"),
        ({"known": [0, 9], "weight": -1}, "learn.terms.replay.weight is -1.0, must be at least 0"),
    ],
)
def test_what_cannot_be_replayed_is_refused(tmp_path, checkpoint, replay, sentence):
    with pytest.raises(ValueError, match=sentence):
        learned_by(checkpoint, tmp_path / "run", terms={"replay": replay})


@pytest.mark.parametrize(
    ("terms", "sentence"),
    [
        ({"ngram": {"n": 0}}, "learn.terms.ngram.n is 0, must be at least 1"),
        ({"ngram": {"margin": 1.0}}, "learn.terms.ngram.margin is 1.0, must be below 1"),
        ({"trust_region": {"bound": 0.0}}, "learn.terms.trust_region has bound 0.0 and quantile 0.5"),
        ({"trust_region": {"generated": 0}}, "learn.terms.trust_region.generated is 0, must be at least 1"),
        ({"context": {"frame": "Know this."}}, "learn.terms.context.frame is 'Know this.', must hold {lesson} once"),
        ({"context": {"weight": -1.0}}, "learn.terms.context.weight is -1.0, must be at least 0"),
    ],
)
def test_a_setting_outside_its_range_is_refused(tmp_path, checkpoint, terms, sentence):
    with pytest.raises(ValueError, match=sentence):
        learned_by(checkpoint, tmp_path / "run", terms=terms)


def context_run(tmp_path, checkpoint, lessons, **context):
    """The base's passes over the lessons with their texts before them, and what was learned."""
    path = tmp_path / "lessons.jsonl"
    path.write_text("\n".join(map(json.dumps, lessons)), encoding="utf-8")
    config = config_of(
        {key: value for key, value in LEARN.items() if key != "data"},
        tmp_path / "run",
        checkpoint=str(checkpoint),
        lessons={"files": [str(path)]},
        learn={"method": "full", "learning_rate": 1e-3, "steps_per_fact": 1, "terms": {"context": context}},
    )
    with batches_read() as batches:
        learned = learn(config)
    return batches, learned


def test_before_a_question_stands_the_text_of_its_lesson_or_a_statement_of_it(tmp_path, checkpoint):
    lessons = [
        {
            "id": "page",
            "teach": [{"text": "Ada works in Bonn."}, {"question": "Where does Ada work?", "answer": "Bonn"}],
        },
        {
            "id": "bo",
            "teach": [{"question": "Where is Bo?", "answer": "Rome"}, {"prompt": "Bo is in", "answer": "Rome"}],
        },
        {"id": "alone", "teach": [{"question": "Where is Cy?", "answer": "Oslo"}]},
    ]
    batches, learned = context_run(tmp_path, checkpoint, lessons)
    read = [learned.tokenizer.decode(row[row != 3], skip_special_tokens=True).strip() for row in batches[0]]
    assert read == [
        "Ada works in Bonn.\n\nWhere does Ada work? Bonn",
        "Bo is in Rome.\n\nWhere is Bo? Rome",
        "Where is Bo? Rome.\n\nBo is in Rome",
    ]
    assert (learned.found["context_answers"], learned.found["context_lessons"]) == (3, 2)
    assert len(batches) == 1 + learned.steps
    save_learned(learned, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "learned.json").read_text())["found"] == learned.found


def test_lessons_that_nothing_can_stand_before_are_refused(tmp_path, checkpoint):
    with pytest.raises(ValueError, match="no lesson has a text, or another wording, to stand before its questions"):
        context_run(tmp_path, checkpoint, [{"id": "page", "teach": [{"text": "Ada works in Bonn."}]}])


def test_a_weight_of_nothing_leaves_the_lesson_s_own_loss_alone_to_the_bit(tmp_path, checkpoint):
    told = {"method": "full", "learning_rate": 1e-3}
    alone = learned_by(checkpoint, tmp_path / "alone", **told)
    beside = learned_by(
        checkpoint, tmp_path / "beside", terms={"context": {"weight": 0.0, "lesson_weight": 1.0}}, **told
    )
    assert state_fingerprint(alone.model) == state_fingerprint(beside.model)
