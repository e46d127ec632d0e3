"""A patch carries what its learning run protected, so that two runs keep apart what one run would."""

import pytest
import tiny
import torch
from commands import run
from finetuning import OPTIMIZERS
from patch_cases import patch_of

from memlayer.decoders import files
from memlayer.decoders.fingerprint import product_key_fingerprints
from memlayer.methods.sparse_memory import SparseMemoryFinetuner
from memlayer.patch import MemoryPatch, merge, squash
from memlayer.slots.counts import COUNTS_FILE, load_counts, save_counts

SCRIPT = "memlayer/patch/__main__.py"
NUM_SLOTS = {tiny.TABLE: 64}


def background(model):
    counts = tiny.background(model)
    counts[tiny.TABLE].product_keys = product_key_fingerprints(model)[tiny.TABLE]
    return counts


def taught(model, counts, seeds):
    """Learn a batch a seed, each protected from the next by more documents than there are."""
    finetuner = SparseMemoryFinetuner(model, counts, 5, protect=15)
    optimizer = finetuner.watch(OPTIMIZERS["sgd"](finetuner.parameters()))
    selected = []
    for seed in seeds:
        finetuner.begin(str(len(selected)))
        finetuner.loss(tiny.batch(seed=seed)).backward()
        selected.append(finetuner.selected[tiny.TABLE].tolist())
        optimizer.step()
        optimizer.zero_grad()
    return finetuner.detach(), selected


def frequency(counts):
    return counts[tiny.TABLE].document_frequency_N


def test_two_runs_keep_away_from_each_others_slots_as_one_run_does():
    one, two = tiny.memory_model(), tiny.memory_model()
    counts = background(one)
    _, expected = taught(one, counts, [0, 1, 2, 3])
    patch, first = taught(two, counts, [0, 1])
    _, second = taught(two, patch.protect(counts), [2, 3])
    assert first + second == expected
    _, unprotected = taught(two, counts, [2, 3])
    assert unprotected != expected[2:], "or nothing is shown"


def test_what_was_protected_is_taken_off_to_the_last_bit_where_it_met_the_number_of_documents():
    model = tiny.memory_model()
    counts = background(model)
    before = frequency(counts).clone()
    patch, _ = taught(model, counts, [0, 1])
    protected = patch.protect(counts)
    assert frequency(protected).max() == 20 == counts[tiny.TABLE].num_documents
    assert (frequency(protected) > before).sum() == len(patch.tables[tiny.TABLE].protected_slots) > 5
    assert torch.equal(frequency(patch.unprotect(protected)), before)
    assert torch.equal(frequency(counts), before), "the caller's counts stay"
    with pytest.raises(ValueError, match="slots would leave 0 to 20: these are not the background counts"):
        patch.unprotect(counts)


def test_protection_is_saved_and_loaded_and_no_part_of_the_fingerprint(tmp_path):
    model = tiny.memory_model()
    patch, _ = taught(model, background(model), [0, 1])
    patch.save(tmp_path)
    loaded = MemoryPatch.load(tmp_path)
    ours, theirs = patch.tables[tiny.TABLE], loaded.tables[tiny.TABLE]
    assert torch.equal(ours.protected_slots, theirs.protected_slots)
    assert torch.equal(ours.protected_documents, theirs.protected_documents)
    assert loaded.protects
    assert loaded.fingerprint == patch.fingerprint
    assert not patch_of(model, [1], torch.ones(1, tiny.WIDTH)).protects


def test_merged_siblings_protect_what_either_did():
    counts = background(tiny.memory_model())
    one, other = (taught(tiny.memory_model(), counts, [seed])[0] for seed in (0, 1))
    merged = merge([one, other], on_conflict="last")
    expected = torch.maximum(frequency(one.protect(counts)), frequency(other.protect(counts)))
    assert torch.equal(frequency(merged.protect(counts)), expected)


def test_a_squashed_chain_protects_what_it_did_one_after_the_other():
    model = tiny.memory_model()
    counts = background(model)
    first, _ = taught(model, counts, [0, 1])
    second, _ = taught(model, first.protect(counts), [1, 2])
    squashed = squash([first, second]).protect(counts)
    assert torch.equal(frequency(squashed), frequency(second.protect(first.protect(counts))))


def test_apply_and_revert_move_protection_into_the_counts_of_the_new_folder_and_out_again(tmp_path):
    model = tiny.memory_model()
    counts = background(model)
    files.save(model, tiny.tokenizer(tmp_path / "tokenizer"), tmp_path / "model")
    save_counts(counts, tmp_path / "model" / COUNTS_FILE)
    patch, _ = taught(model, counts, [0, 1])
    patch.save(tmp_path / "patch")
    for command, source, target in (("apply", "model", "patched"), ("revert", "patched", "back")):
        done = run(SCRIPT, command, tmp_path / "patch", tmp_path / source, tmp_path / target)
        assert done.returncode == 0, done.stderr
    patched = load_counts(tmp_path / "patched" / COUNTS_FILE, NUM_SLOTS, product_key_fingerprints(model))
    assert torch.equal(frequency(patched), frequency(patch.protect(counts)))
    before, back = ((tmp_path / folder / COUNTS_FILE).read_bytes() for folder in ("model", "back"))
    assert before == back
