"""A patch is exact to the bit in both directions, and refuses whatever it was not made for."""

import copy
from dataclasses import replace

import pytest
import tiny
import torch
from patch_cases import SLOTS, bits, odd_patch, patch_of, table_of

from memlayer.decoders.attach import memory_tables, remove_memory
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.patch import MemoryPatch, merge, patches
from memlayer.patch import table as table_module

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_and_revert_are_exact_to_the_bit(dtype):
    model = tiny.memory_model().to(dtype)
    patch = odd_patch(model)
    before, state_before = state_fingerprint(model), tiny.snapshot(model)
    patch.apply(model)
    assert state_fingerprint(model) != before
    assert torch.equal(bits(table_of(model)[SLOTS]), bits(patch.tables[tiny.TABLE].rows))
    others = torch.ones(64, dtype=torch.bool)
    others[SLOTS] = False
    assert torch.equal(table_of(model)[others], state_before["model.memory.0.weight"][others])
    patch.revert(model)
    assert state_fingerprint(model) == before
    assert all(torch.equal(bits(t), bits(state_before[name])) for name, t in model.state_dict().items())


def two_models(dtype=torch.float32, **memory):
    """The same model twice; the second has other rows, one of them with another sign of zero alone."""
    before = tiny.memory_model(**memory).to(dtype)
    table_of(before)[9, 0] = 0.0
    after = copy.deepcopy(before)
    table_of(after)[9, 0] = -0.0
    table_of(after)[30] += 1
    return before, after


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_patch_between_two_models_takes_one_to_the_other(dtype):
    before, after = two_models(dtype)
    patch = MemoryPatch.between(before, after, {"seed": 1})
    assert patch.provenance == {"seed": 1}
    assert patch.tables[tiny.TABLE].slots.tolist() == [9, 30]
    patch.apply(before)
    assert state_fingerprint(before) == state_fingerprint(after)


@pytest.mark.parametrize("block", [1, 16, 17 * 16, 64 * 16])
def test_tables_are_compared_block_by_block(monkeypatch, block):
    before, after = two_models()
    monkeypatch.setattr(table_module, "BLOCK", block)
    assert MemoryPatch.between(before, after).tables[tiny.TABLE].slots.tolist() == [9, 30]


def test_between_covers_every_table_and_looks_at_no_other_number():
    before = tiny.memory_model(layers=[0, 2], share=False)
    after = copy.deepcopy(before)
    with torch.no_grad():
        memory_tables(after)["model.memory.1"].weight[5] += 1
        after.model.embed_tokens.weight.add_(1)
    patch = MemoryPatch.between(before, after)
    assert {name: t.slots.tolist() for name, t in patch.tables.items()} == {"model.memory.0": [], "model.memory.1": [5]}


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"layers": [1, 2], "share": False}, r"tables \['model\.memory\.0'\], the other .*, 'model\.memory\.1'\]"),
        ({"num_heads": 1}, "other product keys at .*half_keys"),
        ({"layers": [2]}, r"layers\.1\.mlp\.keys\.half_keys, .*layers\.2\.mlp\.keys"),
        ({"value_width": 20, "key_width": 8}, r"'model\.memory\.0' is \(64, 16\) torch\.float32 .* \(64, 20\)"),
    ],
)
def test_between_models_of_other_tables_or_keys_is_refused(memory, message):
    model, other = tiny.memory_model(key_width=8), tiny.memory_model(**{"key_width": 8, **memory})
    if "value_width" in memory:  # product keys do not depend on it, but on the order of random numbers
        other.model.layers[1].mlp.keys.load_state_dict(model.model.layers[1].mlp.keys.state_dict())
    with pytest.raises(ValueError, match=message):
        MemoryPatch.between(model, other)


def test_the_fingerprint_tells_minus_zero_from_zero_and_one_name_from_another():
    model = tiny.memory_model()
    table_of(model)[0, 0] = 0.0
    before = state_fingerprint(model)
    table_of(model)[0, 0] = -0.0
    assert state_fingerprint(model) != before
    one, other = (torch.nn.ParameterDict({name: torch.zeros(2, 2)}) for name in ("one", "other"))
    assert state_fingerprint(one) != state_fingerprint(other)
    flat = torch.nn.ParameterDict({"one": torch.zeros(4)})
    assert state_fingerprint(one) != state_fingerprint(flat)


def other_rows(model, _patch):
    table_of(model)[40] += 1


def other_sign_of_zero(model, _patch):
    assert torch.signbit(table_of(model)[7, 1])
    table_of(model)[7, 1] = 0.0


def many_other_rows(model, patch):
    every = patch_of(model, torch.arange(20), torch.ones(20, 16))
    patch.tables = every.tables
    table_of(model)[3:15] += 1


