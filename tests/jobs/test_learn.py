"""Facts are taught in their order by every method, each run by its seed, and no other parameter than told moves."""

import logging
import shutil
from dataclasses import asdict

import pytest
import torch
from commands import LEARN, checkpoint, config_of, learned_by
from training import batches_read, slots_read

from memlayer.data.facts import facts_of
from memlayer.data.qa import collate, encode, teaching_examples
from memlayer.decoders import files
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.jobs.learn import learn
from memlayer.methods import METHODS
from memlayer.slots.counts import COUNTS_FILE

__all__ = ["checkpoint"]  # a fixture
TABLE, NUM_SLOTS = "memory.0", 64


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


@pytest.mark.parametrize("method", ["full", "lora"])
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
    settings = {"statements": 2, "questions": 2, "positions": "answer"}
    whole = learned_by(checkpoint, tmp_path / "whole", **settings)
    parts = learned_by(checkpoint, tmp_path / "parts", trainer={"gradient_accumulation_steps": 2}, **settings)
    assert parts.steps == whole.steps == 4
    ours, theirs = (run.patch.tables[TABLE] for run in (parts, whole))
    assert torch.equal(ours.slots, theirs.slots)
    torch.testing.assert_close(ours.rows, theirs.rows, rtol=1e-4, atol=1e-6)  # float32


def test_a_run_is_repeated_by_its_seed_and_changed_by_another(tmp_path, checkpoint):
    """LoRA draws its first matrices; a run that forgot to seed would differ from its repetition."""
    config = config_of(LEARN, tmp_path / "run", checkpoint=str(checkpoint), learn={"method": "lora"})
    first, again = (state_fingerprint(learn(config).model) for _ in range(2))
    config.seed = 1
    assert first == again != state_fingerprint(learn(config).model)
