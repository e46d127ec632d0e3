"""A patch is exact to the bit in both directions, and refuses whatever it was not made for."""

import copy
import json

import pytest
import tiny
import torch

from memlayer.attach import memory_tables
from memlayer.patch import CONFIG_FILE, ROWS_FILE, MemoryPatch, TablePatch, state_fingerprint

SLOTS = torch.tensor([2, 7, 40, 63])


def model_in(dtype=torch.float32):
    return tiny.memory_model().to(dtype)


def table_of(model):
    return memory_tables(model)[tiny.TABLE].weight.data


def patch_for(model):
    """New rows for four slots, with NaN and -0.0 on either side; the model holds the originals."""
    weight = table_of(model)
    weight[7, :3] = torch.tensor([float("nan"), -0.0, float("inf")], dtype=weight.dtype)
    rows = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(5)).to(weight.dtype)
    rows[2, :3] = torch.tensor([-0.0, float("nan"), 0.0], dtype=weight.dtype)
    return MemoryPatch({tiny.TABLE: TablePatch(SLOTS, rows, weight[SLOTS].clone())}, {"seed": 3})


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apply_and_revert_are_exact_to_the_bit(dtype):
    model = model_in(dtype)
    patch = patch_for(model)
    before, state_before = state_fingerprint(model), tiny.snapshot(model)
    patch.apply(model)
    assert state_fingerprint(model) != before
    assert torch.equal(bits(table_of(model)[SLOTS]), bits(patch.tables[tiny.TABLE].rows))
    others = torch.ones(64, dtype=torch.bool)
    others[SLOTS] = False
    assert torch.equal(table_of(model)[others], state_before["memory.0.weight"][others])
    patch.revert(model)
    assert state_fingerprint(model) == before
    assert all(torch.equal(bits(t), bits(state_before[name])) for name, t in model.state_dict().items())


def test_the_fingerprint_tells_minus_zero_from_zero_and_one_name_from_another():
    model = model_in()
    table_of(model)[0, 0] = 0.0
    before = state_fingerprint(model)
    table_of(model)[0, 0] = -0.0
    assert state_fingerprint(model) != before
    one, other = (
        torch.nn.Linear(2, 2),
        torch.nn.ParameterDict({"weights": torch.zeros(2, 2), "bias": torch.zeros(2)}),
    )
    torch.nn.init.zeros_(one.weight), torch.nn.init.zeros_(one.bias)
    assert state_fingerprint(one) != state_fingerprint(other)


def saved(tmp_path, dtype=torch.float32):
    model = model_in(dtype)
    patch = patch_for(model)
    patch.save(tmp_path)
    return model, patch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_patch_is_loaded_to_the_bit_with_where_it_comes_from(tmp_path, dtype):
    _, patch = saved(tmp_path, dtype)
    loaded = MemoryPatch.load(tmp_path)
    assert loaded.provenance == {"seed": 3}
    assert loaded.num_rows == patch.num_rows == 4
    for name in ("slots", "rows", "originals"):
        ours, theirs = getattr(loaded.tables[tiny.TABLE], name), getattr(patch.tables[tiny.TABLE], name)
        assert ours.dtype == theirs.dtype
        assert torch.equal(bits(ours), bits(theirs)), name


APPLY_ELSEWHERE = """
import sys, tiny, torch
from memlayer.patch import MemoryPatch, state_fingerprint
model = tiny.memory_model()
model.load_state_dict(torch.load(sys.argv[2]))
patch = MemoryPatch.load(sys.argv[1])
patch.apply(model)
print(state_fingerprint(model))
patch.revert(model)
print(state_fingerprint(model))
"""


def test_a_patch_saved_here_is_applied_and_reverted_in_another_process(tmp_path):
    model, patch = saved(tmp_path)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    before = state_fingerprint(model)
    patch.apply(model)
    there = tiny.run_python(APPLY_ELSEWHERE, tmp_path, tmp_path / "state.pt").split()
    assert there == [state_fingerprint(model), before]


