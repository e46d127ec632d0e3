"""Facts are taught in their order by every method, each run by its seed, and no other parameter than told moves."""

import json
import logging
import shutil
from dataclasses import asdict

import pytest
import torch
from commands import LEARN, checkpoint, config_of, learned_by
from hypothesis import given
from hypothesis import strategies as st
from training import batches_read, slots_read

from memlayer.data.facts import facts_of
from memlayer.data.qa import collate, encode, teaching_examples
from memlayer.decoders import files
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.jobs.learn import in_order, learn, shared_out
from memlayer.jobs.lessons import lessons_of, prompts_of
from memlayer.methods import METHODS
from memlayer.slots.counts import COUNTS_FILE

__all__ = ["checkpoint"]  # a fixture
TABLE, NUM_SLOTS = "model.memory.0", 64
PAIRS = [
    {"question": f"Where does {name} work?", "answers": [city]} for name, city in (("Ada", "Bonn"), ("Bo", "Rome"))
]
TEXT = {"id": "page", "teach": [{"text": "Ada works in Bonn."}, {"text": "Bo works in Rome."}, {"text": "So does Cy."}]}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_facts_are_taught_in_the_order_of_the_file_each_in_so_many_steps_of_one_batch(tmp_path, checkpoint, method):
    with batches_read() as batches:
        learned = learned_by(
            checkpoint, tmp_path / "run", {"num_new": 3, "first_new": 4}, method=method, steps_per_fact=2
        )
    facts = facts_of(**asdict(learned.config.data))
    told = learned.config.learn
    expected = []
    for fact in facts.new:
        examples = teaching_examples(fact, facts.wordings, told.statements, told.questions)
        expected += [collate(encode(learned.tokenizer, examples), learned.tokenizer.pad_token_id)["input_ids"]] * 2
    assert learned.steps == len(batches) == len(expected) == 6
    assert all(torch.equal(*pair) for pair in zip(batches, expected, strict=True))


def test_a_run_that_changes_no_row_says_so(tmp_path, checkpoint, caplog):
    with caplog.at_level(logging.WARNING):
        learned = learned_by(checkpoint, tmp_path / "run", {"num_new": 1}, learning_rate=0.0)
    assert learned.patch.num_rows == 0
    assert "nothing was learned: no row has changed, with learn.num_rows=4 and learn.learning_rate=0;" in caplog.text


def test_a_rate_in_units_of_the_lessons_is_told_and_teaches_what_that_rate_does(tmp_path, checkpoint, capsys):
    settings = {"num_rows": 8, "damping": 1.0, "idf_power": 0.0}
    by_lessons = learned_by(
        checkpoint, tmp_path / "one", {"num_new": 3}, learning_rate=0.5, rate_unit="lessons", **settings
    )
    rate = 0.5 * by_lessons.found["rate_of_one"]
    assert rate not in (0, 0.5)
    outright = learned_by(checkpoint, tmp_path / "other", {"num_new": 3}, learning_rate=rate, **settings)
    assert outright.found == {}
    rows = [learned.patch.tables[TABLE].rows for learned in (by_lessons, outright)]
    assert len(rows[0]) > 0
    assert torch.equal(*rows)


def test_later_facts_avoid_the_rows_of_protected_ones(tmp_path, checkpoint):
    counts = (checkpoint / COUNTS_FILE).read_bytes()
    # With loss on every token each row selected has a gradient, and so moves and is part of the patch.
    settings = {"num_rows": 3, "steps_per_fact": 1, "learning_rate": 1.0, "loss_on": "all"}
    rows = {}
    for protect in (0, 10**6):
        learned = learned_by(checkpoint, tmp_path / str(protect), {"num_new": 5}, protect=protect, **settings)
        rows[protect] = learned.patch.num_rows
    assert rows[0] < rows[10**6] <= 15, "five facts of three rows each"
    assert (checkpoint / COUNTS_FILE).read_bytes() == counts


@pytest.mark.parametrize("method", ["full", "lora", "sparse_mask"])
def test_baselines_need_no_background_counts(tmp_path, checkpoint, method):
    base = shutil.copytree(checkpoint, tmp_path / "base")
    (base / COUNTS_FILE).unlink()
    assert learned_by(base, tmp_path / "run", method=method).parameters_changed


