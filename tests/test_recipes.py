"""The recipes: what is counted, what is taught in which order, and that what is written is what was learned."""

import math
import shutil
from contextlib import contextmanager
from dataclasses import asdict

import pytest
import torch
from commands import LEARN, checkpoint, config_of
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from memlayer import recipes
from memlayer.data.facts import facts_of
from memlayer.data.qa import collate, encode, pretraining_examples, teaching_examples
from memlayer.decoders import files
from memlayer.decoders.attach import record_reads
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.jobs.config import load_config
from memlayer.layers.product_keys import ProductKeys
from memlayer.methods import METHODS
from memlayer.slots.counts import load_counts

__all__ = ["checkpoint"]  # a fixture
TABLE, NUM_SLOTS = "memory.0", 64
RATES = {"sparse_memory": 1.0, "full": 0.01, "lora": 0.01}


def learn(checkpoint, folder, data=(), trainer=(), **settings):
    """One run of ``recipes.learn``; settings are those of the learn section."""
    sections = {"learn": settings, "data": dict(data), "trainer": dict(trainer)}
    return recipes.learn(config_of(LEARN, folder, checkpoint=str(checkpoint), **sections))


def test_counts_leave_padding_out_and_a_document_is_that_many_sequences_in_a_row(checkpoint):
    config = load_config(checkpoint / "config.yaml")
    facts = facts_of(**asdict(config.data))
    model, tokenizer = files.load(checkpoint)
    encoded = encode(tokenizer, pretraining_examples(facts.known, facts.wordings))
    reads_N, document_frequency_N = (torch.zeros(NUM_SLOTS, dtype=torch.int64) for _ in range(2))
    per_document = config.count.sequences_per_document
    for first in range(0, len(encoded), per_document):
        seen = []
        for sequence in encoded[first : first + per_document]:  # alone, so that nothing is padded
            batch = collate([sequence], tokenizer.pad_token_id)
            with torch.no_grad(), record_reads(model) as reads:
                model(input_ids=batch["input_ids"])
            seen.append(reads.slots(batch["attention_mask"])[TABLE].flatten())
        reads_N += torch.cat(seen).bincount(minlength=NUM_SLOTS)
        document_frequency_N[torch.cat(seen).unique()] += 1
    counts = load_counts(checkpoint / recipes.COUNTS, {TABLE: NUM_SLOTS})[TABLE]
    assert counts.num_documents == math.ceil(len(encoded) / per_document)
    assert counts.document.startswith(f"{per_document} consecutive sequences")
    assert len(encoded) % per_document, "the last document is a shorter one"
    assert torch.equal(counts.reads_N, reads_N)
    assert torch.equal(counts.document_frequency_N, document_frequency_N)


@contextmanager
def watching(register, kind, keep):
    """Lists what ``keep`` returns for every forward call of a module of ``kind`` while the context lasts."""
    kept = []

    def hook(module, *seen):
        if type(module) is kind:
            kept.append(keep(*seen))

    handle = register(hook)
    try:
        yield kept
    finally:
        handle.remove()


def batches_read():
    """Token ids of every forward pass, as the embedding of the tokens gets them."""
    return watching(register_module_forward_pre_hook, nn.Embedding, lambda inputs: inputs[0].clone())


def slots_read():
    """Slots of every forward pass, padding included."""
    return watching(register_module_forward_hook, ProductKeys, lambda _inputs, output: output[1].unique())


@pytest.mark.parametrize("method", sorted(METHODS))
def test_facts_are_taught_in_the_order_of_the_file_each_in_so_many_steps_of_one_batch(tmp_path, checkpoint, method):
    with batches_read() as batches:
        learned = learn(checkpoint, tmp_path / "run", {"num_new": 3, "first_new": 4}, method=method, steps_per_fact=2)
    facts = facts_of(**asdict(learned.config.data))
    told = learned.config.learn
    expected = []
    for fact in facts.new:
        examples = teaching_examples(fact, facts.wordings, told.statements, told.questions)
        expected += [collate(encode(learned.tokenizer, examples), learned.tokenizer.pad_token_id)["input_ids"]] * 2
    assert learned.steps == len(batches) == len(expected) == 6
    assert all(torch.equal(*pair) for pair in zip(batches, expected, strict=True))


def test_later_facts_avoid_the_rows_of_protected_ones(tmp_path, checkpoint):
    counts = (checkpoint / recipes.COUNTS).read_bytes()
    # With loss on every token each row selected has a gradient, and so moves and is part of the patch.
    settings = {"num_rows": 3, "steps_per_fact": 1, "learning_rate": 1.0, "loss_on": "all"}
    rows = {}
    for protect in (0, 10**6):
        learned = learn(checkpoint, tmp_path / str(protect), {"num_new": 5}, protect=protect, **settings)
        rows[protect] = learned.patch.num_rows
    assert rows[0] < rows[10**6] <= 15, "five facts of three rows each"
    assert (checkpoint / recipes.COUNTS).read_bytes() == counts


