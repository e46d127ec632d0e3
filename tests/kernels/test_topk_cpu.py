"""Parted and sorted keys give what torch.sort gives, to the position of every score."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlayer_kernels import topk_cpu
from memlayer_kernels.topk_cpu import row_topk
from memlayer_kernels.vector_sorts import PARTITION, SORT


@pytest.fixture(scope="module", autouse=True, params=[PARTITION, SORT])
def sorts(request):
    """What is found does not depend on what the processor can do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk_cpu, "SORTS", request.param)
        yield


def draw(seed, num_rows, num_scores):
    return torch.randn(num_rows, num_scores, generator=torch.Generator().manual_seed(seed))


def find(scores_YC, k, spare=0):
    return row_topk(scores_YC.clone(), k, torch.full((scores_YC.numel() + spare,), -1))


def check(scores_YC, k, spare=0):
    """Whether what is found is what a stable sort puts first, to the bit but for the sign of zero."""
    found = find(scores_YC, k, spare)
    expected = scores_YC.sort(dim=1, descending=True, stable=True)
    assert torch.equal(found[0], expected.values[:, :k])
    assert torch.equal(found[1], expected.indices[:, :k])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_scores=st.integers(1, 70), num_rows=st.integers(0, 9), decimals=st.integers(0, 7))
def test_rows_equal_a_stable_sort(data, num_scores, num_rows, decimals):
    k = data.draw(st.integers(1, num_scores))
    # Rounding makes ties, and zeros of both signs.
    scores_YC = draw(data.draw(st.integers(0, 99)), num_rows, num_scores).round(decimals=decimals)
    check(scores_YC, k, spare=data.draw(st.integers(0, 9)))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_scores=st.integers(topk_cpu.SHORT_ROW + 1, 600), decimals=st.integers(0, 7))
def test_long_rows_equal_a_stable_sort(data, num_scores, decimals):
    """Some of whose scores differ in their last bits only, where the position is while they are parted."""
    k = data.draw(st.integers(1, num_scores))
    scores_YC = draw(data.draw(st.integers(0, 99)), 4, num_scores)
    level = data.draw(st.sampled_from([0.0, -0.0, 1.0, -3.5]))
    bits_YC = torch.full_like(scores_YC, level).view(torch.int32) + scores_YC.mul(2).int()  # the next numbers to it
    near_YC = bits_YC.view(torch.float32).nan_to_num(-0.0)
    share = data.draw(st.sampled_from([0.0, 0.1, 0.9, 1.0]))
    chosen_YC = torch.rand(scores_YC.shape, generator=torch.Generator().manual_seed(1)) < share
    check(torch.where(chosen_YC, near_YC, scores_YC.round(decimals=decimals)), k)


def test_a_row_with_more_equals_than_are_spared_is_sorted_in_full(monkeypatch):
    """The k-th best is the first of many that are equal to the bit, or but for the last bit."""
    scores_YC = draw(0, 6, 300).clamp_(max=1)
    scores_YC[1] = scores_YC[1].clamp(min=1)
    scores_YC[2, :20] = 2
    scores_YC[3, 100:] = torch.linspace(1, 1 + 2**-20, 200)
    scores_YC[4] = torch.where(torch.arange(300) % 2 == 0, 0.0, -0.0)
    full = []
    kept = topk_cpu._sorted_positions
    monkeypatch.setattr(topk_cpu, "_sorted_positions", lambda *given: full.append(given[0].shape) or kept(*given))
    check(scores_YC, 16)
    assert full == [(6, 16 + topk_cpu.SPARE), (5, 300)]


def test_of_zeros_the_first_is_found_though_its_sign_puts_it_among_those_left_out():
    scores_YC = torch.full((1, 300), -1.0)
    scores_YC[0, 5:20], scores_YC[0, 20:220], scores_YC[0, 100] = 1.0, -0.0, 0.0
    check(scores_YC, 16)


@pytest.mark.parametrize(("num_scores", "k"), [(256, 32), (119, 33), (1024, 128), (40, 1), (4096, 16), (37, 37)])
def test_working_sizes_equal_a_stable_sort(num_scores, k):
    check(draw(0, 300, num_scores), k)


def test_several_threads_find_what_one_finds(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(topk_cpu, "THREAD_SCORES", 100)
    for num_rows in (1, 2, 7, 100):
        check(draw(0, num_rows, 64), 8)


def test_scores_of_any_size_keep_their_order():
    large, small = torch.finfo(torch.float32).max, torch.finfo(torch.float32).smallest_normal / 4
    numbers = [0.0, -0.0, 1.0, 1.0 + 2**-23, small, 2 * small, large, float("inf")]
    scores_YC = torch.tensor([*numbers, *(-number for number in numbers)])
    for seed in range(5):
        order_YC = torch.rand(4, len(scores_YC), generator=torch.Generator().manual_seed(seed)).argsort(1)
        for k in (1, 5, len(scores_YC)):
            check(scores_YC[order_YC], k)


@pytest.mark.parametrize("num_others", [0, 300])
def test_what_is_no_number_comes_first_whatever_its_sign_and_takes_no_place_twice(num_others):
    nan, infinity = torch.tensor(float("nan")).abs(), torch.tensor(float("inf"))
    scores_YC = torch.stack([torch.tensor(1.0), nan, -nan, infinity, -infinity, nan]).unsqueeze(0)
    scores_YC = torch.cat([scores_YC, torch.full((1, num_others), -infinity)], dim=1)
    for k in range(1, 7):
        scores_YK, position_YK = find(scores_YC, k)
        assert position_YK.tolist() == [[2, 1, 5, 3, 0, 4][:k]]
        assert torch.equal(scores_YK.isnan(), torch.arange(k).unsqueeze(0) < 3)
        assert torch.equal(scores_YK[:, 3:], scores_YC[:, position_YK[0, 3:]])