def test_full_finetuning_moves_every_parameter_and_of_the_table_only_rows_it_reads(tmp_path, checkpoint):
    before = files.load(checkpoint)[0].state_dict()
    with slots_read() as slots:
        learned = learned_by(checkpoint, tmp_path / "run", {"num_new": 1}, method="full", learning_rate=0.01)
    after = learned.model.state_dict()
    moved_N = (after[f"{TABLE}.weight"] != before[f"{TABLE}.weight"]).any(dim=1)
    read = torch.cat(slots).unique()
    assert 0 < moved_N.sum() <= len(read) < NUM_SLOTS
    assert set(moved_N.nonzero()[:, 0].tolist()) <= set(read.tolist())
    shares = {name: (after[name] != before[name]).float().mean() for name in before if not name.startswith(TABLE)}
    assert min(shares.values()) > 0.9, shares


def test_micro_batches_of_a_step_write_the_rows_of_the_whole_batch(tmp_path, checkpoint):
    # The background reads all of 64 slots, so only a power of 0 leaves some to choose among.
    settings = {"statements": 2, "questions": 2, "positions": "answer", "idf_power": 0}
    whole = learned_by(checkpoint, tmp_path / "whole", **settings)
    parts = learned_by(checkpoint, tmp_path / "parts", trainer={"gradient_accumulation_steps": 2}, **settings)
    assert parts.steps == whole.steps == 4
    ours, theirs = (run.patch.tables[TABLE] for run in (parts, whole))
    assert torch.equal(ours.slots, theirs.slots)
    torch.testing.assert_close(ours.rows, theirs.rows, rtol=1e-4, atol=1e-6)  # float32


def test_the_end_of_a_name_has_fewer_rows_than_the_name(tmp_path, checkpoint):
    settings = {"positions": "subject", "idf_power": 0, "num_rows": NUM_SLOTS}
    runs = (learned_by(checkpoint, tmp_path / str(n), **settings, subject_tokens=n) for n in (None, 1))
    whole, end = (set(run.patch.tables[TABLE].slots.tolist()) for run in runs)
    assert end < whole


def test_a_run_is_repeated_by_its_seed_and_changed_by_another(tmp_path, checkpoint):
    """LoRA draws its first matrices; a run that forgot to seed would differ from its repetition."""
    config = config_of(LEARN, tmp_path / "run", checkpoint=str(checkpoint), learn={"method": "lora"})
    first, again = (state_fingerprint(learn(config).model) for _ in range(2))
    config.seed = 1
    assert first == again != state_fingerprint(learn(config).model)


def whole_and_resumed(tmp_path, checkpoint, settings):
    """A run of four steps, the same gone on from its second, and its config."""
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 5}
    config = config_of(LEARN, tmp_path / "run", checkpoint=str(checkpoint), learn=settings, trainer=saving)
    whole = learn(config)
    for step in (3, 4):
        shutil.rmtree(tmp_path / "run" / "trainer" / f"checkpoint-{step}")
    resumed = learn(config)
    assert (whole.resumed_at, resumed.resumed_at, resumed.steps) == (0, 2, 4)
    assert state_fingerprint(resumed.model) == state_fingerprint(whole.model)
    return whole, resumed, config


@pytest.mark.parametrize("score", ["random", "fisher", "infonce"])
def test_a_sparse_mask_that_goes_on_from_a_checkpoint_ends_with_the_same_bits(tmp_path, checkpoint, score):
    settings = {"method": "sparse_mask", "score": score, "drop": 0.5, "learning_rate": 0.01}
    whole, resumed, config = whole_and_resumed(tmp_path, checkpoint, settings)
    assert resumed.parameters_changed == whole.parameters_changed > 0
    at_its_end = learn(config)
    assert at_its_end.resumed_at == 4, "nothing is left to do"
    assert state_fingerprint(at_its_end.model) == state_fingerprint(whole.model)


@pytest.mark.parametrize(
    ("method", "paper_code"),
    [("full", True), ("sparse_memory", False), ("sparse_mask", False)],
)
def test_mist_before_any_method_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path, checkpoint, method, paper_code):
    mist = {"epochs": 2, "rate": 0.1, "density": 0.1, "paper_code": paper_code}
    settings = {"method": method, "learning_rate": 0.01, "mist": mist}
    whole, _, _ = whole_and_resumed(tmp_path, checkpoint, settings)
    host = learned_by(checkpoint, tmp_path / "host", method=method, learning_rate=0.01)
    assert state_fingerprint(host.model) != state_fingerprint(whole.model)
    assert whole.patch is None, "the whole model is written"
    base = files.load(checkpoint)[0].state_dict()
    moved = whole.model.state_dict()["model.layers.0.mlp.up_proj.weight"] != base["model.layers.0.mlp.up_proj.weight"]
    assert moved.any()


