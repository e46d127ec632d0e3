"""The search equals the reference to the bit of every slot, ties included, and in its gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlayer_kernels import ops, product_key_cpu, reference, topk_cpu
from memlayer_kernels.product_key_cpu import candidate_pairs, exact_topk
from memlayer_kernels.vector_sorts import NONE, PARTITION, SORT

# float32 sums over at most a few hundred terms, in two orders
GRADIENT = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}
MANY_TOKENS = 150


@pytest.fixture(scope="module", autouse=True, params=[PARTITION, SORT, NONE])
def sorts(request):
    """On every processor everything here has to be found; left alone, most of these sizes would meet one way only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk_cpu, "SORTS", request.param)
        patch.setattr(product_key_cpu, "FEW_SCORES", 0)
        yield


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
    for grad, right in zip(*(torch.autograd.grad(s, (queries, half_keys), weight) for s in (found[0], expected[0]))):
        assert grad.dtype == queries.dtype
        torch.testing.assert_close(grad, right, **GRADIENT[queries.dtype])


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    num_tokens=st.one_of(st.integers(1, 6), st.just(MANY_TOKENS)),
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


@pytest.mark.parametrize("whole", [False, True])
def test_blocks_of_tokens_of_which_the_last_overlaps_give_what_one_block_gives(monkeypatch, whole):
    monkeypatch.setattr(product_key_cpu, "BLOCK_SCORES", 2 * 2 * 37 * 40 // torch.get_num_threads())
    assert MANY_TOKENS % 40
    check(*draw(3, MANY_TOKENS, 2, 37, 16, whole=whole), 5)


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e-3, 1e12, 1e17])
def test_queries_and_half_keys_of_any_length_give_what_the_reference_gives(size):
    queries, half_keys = (tensor.detach() for tensor in draw(1, MANY_TOKENS, 2, 12, 3))
    queries[::3] *= size
    queries[1] = 0
    for factor in (1.0, size):
        found, expected = (op.product_key_topk(queries, half_keys * factor, 4) for op in (ops, reference))
        assert torch.equal(found[1], expected[1])
        assert torch.equal(found[0], expected[0])


def test_where_every_score_is_equal_the_lowest_slots_win():
    for num_tokens in (3, MANY_TOKENS):
        queries, half_keys = torch.zeros(num_tokens, 2, 2, 4), torch.randn(2, 2, 9, 4)
        scores, slots = ops.product_key_topk(queries, half_keys, 5)
        assert torch.equal(slots, torch.arange(5).expand(num_tokens, 2, 5))
        assert not scores.any()


@pytest.mark.parametrize("num_tokens", [1, 300])
def test_sums_that_tie_only_after_rounding_are_told_apart(num_tokens):
    """Half scores 0, 1e-9 and 2e-9 beside 1: three equal float32 sums, of which the last is the largest."""
    half_keys = torch.tensor([[0.0, 1e-9, 2e-9], [0.0, 0.0, 1.0]]).view(1, 2, 3, 1)
    queries = torch.ones(num_tokens, 1, 2, 1)
    scores, slots = ops.product_key_topk(queries, half_keys, 2)
    assert slots.unique(dim=0).tolist() == [[[8, 5]]]
    assert scores.unique(dim=0).tolist() == [[[1.0, 1.0]]]
    assert torch.equal(slots, reference.product_key_topk(queries, half_keys, 2)[1])


def check_half_scores(scores, half, k):
    """A search where one half scores this at every token; scores of the other half are far apart in comparison."""
    half_keys = torch.stack([scores, torch.arange(len(scores)) * -(2.0**-16)]).view(1, 2, -1, 1)
    queries = torch.ones(MANY_TOKENS, 1, 2, 1)
    check(queries.requires_grad_(), (half_keys if half == 0 else half_keys.flip(1)).requires_grad_(), k)


@pytest.mark.parametrize("half", [0, 1])
def test_half_scores_next_to_each_other_are_told_apart(half):
    """Neighbouring float32 numbers beside large ones, which no rounding to fewer bits tells apart."""
    check_half_scores(torch.tensor([-1e6, 1.0, 1.0 + 2**-23, 1.0 + 2**-22, 1.0 + 2**-21]), half, 2)


@pytest.mark.parametrize("num_tokens", [2, MANY_TOKENS])
def test_scores_that_are_not_finite_never_give_a_slot_that_does_not_exist(num_tokens):
    queries, half_keys = (tensor.detach() for tensor in draw(0, num_tokens, 2, 12, 3))
    for strange in (float("nan"), float("inf"), -float("inf")):
        broken = half_keys.clone()
        broken[0, 0, 3], broken[1, 1, :7] = strange, strange
        slots = ops.product_key_topk(queries, broken, 6)[1]
        assert slots.min() >= 0
        assert slots.max() < 144
        assert all(len(set(row)) == 6 for row in slots.flatten(0, 1).tolist())
        assert torch.equal(slots, ops.product_key_topk(queries, broken, 6)[1])


@pytest.mark.parametrize("strange", [float("nan"), -float("nan"), float("inf")])
def test_a_score_that_is_not_a_number_ranks_first(strange):
    """Or a model whose half-keys went astray would go on as if they were merely never read."""
    queries, half_keys = (tensor.detach() for tensor in draw(0, MANY_TOKENS, 2, 12, 3))
    half_keys[:, 0, 3] = strange  # inf times numbers of both signs, added, is none
    queries[..., 0], queries[..., 1] = 1.0, -1.0
    for op in (ops, reference):
        scores, slots = op.product_key_topk(queries, half_keys, 4)
        assert scores.isnan().all()
        assert (slots // 12 == 3).all()


def test_half_keys_at_minus_infinity_are_never_chosen_while_others_are_left():
    queries, half_keys = (tensor.detach() for tensor in draw(0, MANY_TOKENS, 2, 12, 3))
    queries[..., 0], half_keys[..., 0] = 1.0, 0.0
    half_keys[:, :, 4:, 0] = -float("inf")
    found, expected = (op.product_key_topk(queries, half_keys, 4) for op in (ops, reference))
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])


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


def test_the_number_of_tokens_beside_it_changes_no_token():
    """The block a token is searched in, the last of which overlaps, is none of its business."""
    queries, half_keys = (tensor.detach() for tensor in draw(0, 700, 2, 40, 4, whole=True))
    whole = product_key_cpu.search(queries, half_keys, 7)
    for tokens in (slice(3, 500), slice(690, 700)):
        part = product_key_cpu.search(queries[tokens], half_keys, 7)
        assert all(torch.equal(a, b[tokens]) for a, b in zip(part, whole))


@settings(max_examples=30, deadline=None)
@given(data=st.data(), num_scores=st.integers(1, 30), whole=st.booleans())
def test_exact_topk_puts_equal_scores_in_order_of_labels(data, num_scores, whole):
    k = data.draw(st.integers(1, num_scores))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    scores_XC = torch.randn(5, num_scores, generator=random)
    if whole:
        scores_XC = scores_XC.round()
    labels_XC = torch.rand(5, num_scores, generator=random).argsort(1)
    for labels in (None, labels_XC):
        by = torch.arange(num_scores).expand(5, -1) if labels is None else labels
        for row, scores, label in zip(exact_topk(scores_XC, k, labels).tolist(), scores_XC, by):
            order = sorted(range(num_scores), key=lambda place: (-scores[place].item(), label[place].item()))
            assert row == order[:k]