def other_half_key(model, _patch):
    keys = model.model.layers[1].mlp.keys
    keys.half_keys.data[1, 0, 3, 0] += 1


def other_query(model, _patch):
    model.model.layers[1].mlp.keys.query.weight.data[0, 0] += 1


def other_norm(model, _patch):
    model.model.layers[1].mlp.keys.norm.bias.data[0] += 1


def another_model_in_another_dtype(model, _patch):
    model.model.layers[0].self_attn.q_proj.weight.data += 1
    model.bfloat16()


def other_table(_model, patch):
    patch.tables["model.memory.1"] = patch.tables.pop(tiny.TABLE)


def other_width(_model, patch):
    table = patch.tables[tiny.TABLE]
    patch.tables[tiny.TABLE] = replace(table, rows=table.rows[:, :5], originals=table.originals[:, :5])


def more_slots(_model, patch):
    patch.tables[tiny.TABLE] = replace(patch.tables[tiny.TABLE], num_slots=81)


def second_table_unfit(_model, patch):
    patch.tables["model.memory.1"] = copy.deepcopy(patch.tables[tiny.TABLE])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_rows, r"1 of 4 rows of table 'model\.memory\.0' are not the patch's originals, at slot 40:"),
        (other_sign_of_zero, "1 of 4 rows .* at slot 7:"),
        (many_other_rows, "12 of 20 rows .* at slots 3, 4, 5, 6, 7 and 7 more:"),
        (other_half_key, r"made for other product keys at model\.layers\.1\.mlp\.keys\.half_keys:"),
        (other_query, r"made for other product keys at model\.layers\.1\.mlp\.keys\.query\.weight:"),
        (other_norm, r"made for other product keys at model\.layers\.1\.mlp\.keys\.norm\.bias:"),
        (another_model_in_another_dtype, r"other weights outside the memory \(in bfloat16\): any_base=True"),
        (other_table, r"the patch changes table 'model\.memory\.1', the model has \['model\.memory\.0'\]"),
        (other_width, r"64 slots of width 5, table 'model\.memory\.0' is \(64, 16\)"),
        (more_slots, r"81 slots of width 16, table 'model\.memory\.0' is \(64, 16\)"),
        (second_table_unfit, r"the patch changes table 'model\.memory\.1'"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_and_not_written_to(spoil, message):
    model = tiny.memory_model()
    patch = odd_patch(model)
    spoil(model, patch)
    before = state_fingerprint(model)
    with pytest.raises(ValueError, match=message):
        patch.apply(model)
    assert state_fingerprint(model) == before


def test_reverting_what_was_not_applied_says_so():
    model = tiny.memory_model()
    patch = odd_patch(model)
    with pytest.raises(ValueError, match="the patch is not applied: the model holds its originals at all 4 slots"):
        patch.revert(model)
    table_of(model)[40] += 1
    with pytest.raises(ValueError, match=r"4 of 4 rows .* are not the patch's rows"):
        patch.revert(model)


def test_applying_twice_says_so():
    model = tiny.memory_model()
    patch = odd_patch(model)
    patch.apply(model)
    with pytest.raises(ValueError, match="the patch is applied already: the model holds its rows at all 4 slots"):
        patch.apply(model)
    table_of(model)[40] += 1
    with pytest.raises(ValueError, match=r"4 of 4 rows .* are not the patch's originals"):
        patch.apply(model)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"slots": torch.tensor([2, 40, 7, 63])}, "ascending and distinct"),
        ({"slots": torch.tensor([2, 7, 7, 63])}, "ascending and distinct"),
        ({"slots": SLOTS.int()}, "must be int64"),
        ({"slots": SLOTS + 1}, "slots 3 to 64, the table has 64"),
        ({"slots": SLOTS - 3}, "slots -1 to 60, the table has 64"),
        ({"slots": SLOTS[:3]}, r"rows of shape \(4, 16\) for 3 slots"),
        ({"originals": torch.zeros(4, 15)}, r"rows are \(4, 16\) torch\.float32, originals \(4, 15\)"),
        ({"originals": torch.zeros(4, 16).half()}, r"originals \(4, 16\) torch\.float16"),
    ],
)
def test_a_table_patch_of_parts_that_do_not_fit_is_refused(part, message):
    patch = odd_patch(tiny.memory_model()).tables[tiny.TABLE]
    with pytest.raises(ValueError, match=message):
        replace(patch, **part)


def chain(model):
    """Two patches of which the second is made on top of the first, over a common slot."""
    first = patch_of(model, [3, 8], torch.ones(2, 16))
    first.apply(model)
    second = patch_of(model, [8, 50], torch.full((2, 16), 2.0))
    first.revert(model)
    return first, second


