"""A network finds what torch.sort finds, or says that it is unsure."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlayer_kernels.topk_cpu import ColumnTopK, sorting_network


def draw(seed, num_scores, num_columns):
    return torch.randn(num_scores, num_columns, generator=torch.Generator().manual_seed(seed))


def best(scores_CX, k):
    return scores_CX.sort(dim=0, descending=True, stable=True).indices[:k]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_scores=st.integers(1, 70), num_columns=st.integers(1, 9), decimals=st.integers(0, 7))
def test_columns_that_are_sure_are_right(data, num_scores, num_columns, decimals):
    k = data.draw(st.integers(1, num_scores))
    find = ColumnTopK(num_scores, num_columns, k)
    for seed in data.draw(st.tuples(st.integers(0, 99), st.integers(0, 99))):  # one after the other, in one memory
        scores_CX = draw(seed, num_scores, num_columns).round(decimals=decimals)
        position_KX, unsure_X = find(scores_CX)
        assert ((position_KX == best(scores_CX, k)).all(0) | unsure_X).all()


@pytest.mark.parametrize(("num_scores", "k"), [(256, 32), (119, 32), (1024, 128), (37, 37), (40, 1), (1, 1)])
def test_few_columns_of_random_scores_are_unsure(num_scores, k):
    position_KX, unsure_X = ColumnTopK(num_scores, 2048, k)(draw(0, num_scores, 2048))
    assert unsure_X.float().mean() < 0.05
    assert position_KX.shape == (k, 2048)
    assert position_KX.dtype == torch.int64


def test_equal_scores_are_unsure_wherever_they_decide():
    scores_CX = torch.tensor([[4.0, 4.0, 4.0], [3.0, 3.0, 4.0], [2.0, 3.0, 2.0], [2.0, 1.0, 2.0]])
    assert ColumnTopK(4, 3, 2)(scores_CX)[1].tolist() == [False, True, True]
    assert ColumnTopK(4, 3, 3)(scores_CX)[1].tolist() == [True, True, True]


@pytest.mark.parametrize("strange", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_unsure_and_the_other_columns_are_not(strange):
    scores_CX = draw(0, 9, 4)
    scores_CX[5, 1] = strange
    assert ColumnTopK(9, 4, 3)(scores_CX)[1].tolist() == [False, True, False, False]


@pytest.mark.parametrize("num_values", [2, 8, 64])
@pytest.mark.parametrize("top", [2, 8])
def test_a_network_sorts_and_leaves_its_input_as_it_is(num_values, top):
    top = min(top, num_values)
    values_CX = torch.randint(-9, 9, (num_values, 50), generator=torch.Generator().manual_seed(0))
    before = values_CX.clone()
    best_KX, steps = sorting_network(values_CX, top)
    for step in steps:
        step()
    assert torch.equal(best_KX, values_CX.sort(dim=0, descending=True).values[:top])
    assert torch.equal(values_CX, before)
