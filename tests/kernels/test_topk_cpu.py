"""A network finds what torch.sort finds, or says that it is unsure."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlayer_kernels.topk_cpu import ColumnTopK, GroupTopK, column_topk, pick, places, sorting_network


def draw(seed, num_scores, num_columns):
    return torch.randn(num_scores, num_columns, generator=torch.Generator().manual_seed(seed))


def best(scores_CX, k):
    return scores_CX.sort(dim=0, descending=True, stable=True).indices[:k]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_scores=st.integers(1, 70), num_columns=st.integers(1, 9), decimals=st.integers(0, 7))
def test_columns_that_are_sure_are_right(data, num_scores, num_columns, decimals):
    k = data.draw(st.integers(1, num_scores))
    find = column_topk(num_scores, num_columns, k)
    for seed in data.draw(st.tuples(st.integers(0, 99), st.integers(0, 99))):  # one after the other, in one memory
        scores_CX = draw(seed, num_scores, num_columns).round(decimals=decimals)
        position_KX, unsure_X = find(scores_CX)
        assert ((position_KX == best(scores_CX, k)).all(0) | unsure_X).all()


@pytest.mark.parametrize("kind", [ColumnTopK, GroupTopK])
@pytest.mark.parametrize(("num_scores", "k"), [(256, 32), (120, 32), (1024, 128), (40, 1), (4096, 16)])
def test_few_columns_of_random_scores_are_unsure(kind, num_scores, k):
    if kind is GroupTopK and num_scores < 4 * k:
        pytest.skip("fewer groups than scores to find")
    scores_CX = draw(0, num_scores, 2048)
    position_KX, unsure_X = kind(num_scores, 2048, k)(scores_CX)
    assert unsure_X.float().mean() < 0.05
    assert position_KX.shape == (k, 2048)
    assert torch.equal(position_KX[:, ~unsure_X].long(), best(scores_CX, k)[:, ~unsure_X])


def test_all_scores_can_be_found():
    assert not ColumnTopK(37, 50, 37)(draw(0, 37, 50))[1].any()
    position_KX, unsure_X = ColumnTopK(1, 5, 1)(draw(0, 1, 5))
    assert not position_KX.any()
    assert not unsure_X.any()


def test_equal_scores_are_unsure_wherever_they_decide():
    scores_CX = torch.tensor([[4.0, 4.0, 4.0], [3.0, 3.0, 4.0], [2.0, 3.0, 2.0], [2.0, 1.0, 2.0]])
    assert ColumnTopK(4, 3, 2)(scores_CX)[1].tolist() == [False, True, True]
    assert ColumnTopK(4, 3, 3)(scores_CX)[1].tolist() == [True, True, True]


@pytest.mark.parametrize("strange", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_unsure_or_right_and_the_other_columns_are_both(strange):
    scores_CX = draw(0, 9, 4)
    scores_CX[5, 1] = strange
    for k in (1, 3, 7):
        position_KX, unsure_X = ColumnTopK(9, 4, k)(scores_CX)
        right_X = (position_KX == best(scores_CX, k)).all(0)
        assert right_X[[0, 2, 3]].all()
        assert not unsure_X[[0, 2, 3]].any()
        assert right_X[1] or unsure_X[1]
        assert position_KX.min() >= 0
        assert position_KX.max() < 9


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("away", [0.0, 30.0])
def test_scores_of_any_size_and_around_any_number_are_mostly_sure(size, away):
    scores_CX = (draw(0, 64, 500) + away) * size
    position_KX, unsure_X = ColumnTopK(64, 500, 8)(scores_CX)
    assert unsure_X.float().mean() < 0.05
    assert torch.equal(position_KX[:, ~unsure_X].long(), best(scores_CX, 8)[:, ~unsure_X])


def test_a_score_has_one_level_wherever_in_memory_it_lies():
    """Vector and scalar code must round alike, or scores next to each other would change places unnoticed."""
    scores_CX = (draw(0, 64, 1) + 30).expand(64, 37).contiguous()
    find = ColumnTopK(64, 37, 8)
    find(scores_CX)
    assert torch.equal(find.packed_CX, find.packed_CX[:, :1].expand(64, 37))


def test_pick_takes_the_named_number_of_each_column():
    values_CX, position_KX = draw(0, 6, 20), torch.randint(6, (3, 20), dtype=torch.int32)
    expected = values_CX.gather(0, position_KX.long())
    assert torch.equal(pick(values_CX, places(position_KX)), expected)
    values, position = values_CX.view(6, 4, 5), position_KX.view(3, 4, 5)
    assert torch.equal(pick(values, places(position).permute(2, 0, 1)), expected.view(3, 4, 5).permute(2, 0, 1))


@pytest.mark.parametrize("num_values", [2, 8, 64])
@pytest.mark.parametrize("top", [2, 8])
def test_a_network_sorts_and_leaves_its_input_as_it_is(num_values, top):
    top = min(top, num_values)
    values_CX = torch.randint(-9, 9, (num_values, 50), generator=torch.Generator().manual_seed(0))
    before = values_CX.clone()
    best_KX, steps, spare_CX = sorting_network(values_CX, *torch.empty(2, *values_CX.shape, dtype=torch.int64), top)
    for step in steps:
        step()
    spare_CX.fill_(99)
    assert torch.equal(best_KX, values_CX.sort(dim=0, descending=True).values[:top])
    assert torch.equal(values_CX, before)
