"""A merged patch is a patch of the same base; where rows differ, the policy decides, and is worked out by hand here."""

import copy
import functools
import time
from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patch_cases import bits, patch_of, table_of
from peft.utils.merge_utils import ties as peft_ties

from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.patch import MemoryPatch, TablePatch, merge, merging

V = tiny.WIDTH


def rows(*values):
    """Rows of width V, each of one value."""
    return torch.tensor(values, dtype=torch.float32)[:, None].expand(-1, V).contiguous()


@pytest.fixture
def model():
    """A model whose rows are all zero, so that a row is its change as well."""
    model = tiny.memory_model()
    table_of(model).zero_()
    return model


def merged(model, patches, *arguments):
    """The table of the model under the merged patch; merging alters no patch, and the model is as before."""
    fingerprints, before = [patch.fingerprint for patch in patches], state_fingerprint(model)
    patch = merge(patches, *arguments)
    assert [patch.fingerprint for patch in patches] == fingerprints
    patch.apply(model)
    table = table_of(model).clone()
    patch.revert(model)
    assert state_fingerprint(model) == before
    return table


def test_patches_of_different_slots_merge_into_what_applying_both_gives(model):
    one, other = patch_of(model, [2, 40], rows(1, 2)), patch_of(model, [7, 63], rows(3, 4))
    both = copy.deepcopy(model)
    one.apply(both)
    other.apply(both)
    for policy in ("error", "last", "mean", "ties"):
        assert torch.equal(bits(merged(model, [one, other], policy)), bits(table_of(both)))


def test_identical_rows_are_no_conflict_under_any_policy(model):
    odd = torch.randn(1, V)
    odd[0, 0] = -0.0
    one, other = patch_of(model, [7], odd), patch_of(model, [7], odd)
    for policy in ("error", "last", "mean", "ties"):
        assert torch.equal(bits(merged(model, [one, other], policy)[7]), bits(odd[0]))


def test_a_conflict_names_the_first_slots_and_how_many(model):
    one, other = patch_of(model, range(9), rows(*range(9))), patch_of(model, range(9), rows(*range(8), 5))
    with pytest.raises(ValueError, match=r"different rows for 1 slots of table 'model\.memory\.0', at slot 8$"):
        merge([one, other])
    other = patch_of(model, range(2, 9), rows(*range(7)))
    with pytest.raises(ValueError, match=r"for 7 slots .* at slots 2, 3, 4, 5, 6 and 2 more$"):
        merge([one, other])


def test_last_takes_the_row_of_the_last_patch_that_has_it(model):
    parts = [patch_of(model, [1, 2], rows(1, 1)), patch_of(model, [2, 3], rows(2, 2)), patch_of(model, [1], rows(3))]
    assert merged(model, parts, "last")[[1, 2, 3], 0].tolist() == [3, 2, 2]


def test_mean_averages_the_patches_that_have_the_row_and_rounds_once(model):
    parts = [patch_of(model, [1, 2], rows(1, 1)), patch_of(model, [2], rows(2)), patch_of(model, [2], rows(6))]
    assert merged(model, parts, "mean")[[1, 2], 0].tolist() == [1, 3]
    model.bfloat16()
    # 256 + 1 is no bfloat16: a sum rounded on the way would give 256 / 3.
    parts = [patch_of(model, [1], rows(value)) for value in (256.0, 1.0, 1.0)]
    assert merged(model, parts, "mean")[1, 0] == torch.tensor(86.0).bfloat16()


def test_rows_that_average_to_their_originals_leave_the_patch(model):
    parts = [patch_of(model, [1, 2], rows(1, 5)), patch_of(model, [1], rows(-1)), patch_of(model, [], rows())]
    assert merge(parts, "mean").tables[tiny.TABLE].slots.tolist() == [2]


def test_ties_keeps_the_largest_elects_signs_and_averages_who_agrees(model):
    table_of(model)[1] = 10.0
    one, other = torch.full((2, 1, V), 10.0)
    one[0, :4] += torch.tensor([4.0, 3.0, -2.0, 1.0])
    other[0, :4] += torch.tensor([2.0, -5.0, -4.0, 1.0])
    result = merged(model, [patch_of(model, [1], one), patch_of(model, [1], other)], "ties", 3 / V)[1] - 10
    # The fourth is trimmed from both. 4 and 2 agree; of 3 and -5 the sum is negative; -2 and -4 agree.
    assert result.tolist() == [3.0, -5.0, -3.0] + [0.0] * (V - 3)


def test_ties_is_what_peft_does_to_each_row_by_itself(model):
    table_of(model).normal_()
    generator = torch.Generator().manual_seed(0)
    slots = [3, 9, 33]
    parts = [patch_of(model, slots, torch.randn(3, V, generator=generator)) for _ in range(3)]
    result = merged(model, parts, "ties", 0.5)
    for row, slot in enumerate(slots):
        original = table_of(model)[slot]
        changes = [part.tables[tiny.TABLE].rows[row] - original for part in parts]
        expected = original + peft_ties(changes, torch.ones(3), density=0.5)
        assert torch.equal(result[slot], expected)


@pytest.mark.parametrize("policy", ["mean", "ties"])
@pytest.mark.parametrize("block", [1, 3 * 7 * V])
def test_conflicts_are_combined_alike_in_blocks_of_any_size(model, monkeypatch, policy, block):
    table_of(model).normal_()
    parts = [patch_of(model, range(first, first + 30), torch.randn(30, V)) for first in (0, 10, 20)]
    whole = merged(model, parts, policy)
    monkeypatch.setattr(merging, "BLOCK", block)
    assert torch.equal(merged(model, parts, policy), whole)
    if policy == "mean":
        rows_at_25 = [part.tables[tiny.TABLE].rows[25 - first] for part, first in zip(parts, (0, 10, 20), strict=True)]
        assert torch.allclose(whole[25], torch.stack(rows_at_25).mean(dim=0), rtol=1e-6)