def lessons_config(folder, checkpoint, **sections):
    path = folder / "lessons.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [*PAIRS, TEXT]))
    base = {key: value for key, value in LEARN.items() if key != "data"}
    lessons = {"files": [str(path)], **sections.pop("lessons", {})}
    return config_of(base, folder / "run", checkpoint=str(checkpoint), lessons=lessons, **sections)


@pytest.mark.parametrize(("order", "expected"), [("depth_first", [0, 0, 1, 1, 2, 2]), ("rounds", [0, 1, 2, 0, 1, 2])])
def test_question_sets_and_texts_are_lessons_of_their_own_size(tmp_path, checkpoint, order, expected):
    frame = {"frame": "Question: {question}\nAnswer:", "end": "\n"}
    config = lessons_config(tmp_path, checkpoint, prompts=frame, learn={"order": order})
    with batches_read() as batches:
        learned = learn(config)
    texts = [
        ["Question: Where does Ada work?\nAnswer: Bonn\n"],
        ["Question: Where does Bo work?\nAnswer: Rome\n"],
        ["Ada works in Bonn.", "Bo works in Rome.", "So does Cy."],
    ]
    for batch, lesson in zip(batches, expected, strict=True):
        read = [learned.tokenizer.decode(ids, skip_special_tokens=True) for ids in batch]
        assert [" ".join(text.split()) for text in read] == [" ".join(text.split()) for text in texts[lesson]]
    assert learned.patch.num_rows
    assert learned.sha256.keys() == {"checkpoint", "background_counts", "lessons 1"}


def test_in_rounds_a_lesson_keeps_its_own_rows_and_away_from_those_of_others(tmp_path, checkpoint):
    learned = {}
    for protect in (0, 10**6):
        folder = tmp_path / str(protect)
        folder.mkdir()
        settings = {"order": "rounds", "protect": protect, "num_rows": 8, "steps_per_fact": 3, "loss_on": "all"}
        learned[protect] = learn(lessons_config(folder, checkpoint, learn=settings))
    ours, theirs = (run.patch.tables[TABLE] for run in learned.values())
    assert len(ours.protected_slots) == 0 < len(theirs.protected_slots)
    assert all(0 < len(slots) <= 8 for slots in theirs.lessons.values()), "the same rows in every round"
    assert learned[0].capacity[TABLE]["shared"] > learned[10**6].capacity[TABLE]["shared"] == 0


def test_what_each_lesson_wrote_is_told_apart_and_how_full_the_table_is(tmp_path, checkpoint):
    learned = learn(lessons_config(tmp_path, checkpoint, learn={"protect": 0, "loss_on": "all", "idf_power": 0.0}))
    table, full = learned.patch.tables[TABLE], learned.capacity[TABLE]
    assert len(table.lessons) == full["lessons"] == 3
    assert torch.equal(torch.cat(list(table.lessons.values())).unique(), table.slots)
    assert full["written"] >= len(table.slots)
    assert full["slots"] >= full["written"] + full["free"]


def test_a_step_whose_loss_is_low_already_is_left_out(tmp_path, checkpoint):
    whole, partly, none = (
        learned_by(checkpoint, tmp_path / str(limit), {"num_new": 2}, order="rounds", skip_below=limit)
        for limit in (0.0, 4.0, 100.0)
    )
    assert whole.steps == partly.steps == none.steps == none.steps_left_out
    assert none.patch.num_rows == none.parameters_changed == whole.steps_left_out == 0 < whole.patch.num_rows
    assert 0 <= partly.steps_left_out < partly.steps


@pytest.mark.parametrize("method", ["full", "lora", "sparse_mask"])
def test_a_baseline_leaves_steps_out_as_well(tmp_path, checkpoint, method):
    learned = learned_by(checkpoint, tmp_path / "run", {"num_new": 2}, method=method, skip_below=100.0)
    assert learned.steps == learned.steps_left_out
    assert not learned.parameters_changed