def test_patches_are_applied_in_order_and_reverted_in_reverse():
    model = tiny.memory_model()
    first, second = chain(model)
    before = state_fingerprint(model)
    with patches(model, [first, second]) as patched:
        assert patched is model
        assert table_of(model)[[3, 8, 50], 0].tolist() == [1, 2, 2]
    assert state_fingerprint(model) == before


def test_patches_are_reverted_when_the_body_raises():
    model = tiny.memory_model()
    before = state_fingerprint(model)
    with pytest.raises(KeyError, match="mine"), patches(model, chain(model)):
        raise KeyError("mine")
    assert state_fingerprint(model) == before


def test_rows_changed_inside_stay_and_every_other_row_is_taken_back():
    model = tiny.memory_model()
    before = table_of(model).clone()
    changed = r"rows changed while .* applied, 1 of table 'model.memory.0' at slot 8: they stay as they are"
    with pytest.raises(ValueError, match=changed), patches(model, chain(model)):
        table_of(model)[8] = 7.0
    before[8] = 7.0
    assert torch.equal(bits(table_of(model)), bits(before))


def test_the_error_of_the_body_is_raised_though_rows_changed_inside():
    model = tiny.memory_model()
    before = table_of(model).clone()

    def fail_inside():
        with patches(model, chain(model)):
            table_of(model)[3] = 7.0
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as raised:
        fail_inside()
    assert "1 of table 'model.memory.0' at slot 3" in raised.value.__notes__[0]
    before[3] = 7.0
    assert torch.equal(bits(table_of(model)), bits(before))


def test_patches_end_well_where_the_memory_was_removed_inside():
    model = tiny.memory_model()
    table, before = memory_tables(model)[tiny.TABLE], table_of(model).clone()
    with patches(model, chain(model)):
        remove_memory(model)
    assert torch.equal(bits(table.weight.data), bits(before))


def test_patches_before_one_that_does_not_fit_are_reverted():
    model = tiny.memory_model()
    first, second = chain(model)
    before = state_fingerprint(model)
    with pytest.raises(ValueError, match=r"made on top of patch [0-9a-f]{12}, which"), patches(model, [second, first]):
        raise AssertionError("must not be entered")
    assert state_fingerprint(model) == before


def test_a_bare_import_has_all_that_the_readme_uses():
    assert tiny.run_python("import memlayer; print(memlayer.patch.merge.__module__)") == "memlayer.patch.merging\n"


def test_the_description_has_what_a_person_asks_for():
    model = tiny.memory_model()
    table_of(model)[[1, 62]] = 0.0
    rows = torch.zeros(2, 16)
    rows[0, :2], rows[1, 0] = torch.tensor([3.0, 4.0]), 12.0
    patch = patch_of(model, [1, 62], rows, {"seed": 3, "facts": "mine.jsonl"})
    text = patch.describe()
    assert "2 rows, 272 bytes" in text  # two slots of 8 bytes, rows and originals of 2 * 16 * 4
    assert "model.memory.0: 2 of 64 rows of width 16, float32, slots 1 to 62" in text
    assert "largest 12, all together 13" in text  # the norms are 5 and 12
    assert '"facts": "mine.jsonl"' in text
    weights = patch.base.weights_sha256["float32"][:12]
    assert f"made for: a model that is not named, weights {weights}, with no other patch" in text
    assert "taught: not recorded" in text


def test_the_description_says_in_a_line_what_was_taught():
    learn = {"method": "sparse_memory", "learning_rate": 10.0, "num_rows": 400, "steps_per_fact": 20, "loss_on": "all"}
    provenance = {"checkpoint": "runs/base", "data": {"facts": None, "num_new": 5, "first_new": 10}, "learn": learn}
    model = tiny.memory_model()
    patch = patch_of(model, [1], torch.ones(1, 16), provenance)
    taught = (
        "taught: 5 new facts from number 10 of the built-in facts, by sparse_memory with learning_rate 10.0, "
        "num_rows 400, steps_per_fact 20"
    )
    assert f"made for: runs/base, weights {patch.base.weights_sha256['float32'][:12]}" in patch.describe()
    assert f"\n{taught}\n" in patch.describe()
    assert f"\n{patch.fingerprint[:12]}: {taught}\n" in merge([patch, patch]).describe()


def test_the_description_warns_of_rows_that_moved_absurdly_far():
    model = tiny.memory_model()
    rows = torch.ones(2, 16)
    assert "CAREFUL" not in patch_of(model, [1, 62], rows).describe()
    rows[1] = 1e30
    text = patch_of(model, [1, 62], rows).describe()
    assert "CAREFUL: 1 rows moved more than 1,000 times the norm of an original row: did the run diverge?" in text
    assert "largest 4e+30" in text


def test_an_empty_patch_can_be_described():
    model = tiny.memory_model()
    text = MemoryPatch.between(model, model).describe()
    assert "0 rows, 0 bytes" in text
    assert "model.memory.0: 0 of 64 rows" in text
