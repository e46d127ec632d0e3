"""The search equals the reference to the bit of every slot, ties included, and in its gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlayer_kernels import ops, reference
from memlayer_kernels.product_key import _topk, candidate_pairs, pair_sums

# float32 sums over at most a few hundred terms, in two orders
GRADIENT = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


def draw(seed, num_tokens, heads, n, width, dtype=torch.float32, whole=False):
    """Queries and half-keys; whole numbers make most scores tie."""
    random = torch.Generator().manual_seed(seed)
    queries = torch.randn(num_tokens, heads, 2, width, generator=random)
    half_keys = torch.randn(heads, 2, n, width, generator=random)
    if whole:
        queries, half_keys = queries.round(), half_keys.round()
    return queries.to(dtype).requires_grad_(), half_keys.to(dtype).requires_grad_()


def check(queries, half_keys, k):
    found, expected = (op.product_key_topk(queries, half_keys, k) for op in (ops, reference))
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])
    assert found[0].dtype == torch.promote_types(queries.dtype, torch.float32)
    weight = torch.arange(found[0].numel()).view_as(found[0]).cos()
    for grad, right in zip(
        *(torch.autograd.grad(s, (queries, half_keys), weight) for s in (found[0], expected[0]))
    ):
        assert grad.dtype == queries.dtype
        torch.testing.assert_close(grad, right, **GRADIENT[queries.dtype])


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    num_tokens=st.integers(1, 6),
    heads=st.integers(1, 3),
    n=st.integers(1, 13),
    whole=st.booleans(),
)
def test_equals_the_reference(data, num_tokens, heads, n, whole):
    k = data.draw(st.integers(1, n))
    width = data.draw(st.integers(1, 5))
    check(*draw(data.draw(st.integers(0, 99)), num_tokens, heads, n, width, whole=whole), k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 8, 32, 37])
def test_equals_the_reference_at_a_working_size(dtype, k):
    check(*draw(k, 65, 2, 37, 16, dtype), k)


def test_where_every_score_is_equal_the_lowest_slots_win():
    scores, slots = ops.product_key_topk(torch.zeros(3, 2, 2, 4), torch.randn(2, 2, 9, 4), 5)
    assert torch.equal(slots, torch.arange(5).expand(3, 2, 5))
    assert not scores.any()


def test_sums_that_tie_only_after_rounding_are_told_apart():
    """Half scores 0, 1e-9 and 2e-9 beside 1: three equal float32 sums, of which the last is the largest."""
    half_keys = torch.tensor([[0.0, 1e-9, 2e-9], [0.0, 0.0, 1.0]]).view(1, 2, 3, 1)
    scores, slots = ops.product_key_topk(torch.ones(1, 1, 2, 1), half_keys, 2)
    assert slots.tolist() == [[[8, 5]]]
    assert scores.tolist() == [[[1.0, 1.0]]]
    assert torch.equal(slots, reference.product_key_topk(torch.ones(1, 1, 2, 1), half_keys, 2)[1])


def test_no_tokens_give_empty_results_and_zero_gradients():
    queries, half_keys = draw(0, 0, 2, 5, 3)
    scores, slots = ops.product_key_topk(queries, half_keys, 4)
    assert scores.shape == slots.shape == (0, 2, 4)
    scores.sum().backward()
    assert torch.equal(half_keys.grad, torch.zeros_like(half_keys))


@pytest.mark.parametrize(("k", "count"), [(8, 20), (16, 50), (32, 119)])
def test_candidates_are_the_pairs_with_product_of_ranks_at_most_k(k, count):
    first, second = candidate_pairs(k, torch.device("cpu"))
    assert len(first) == count
    assert ((first + 1) * (second + 1) <= k).all()
    a, b = torch.randn(2, k), torch.randn(2, k)
    assert torch.equal(pair_sums(a, b), a[:, first] + b[:, second])


def test_gradcheck():
    random = torch.Generator().manual_seed(0)
    queries = torch.randn(4, 2, 2, 3, dtype=torch.float64, generator=random, requires_grad=True)
    half_keys = torch.randn(2, 2, 5, 3, dtype=torch.float64, generator=random, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *inputs: ops.product_key_topk(*inputs, 4)[0], (queries, half_keys))


def test_autocast_changes_nothing():
    queries, half_keys = draw(0, 7, 2, 11, 8)
    with torch.autocast("cpu", torch.bfloat16):
        scores, slots = ops.product_key_topk(queries, half_keys, 6)
    expected_scores, expected_slots = ops.product_key_topk(queries, half_keys, 6)
    assert torch.equal(scores, expected_scores)
    assert torch.equal(slots, expected_slots)


def test_only_inputs_that_need_a_gradient_get_one():
    queries, half_keys = draw(0, 7, 2, 11, 8)
    ops.product_key_topk(queries.detach(), half_keys, 3)[0].sum().backward()
    assert queries.grad is None
    assert half_keys.grad.any()


@settings(max_examples=30, deadline=None)
@given(data=st.data(), groups=st.integers(8, 24), k=st.integers(1, 12), whole=st.booleans())
def test_looking_into_the_best_groups_finds_the_scores_of_torch_topk(data, groups, k, whole):
    seed = data.draw(st.integers(0, 2**16))
    scores_XC = torch.randn(5, 8 * groups, generator=torch.Generator().manual_seed(seed))
    if whole:
        scores_XC = scores_XC.round()  # many ties
    best_XK, position_XK = _topk(scores_XC, k)
    assert torch.equal(best_XK, scores_XC.topk(k).values)
    assert torch.equal(scores_XC.gather(-1, position_XK), best_XK)
    assert all(len(set(row)) == k for row in position_XK.tolist())
