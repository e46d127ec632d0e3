"""A chain of patches squashed is one patch that does the same."""

import copy
from dataclasses import replace

import pytest
import tiny
import torch
from patch_cases import patch_of, table_of

from memlayer.decoders.attach import memory_tables
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.patch import MemoryPatch, merge, squash

# Slots and values of three patches; all write slot 8, and the last takes slot 50 back to what it was.
WRITTEN = (([3, 8], (1.0, 1.0)), ([8, 50], (2.0, 2.0)), ([8, 50], (3.0, 0.0)))


def chain(model):
    """Patches that are each made on top of the ones before, all applied to the model."""
    table_of(model)[50] = 0.0
    made = []
    for slots, values in WRITTEN:
        rows = torch.tensor(values)[:, None].expand(-1, tiny.WIDTH).contiguous()
        made.append(patch_of(model, slots, rows, {"checkpoint": "runs/base", "seed": len(made)}))
        made[-1].apply(model)
    return made


@pytest.fixture
def models_and_chain():
    before = tiny.memory_model()
    table_of(before)[50] = 0.0
    after = copy.deepcopy(before)
    return before, after, chain(after)


def test_a_squashed_chain_is_the_patch_between_the_first_model_and_the_last(models_and_chain, tmp_path):
    before, after, made = models_and_chain
    squash(made).save(tmp_path)
    patch = MemoryPatch.load(tmp_path)
    assert patch.fingerprint == MemoryPatch.between(before, after).fingerprint
    assert patch.tables[tiny.TABLE].slots.tolist() == [3, 8]
    assert patch.base == made[0].base
    assert patch.provenance["checkpoint"] == "runs/base"
    assert [part["provenance"]["seed"] for part in patch.provenance["squash"]] == [0, 1, 2]
    state = state_fingerprint(before)
    patch.apply(before)
    assert state_fingerprint(before) == state_fingerprint(after)
    assert before.config.memory_patches == after.config.memory_patches
    patch.revert(before)
    assert state_fingerprint(before) == state


def test_what_was_made_on_top_of_a_chain_goes_on_top_of_it_squashed(models_and_chain):
    before, after, made = models_and_chain
    above = patch_of(after, [60], torch.ones(1, tiny.WIDTH))
    squash(made).apply(before)
    above.apply(before)
    assert squash([squash(made), above]).base == made[0].base


def test_every_table_is_squashed():
    model = tiny.memory_model(layers=[0, 2], share=False)
    states, made = [copy.deepcopy(model)], []
    for name in ("model.memory.0", "model.memory.1", "model.memory.0"):
        after = copy.deepcopy(states[-1])
        memory_tables(after)[name].weight.data[4] += 1
        made.append(MemoryPatch.between(states[-1], after))
        states.append(after)
    assert squash(made).fingerprint == MemoryPatch.between(states[0], states[-1]).fingerprint


def test_a_chain_in_another_order_or_with_a_gap_is_refused(models_and_chain):
    _, _, (one, two, three) = models_and_chain
    message = r"patch 2 was not made on top of the ones before it: 1 .* table '.*memory\.0' .* at slot 8"
    with pytest.raises(ValueError, match=message):
        squash([one, three])
    for wrong, first in (([two, one], 1), ([one, three, two], 2)):
        with pytest.raises(
            ValueError, match=f"patch {first} was made on top of patch {first + 1}: name the oldest first"
        ):
            squash(wrong)
    with pytest.raises(ValueError, match="no patch to squash"):
        squash([])


def test_a_squash_says_which_patches_lie_below_it(models_and_chain):
    _, _, made = models_and_chain
    assert squash(made[1:]).base.patches == [made[0].fingerprint]


def test_patches_of_other_bases_are_neither_squashed_nor_merged(models_and_chain):
    _, after, (one, _, _) = models_and_chain
    elsewhere = patch_of(after, [60], torch.ones(1, tiny.WIDTH))
    sha256 = dict.fromkeys(elsewhere.base.weights_sha256, "0" * 64)
    other = MemoryPatch(elsewhere.tables, base=replace(elsewhere.base, weights_sha256=sha256, patches=[]))
    for together in (squash, merge):
        with pytest.raises(ValueError, match="different weights outside the memory"):
            together([one, other])


def test_merging_a_chain_says_to_squash_it(models_and_chain):
    _, after, made = models_and_chain
    for pair in (made[:2], [made[0], patch_of(after, [60], torch.ones(1, tiny.WIDTH))]):
        with pytest.raises(ValueError, match="made on top of another: squash them instead"):
            merge(pair, "mean")