@pytest.mark.parametrize("method", sorted(METHODS))
def test_what_is_loaded_is_what_was_learned_to_the_bit(tmp_path, checkpoint, method):
    learned = learn(checkpoint, tmp_path / "run", method=method, learning_rate=RATES[method])
    recipes.save_learned(learned, tmp_path / "run")
    model, _ = recipes.load_learned(checkpoint, tmp_path / "run")
    base, _ = files.load(checkpoint)
    assert state_fingerprint(model) == state_fingerprint(learned.model) != state_fingerprint(base)
    assert all(p.requires_grad for p in learned.model.parameters())
    assert not learned.model.training


def test_a_result_is_never_written_over(tmp_path, checkpoint):
    """Neither that of another method, before it is taught, nor that of the same run."""
    full, sparse = ({"method": method, "learning_rate": RATES[method]} for method in ("full", "sparse_memory"))
    learned = learn(checkpoint, tmp_path / "run", **full)
    recipes.save_learned(learned, tmp_path / "run")
    written = contents(tmp_path / "run")
    with pytest.raises(ValueError, match=r"a finished result of another run \(learn.learning_rate was 0.01, is 1.0"):
        learn(checkpoint, tmp_path / "run", **sparse)
    with pytest.raises(ValueError, match="holds this result already"):
        recipes.save_learned(learned, tmp_path / "run")
    assert contents(tmp_path / "run") == written


def contents(folder):
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "theirs",
    ["model/my_thesis.tex", "patch/fix.diff", "config.yaml", "learned.json", "trainer/checkpoint-7/trainer_state.json"],
)
def test_files_that_no_run_wrote_are_refused_before_training_and_left_alone(tmp_path, checkpoint, theirs):
    file = tmp_path / "home" / theirs
    file.parent.mkdir(parents=True)
    file.write_text("three years: of work")
    learned = learn(checkpoint, tmp_path / "elsewhere")
    with batches_read() as batches, pytest.raises(ValueError, match=r"name another output"):
        learn(checkpoint, tmp_path / "home", trainer={"save_strategy": "steps", "save_steps": 2})
    assert not batches
    if not theirs.startswith("trainer"):
        with pytest.raises(ValueError, match=r"name another output"):
            recipes.save_learned(learned, tmp_path / "home")
    assert contents(tmp_path / "home") == {theirs: b"three years: of work"}


def test_a_patch_of_numbers_that_are_not_finite_is_not_written(tmp_path, checkpoint):
    learned = learn(checkpoint, tmp_path / "run")
    learned.patch.tables[TABLE].rows[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"1 of \d+ numbers of the patch of memory.0 are nan or infinite"):
        recipes.save_learned(learned, tmp_path / "run")
    assert contents(tmp_path / "run") == {}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_baselines_need_no_background_counts(tmp_path, checkpoint, method):
    base = shutil.copytree(checkpoint, tmp_path / "base")
    (base / recipes.COUNTS).unlink()
    assert learn(base, tmp_path / "run", method=method).parameters_changed


def test_full_finetuning_moves_every_parameter_and_of_the_table_only_rows_it_reads(tmp_path, checkpoint):
    before = files.load(checkpoint)[0].state_dict()
    with slots_read() as slots:
        learned = learn(checkpoint, tmp_path / "run", {"num_new": 1}, method="full", learning_rate=0.01)
    after = learned.model.state_dict()
    moved_N = (after[f"{TABLE}.weight"] != before[f"{TABLE}.weight"]).any(dim=1)
    read = torch.cat(slots).unique()
    assert 0 < moved_N.sum() <= len(read) < NUM_SLOTS
    assert set(moved_N.nonzero()[:, 0].tolist()) <= set(read.tolist())
    shares = {name: (after[name] != before[name]).float().mean() for name in before if not name.startswith(TABLE)}
    assert min(shares.values()) > 0.9, shares


def test_micro_batches_of_a_step_write_the_rows_of_the_whole_batch(tmp_path, checkpoint):
    settings = {"statements": 2, "questions": 2, "positions": "answer"}
    whole = learn(checkpoint, tmp_path / "whole", **settings)
    parts = learn(checkpoint, tmp_path / "parts", trainer={"gradient_accumulation_steps": 2}, **settings)
    assert parts.steps == whole.steps == 4
    ours, theirs = (run.patch.tables[TABLE] for run in (parts, whole))
    assert torch.equal(ours.slots, theirs.slots)
    torch.testing.assert_close(ours.rows, theirs.rows, rtol=1e-4, atol=1e-6)  # float32


def test_a_run_is_repeated_by_its_seed_and_changed_by_another(tmp_path, checkpoint):
    """LoRA draws its first matrices; a run that forgot to seed would differ from its repetition."""
    config = config_of(LEARN, tmp_path / "run", checkpoint=str(checkpoint), learn={"method": "lora"})
    first, again = (state_fingerprint(recipes.learn(config).model) for _ in range(2))
    config.seed = 1
    assert first == again != state_fingerprint(recipes.learn(config).model)