def test_an_empty_patch_changes_nothing(tmp_path):
    model = model_in()
    before = state_fingerprint(model)
    nothing = TablePatch(torch.empty(0, dtype=torch.int64), torch.empty(0, 16), torch.empty(0, 16))
    MemoryPatch({tiny.TABLE: nothing}).save(tmp_path)
    MemoryPatch.load(tmp_path).apply(model)
    assert state_fingerprint(model) == before


def other_rows(model, _patch):
    table_of(model)[40] += 1


def other_sign_of_zero(model, patch):
    assert torch.signbit(table_of(model)[7, 1])
    table_of(model)[7, 1] = 0.0


def other_dtype(model, _patch):
    model.bfloat16()


def other_table(_model, patch):
    patch.tables["memory.1"] = patch.tables.pop(tiny.TABLE)


def other_width(_model, patch):
    table = patch.tables[tiny.TABLE]
    table.rows, table.originals = table.rows[:, :5], table.originals[:, :5]


def too_many_slots(_model, patch):
    patch.tables[tiny.TABLE].slots = SLOTS + 1


def second_table_unfit(_model, patch):
    patch.tables["memory.1"] = copy.deepcopy(patch.tables[tiny.TABLE])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_rows, r"1 of 4 rows of table 'memory\.0' are not the patch's originals, first at slot 40"),
        (other_sign_of_zero, "1 of 4 rows .* first at slot 7"),
        (other_dtype, r"the patch is in torch\.float32, table 'memory\.0' in torch\.bfloat16"),
        (other_table, r"the patch changes table 'memory\.1', the model has \['memory\.0'\]"),
        (other_width, r"the patch has rows of width 5 .* table 'memory\.0' is \(64, 16\)"),
        (too_many_slots, r"up to slot \[64\], table 'memory\.0' is \(64, 16\)"),
        (second_table_unfit, r"the patch changes table 'memory\.1'"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_and_not_written_to(spoil, message):
    model = model_in()
    patch = patch_for(model)
    spoil(model, patch)
    before = state_fingerprint(model)
    with pytest.raises(ValueError, match=message):
        patch.apply(model)
    assert state_fingerprint(model) == before


def test_reverting_what_was_not_applied_is_refused():
    model = model_in()
    with pytest.raises(ValueError, match=r"4 of 4 rows .* are not the patch's rows"):
        patch_for(model).revert(model)


def test_applying_twice_is_refused():
    model = model_in()
    patch = patch_for(model)
    patch.apply(model)
    with pytest.raises(ValueError, match="are not the patch's originals"):
        patch.apply(model)


def flip_a_bit(folder):
    data = bytearray((folder / ROWS_FILE).read_bytes())
    data[-1] ^= 1
    (folder / ROWS_FILE).write_bytes(data)


def truncate(folder):
    (folder / ROWS_FILE).write_bytes((folder / ROWS_FILE).read_bytes()[:-10])


def spoil_json(folder):
    (folder / CONFIG_FILE).write_text('{"patch_type": ')


def later_version(folder):
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "format_version": 2}))


def another_kind(folder):
    (folder / CONFIG_FILE).write_text('{"peft_type": "LORA"}')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (flip_a_bit, "has SHA-256 .*, its config says"),
        (truncate, "has SHA-256 .*, its config says"),
        (spoil_json, r"memory_patch_config\.json is not JSON"),
        (later_version, r"says \('MEMORY_PATCH', 2\), a memory patch says \('MEMORY_PATCH', 1\)"),
        (another_kind, r"says \(None, None\), a memory patch says"),
    ],
)
def test_an_altered_patch_is_not_loaded(tmp_path, spoil, message):
    saved(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        MemoryPatch.load(tmp_path)


@pytest.mark.parametrize("name", [CONFIG_FILE, ROWS_FILE])
def test_a_missing_file_is_named(tmp_path, name):
    saved(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        MemoryPatch.load(tmp_path)