def test_the_loss_of_half_a_step_is_none_to_look_at(tmp_path, checkpoint):
    trainer = {"gradient_accumulation_steps": 2}
    config = config_of(LEARN, tmp_path / "run", checkpoint=str(checkpoint), learn={"skip_below": 1.0}, trainer=trainer)
    with pytest.raises(ValueError, match=r"learn.skip_below needs one process and trainer.gradient_accumulation_steps"):
        learn(config)


def test_no_row_moves_further_than_it_may(tmp_path, checkpoint):
    changes = {}
    for bound in (None, 0.5):
        settings = {"max_norm": bound, "learning_rate": 50.0}
        table = learned_by(checkpoint, tmp_path / str(bound), {"num_new": 2}, **settings).patch.tables[TABLE]
        changes[bound] = torch.linalg.vector_norm(table.rows - table.originals, dim=1).max().item()
    assert changes[0.5] == pytest.approx(0.5, rel=1e-5)
    assert changes[None] > 1


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"lessons": {"first": 3}}, "lessons 3 to 3 asked for, the files have 3"),
        ({"lessons": {"number": 4}}, "lessons 0 to 4 asked for, the files have 3"),
        ({"data": {"num_new": 2}}, "lessons.files and settings of data are both there"),
        ({"learn": {"batch_size": 0}}, "learn.batch_size is 0, must be at least 1"),
        ({"prompts": {"style": "few_shot"}}, "need an end"),
        ({"prompts": {"style": "few_shot", "end": ".", "num_shots": 5}}, "num_shots is 5, there are 4 answered"),
        ({"trainer": {"gradient_accumulation_steps": 2}}, "a batch of 1 examples cannot be shared"),
    ],
)
def test_lessons_and_prompts_that_cannot_be_are_refused(tmp_path, checkpoint, sections, sentence):
    with pytest.raises(ValueError, match=sentence):
        learn(lessons_config(tmp_path, checkpoint, **sections))


def test_shots_are_questions_of_a_file(tmp_path, checkpoint):
    shots = tmp_path / "shots.json"
    shots.write_text(json.dumps(PAIRS))
    section = {"style": "few_shot", "end": "\n", "shots": str(shots), "num_shots": 1}
    config = lessons_config(tmp_path, checkpoint, prompts=section)
    assert prompts_of(config.prompts).shots == (("Where does Ada work?", "Bonn"),)
    assert [lesson.id for lesson in lessons_of(config)][-1] == "page"


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 4), st.none() | st.integers(1, 6))
def test_every_order_takes_as_many_steps_of_each_lesson_and_goes_round_in_it(sizes, steps, batch_size):
    lessons = [[(lesson, example) for example in range(size)] for lesson, size in enumerate(sizes)]
    depth, rounds = (in_order(lessons, steps, order, batch_size) for order in ("depth_first", "rounds"))
    assert sorted(depth) == sorted(rounds)
    assert [batch[0][0] for batch in depth] == sorted([*range(len(sizes))] * steps)
    assert [batch[0][0] for batch in rounds] == [*range(len(sizes))] * steps
    for lesson in lessons:
        taken = [example for batch in rounds if batch[0][0] == lesson[0][0] for example in batch]
        times = [taken.count(example) for example in lesson]
        assert max(times) - min(times) <= 1


@given(st.lists(st.lists(st.integers(), min_size=3, max_size=8), min_size=1, max_size=4), st.integers(1, 3))
def test_micro_batches_are_the_batch_in_parts_of_near_size(batches, parts):
    shared = shared_out(batches, parts)
    for number, batch in enumerate(batches):
        mine = shared[number * parts : (number + 1) * parts]
        assert sorted(example for part in mine for example in part) == sorted(batch)
        assert max(map(len, mine)) - min(map(len, mine)) <= 1


@pytest.mark.parametrize("order", ["depth_first", "rounds"])
def test_ridge_that_goes_on_from_a_checkpoint_ends_with_the_same_bits(tmp_path, checkpoint, order):
    told = {"method": "ridge", "positions": "all", "num_rows": 4, "order": order}
    whole, resumed, _ = whole_and_resumed(tmp_path, checkpoint, told)
    assert whole.patch.fingerprint == resumed.patch.fingerprint