def test_the_time_of_a_merge_grows_with_the_conflicts_and_not_with_their_square():
    def seconds(number, policy):
        slots, originals = torch.arange(number), torch.randn(number, V)
        tables = [TablePatch(slots, torch.randn(number, V), originals, 2**20, {}) for _ in range(2)]
        start = time.process_time()
        merge([MemoryPatch({tiny.TABLE: table}) for table in tables], policy)
        return time.process_time() - start

    for policy in ("mean", "ties"):
        seconds(100, policy)
        # Row by row, 40,000 conflicts take more than ten seconds of this processor; together, a fraction of one.
        assert seconds(40_000, policy) < 5


def test_patches_of_several_tables_are_merged_table_by_table():
    model = tiny.memory_model(layers=[0, 2], share=False)
    after = copy.deepcopy(model)
    with torch.no_grad():
        after.model.memory[1].weight[4] += 1
    other = patch_of(model, [6], torch.ones(1, V))
    both = merge([MemoryPatch.between(model, after), other])
    assert {name: t.slots.tolist() for name, t in both.tables.items()} == {"model.memory.0": [6], "model.memory.1": [4]}


def test_the_provenance_lists_the_parents_and_keeps_the_base_they_share(model, tmp_path):
    shared = {"base_model": "someone/decoder"}
    one = patch_of(model, [1], rows(1), {**shared, "checkpoint": "here", "seed": 1})
    other = patch_of(model, [2], rows(2), {**shared, "checkpoint": "there", "seed": 2})
    merge([one, other], "ties").save(tmp_path)
    assert MemoryPatch.load(tmp_path).provenance == {
        **shared,
        "merge": {"on_conflict": "ties", "density": 0.2},
        "parents": [{"fingerprint": p.fingerprint, "provenance": p.provenance} for p in (one, other)],
    }


def other_base(model, patch):
    table_of(model)[3:5] += 1
    return patch_of(model, [3, 4, 5], rows(1, 1, 1))


def other_keys(model, patch):
    model.model.layers[1].mlp.keys.half_keys.data[0] += 1
    return patch_of(model, [1], rows(1))


def other_dtype(model, patch):
    return patch_of(model.half(), [1], rows(1))


def other_size(_model, patch):
    table = replace(patch.tables[tiny.TABLE], num_slots=81)
    return MemoryPatch({tiny.TABLE: table})


@pytest.mark.parametrize("policy", ["error", "last", "mean", "ties"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (other_base, r"different originals of 2 rows of table 'model\.memory\.0', at slots 3, 4: .* the same base"),
        (other_keys, r"different product keys at model\.layers\.1\.mlp\.keys\.half_keys"),
        (other_dtype, r"\(64, 16, torch\.float32\) in one patch, \(64, 16, torch\.float16\) in another"),
        (other_size, r"\(64, 16, torch\.float32\) in one patch, \(81, 16, torch\.float32\) in another"),
    ],
)
def test_patches_of_different_bases_are_never_merged(model, make, message, policy):
    one = patch_of(model, [3, 4, 5], rows(1, 1, 1))
    with pytest.raises(ValueError, match=message):
        merge([one, make(model, one)], policy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "no patch to merge"),
        (([None], "first"), "on_conflict is 'first', must be one of error, last, mean, ties"),
        (([None], "ties", 0.0), "density is 0.0, must be above 0 and at most 1"),
        (([None], "ties", 1.1), "density is 1.1"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        merge(*arguments)


@functools.cache
def base_model():
    """One model for every sequence: each has to leave it as it was."""
    return tiny.memory_model().bfloat16()


# Few slots, so that patches overlap; few values, so that rows are sometimes equal, to each other or the originals.
ROWS = st.dictionaries(st.integers(0, 5), st.sampled_from([0.0, -0.0, 1.0, 2.5, -3e30]), min_size=1)
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["apply", "revert", "error", "last", "mean", "ties"]),
        st.lists(st.integers(0, 20), min_size=1, max_size=3),
    ),
    max_size=8,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(made=st.lists(ROWS, min_size=2, max_size=4), operations=OPERATIONS)
def test_any_sequence_of_apply_revert_and_merge_leaves_the_base_intact(made, operations):
    model = base_model()
    before, expected = state_fingerprint(model), table_of(model).clone()
    known = [patch_of(model, sorted(row), rows(*(row[slot] for slot in sorted(row)))) for row in made]
    for patch in known:  # as every patch is made: without the rows that are their originals
        patch.tables = {name: TablePatch.of_changed(**vars(table)) for name, table in patch.tables.items()}
        patch.base = None  # rows are what this is about
    done = []
    for operation, which in operations:
        chosen = [known[i % len(known)] for i in which]
        try:
            if operation in ("apply", "revert"):
                getattr(chosen[0], operation)(model)
                done.append((operation, chosen[0]))
                table = chosen[0].tables[tiny.TABLE]
                expected[table.slots] = table.rows if operation == "apply" else table.originals
            else:
                known.append(merge(chosen, operation))
        except ValueError as error:
            said = ("not the patch's", "is applied already", "is not applied", "different rows")
            assert any(words in str(error) for words in said)  # noqa: PT017
        assert torch.equal(bits(table_of(model)), bits(expected)), "a refusal or a merge writes nothing"
    for operation, patch in reversed(done):
        (patch.revert if operation == "apply" else patch.apply)(model)
    assert state_fingerprint(model) == before
