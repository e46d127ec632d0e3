"""A lesson is taken back out of a patch: exactly where its rows are its own."""

import pytest
import tiny
import torch
from commands import run
from finetuning import OPTIMIZERS
from hypothesis import given
from hypothesis import strategies as st
from patch_cases import patch_of

from memlayer.decoders.fingerprint import bits
from memlayer.methods.sparse_memory import SparseMemoryFinetuner
from memlayer.patch import MemoryPatch, TablePatch, delete_lessons, merge, squash

SCRIPT = "memlayer/patch/__main__.py"


def taught(model, seeds, protect=100, num_rows=5):
    """A patch of a lesson a seed."""
    finetuner = SparseMemoryFinetuner(model, tiny.background(model), num_rows, protect=protect)
    optimizer = finetuner.watch(OPTIMIZERS["sgd"](finetuner.parameters()))
    for seed in seeds:
        finetuner.begin(f"lesson {seed}")
        finetuner.loss(tiny.batch(seed=seed)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return finetuner.detach()


def test_rows_of_one_lesson_alone_are_as_before_and_all_others_as_they_were():
    model = tiny.memory_model()
    before = tiny.snapshot(model)
    patch = taught(model, [0, 1, 2])
    whole = tiny.snapshot(model)
    deleted = delete_lessons(patch, ["lesson 1"])
    assert deleted.rows_shared == 0 < deleted.removed, "lessons keep apart here"
    patch.revert(model)
    deleted.patch.apply(model)
    (name,) = patch.tables
    mine = patch.tables[name].lessons["lesson 1"]
    weight = model.state_dict()[f"{name}.weight"]
    assert torch.equal(bits(weight[mine]), bits(before[f"{name}.weight"][mine]))
    others = torch.ones(len(weight), dtype=torch.bool)
    others[mine] = False
    assert torch.equal(bits(weight[others]), bits(whole[f"{name}.weight"][others]))
    assert deleted.patch.tables[name].lessons.keys() == {"lesson 0", "lesson 2"}
    assert not torch.isin(mine, deleted.patch.tables[name].protected_slots).any()


def test_rows_that_another_lesson_wrote_too_stay_and_it_is_named():
    model = tiny.memory_model()
    patch = taught(model, [0, 0, 1], protect=0)
    (table,) = patch.tables.values()
    one = table.lessons["lesson 0"]
    shared = one[torch.isin(one, table.lessons["lesson 1"])]
    deleted = delete_lessons(patch, ["lesson 0"])
    (left,) = deleted.patch.tables.values()
    assert deleted.rows_shared == len(shared)
    assert deleted.removed == len(one) - len(shared)
    assert torch.isin(shared, left.slots).all()
    if len(shared):
        assert f"'lesson 1' ({len(shared)})" in str(deleted)


@given(st.lists(st.sets(st.integers(0, 9), min_size=1), min_size=1, max_size=4), st.data())
def test_own_rows_go_and_no_other_row_does(lessons, data):
    slots = sorted(set().union(*lessons))
    rows = torch.ones(len(slots), 2)
    told = {str(n): torch.tensor(sorted(written)) for n, written in enumerate(lessons)}
    table = TablePatch(torch.tensor(slots), rows, 0 * rows, 10, {}, lessons=told)
    gone = data.draw(st.sets(st.sampled_from(sorted(told)), min_size=1))
    deleted = delete_lessons(MemoryPatch({"t": table}), gone)
    kept = set().union(*(written for n, written in enumerate(lessons) if str(n) not in gone))
    assert set(deleted.patch.tables["t"].slots.tolist()) == kept
    assert deleted.removed == len(set(slots) - kept)
    assert deleted.rows_shared == len(kept & set().union(*(lessons[int(n)] for n in gone)))


def test_lessons_survive_saving_merging_and_squashing(tmp_path):
    model = tiny.memory_model()
    one = taught(model, [0])
    other = taught(model, [1])
    one.save(tmp_path / "one")
    (loaded,), (expected,) = (list(patch.tables.values()) for patch in (MemoryPatch.load(tmp_path / "one"), one))
    assert loaded.lessons.keys() == expected.lessons.keys() == {"lesson 0"}
    assert torch.equal(loaded.lessons["lesson 0"], expected.lessons["lesson 0"])
    (both,) = squash([one, other]).tables.values()
    assert both.lessons.keys() == {"lesson 0", "lesson 1"}
    other.revert(model)
    one.revert(model)
    (siblings,) = merge([one, taught(model, [1])], on_conflict="last").tables.values()
    assert siblings.lessons.keys() == {"lesson 0", "lesson 1"}


@pytest.mark.parametrize(
    ("lessons", "sentence"),
    [([], "no lesson to delete is named"), (["x"], "the patch has no lesson 'x'; it tells apart 0, first of all none")],
)
def test_a_lesson_that_is_not_there_is_refused(lessons, sentence):
    with pytest.raises(ValueError, match=sentence):
        delete_lessons(patch_of(tiny.memory_model(), [1], torch.ones(1, tiny.WIDTH)), lessons)


def test_the_command_says_what_became_of_the_rows(tmp_path):
    taught(tiny.memory_model(), [0, 1]).save(tmp_path / "patch")
    assert "lessons told apart: 2\n  lesson 0: 5 rows" in run(SCRIPT, "show", tmp_path / "patch").stdout
    printed = run(SCRIPT, "delete", tmp_path / "patch", "lesson 0", tmp_path / "out").stdout
    assert "rows are as they were before, to the bit; no other lesson wrote into them" in printed
    assert MemoryPatch.load(tmp_path / "out").num_rows == 5
    refused = run(SCRIPT, "delete", tmp_path / "patch", "lesson 7", tmp_path / "other")
    assert refused.returncode == 1
    assert "the patch has no lesson 'lesson 7'" in refused.stderr
