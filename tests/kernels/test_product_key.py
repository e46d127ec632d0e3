"""The Triton search equals the reference: slots and scores to the bit where scores are exact, else up to rounding."""

import pytest
import torch
import triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memlayer_kernels import gpu, half_lists, library, ops, product_key, reference
from memlayer_kernels.half_lists import half_tiles
from memlayer_kernels.ordering import ascending32, ascending64
from memlayer_kernels.product_key import pair_tiles, search
from memlayer_kernels.variants import FOUR_WARPS, ONE_WARP

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Half scores are float32 sums of exact products (bfloat16, float16) or of rounded ones, in another order.
SCORE = {"rtol": 1e-5, "atol": 2e-5}
INFINITE = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, on inf - inf
GRADIENT = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


def draw(seed, num_tokens, heads, n, width, dtype, device, whole):
    """Queries and half-keys; whole numbers make scores exact, and most of them tie."""
    random = torch.Generator().manual_seed(seed)
    queries = torch.randn(num_tokens, heads, 2, width, generator=random)
    half_keys = torch.randn(heads, 2, n, width, generator=random)
    if whole:
        queries, half_keys = queries.round(), half_keys.round()
    return queries.to(device, dtype), half_keys.to(device, dtype)


def check_exact(queries, half_keys, k):
    scores, slots = search(queries, half_keys, k)
    right_scores, right_slots = reference.product_key_topk(queries, half_keys, k)
    assert torch.equal(slots, right_slots)
    assert torch.equal(scores, right_scores)


def check_rounded(queries, half_keys, k):
    """Scores are the reference's at every rank, and are those of the slots that come with them."""
    scores, slots = search(queries, half_keys, k)
    n = half_keys.shape[2]
    halves = torch.einsum("thcq,hcnq->cthn", queries.double(), half_keys.double())
    of_slots = halves[0].gather(-1, slots // n) + halves[1].gather(-1, slots % n)
    torch.testing.assert_close(scores, of_slots.float(), **SCORE)
    torch.testing.assert_close(scores, reference.product_key_topk(queries, half_keys, k)[0], **SCORE)
    assert (scores[..., 1:] <= scores[..., :-1]).all()
    assert all(len(set(row)) == k for row in slots.flatten(0, 1).tolist())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    num_tokens=st.integers(0, 5),
    heads=st.integers(1, 2),
    n=st.integers(1, 90),
    width=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    whole=st.booleans(),
)
def test_equals_the_reference(device, data, num_tokens, heads, n, width, dtype, whole):
    k = data.draw(st.integers(1, min(n, 9)))
    inputs = draw(data.draw(st.integers(0, 99)), num_tokens, heads, n, width, dtype, device, whole)
    (check_exact if whole else check_rounded)(*inputs, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "n", "width", "k"), [(1, 64, 33, 1), (70, 65, 7, 3), (2, 130, 70, 32)])
def test_equals_the_reference_over_several_tiles(device, num_tokens, n, width, k, dtype):
    check_exact(*draw(0, num_tokens, 2, n, width, dtype, device, whole=True), k)
    check_rounded(*draw(0, num_tokens, 2, n, width, dtype, device, whole=False), k)


@pytest.mark.parametrize("k", [100, 128])
def test_long_lists(device, k):
    check_exact(*draw(0, 2, 1, 150, 5, torch.float16, device, whole=True), k)
    check_exact(*draw(0, 1, 1, k, 5, torch.float32, device, whole=True), k)


def test_where_every_score_is_equal_the_lowest_slots_win(device):
    queries, half_keys = draw(0, 3, 2, 90, 4, torch.float32, device, whole=False)
    scores, slots = search(torch.zeros_like(queries), half_keys, 5)
    assert torch.equal(slots, torch.arange(5, device=device).expand(3, 2, 5))
    assert not scores.any()


def test_sums_that_tie_only_after_rounding_are_told_apart(device):
    """Half scores 0, 1e-9 and 2e-9 beside 1: three equal float32 sums, of which the last is the largest."""
    half_keys = torch.tensor([[0.0, 1e-9, 2e-9], [0.0, 0.0, 1.0]], device=device).view(1, 2, 3, 1)
    scores, slots = search(torch.ones(1, 1, 2, 1, device=device), half_keys, 2)
    assert slots.tolist() == [[[8, 5]]]
    assert scores.tolist() == [[[1.0, 1.0]]]


@triton.jit
def order_kernel(scores, integers, BITS: triton.language.constexpr):
    place = triton.language.arange(0, 16)
    b_scores = triton.language.load(scores + place)
    if BITS == 64:
        triton.language.store(integers + place, ascending64(b_scores))
    else:
        triton.language.store(integers + place, ascending32(b_scores))


@pytest.mark.parametrize("bits", [32, 64])
def test_integers_order_as_scores_do(device, bits):
    floats, integers = ((torch.float32, torch.int32), (torch.float64, torch.int64))[bits == 64]
    least, largest, nan = torch.finfo(floats).smallest_normal / 4, torch.finfo(floats).max, float("nan")
    scores = [-float("inf"), -largest, -2.0, -1.0, -least, 0.0, -0.0, least, 1.0, 1.5, 2.0, 3.0, largest, float("inf")]
    scores = torch.tensor([*scores, nan, -nan], dtype=floats, device=device)
    found = torch.empty(16, dtype=integers, device=device)
    order_kernel[(1,)](scores, found, BITS=bits)
    equal = [place for place in range(15) if found[place] == found[place + 1]]
    assert (found.diff() >= 0).all()
    assert equal == [5, 14]  # the zeros, and what is not a number
    assert found[0] > torch.iinfo(integers).min  # of which a place that holds nothing is made


@INFINITE
def test_half_keys_at_minus_infinity_are_never_chosen_while_others_are_left(device):
    queries, half_keys = draw(0, 3, 2, 12, 3, torch.float32, device, whole=True)
    queries[..., 0], half_keys[..., 0] = 1.0, 0.0
    half_keys[:, :, 4:, 0] = -float("inf")
    check_exact(queries, half_keys, 4)


@INFINITE
@pytest.mark.parametrize("strange", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_never_give_a_slot_that_does_not_exist(device, strange):
    queries, half_keys = draw(0, 3, 2, 12, 3, torch.float32, device, whole=False)
    half_keys[0, 0, 3], half_keys[1, 1, :7] = strange, strange
    _scores, slots = search(queries, half_keys, 6)
    assert slots.min() >= 0
    assert slots.max() < 144
    assert all(len(set(row)) == 6 for row in slots.flatten(0, 1).tolist())
    assert torch.equal(slots, search(queries, half_keys, 6)[1])


def test_a_score_that_is_not_a_number_ranks_first(device):
    half_keys = torch.tensor([[0.0, 3.0, float("nan")], [1.0, 0.0, 0.0]], device=device).view(1, 2, 3, 1)
    scores, slots = search(torch.ones(1, 1, 2, 1, device=device), half_keys, 3)
    assert scores[0, 0].isnan().tolist() == [True, True, True]
    assert slots.tolist() == [[[6, 7, 8]]]


def test_two_runs_give_the_same_bits_whatever_else_is_searched(device):
    queries, half_keys = draw(0, 70, 2, 65, 7, torch.float32, device, whole=False)
    found, again = search(queries, half_keys, 3), search(queries, half_keys, 3)
    part = search(queries[66:], half_keys, 3)
    for first, second, last in zip(found, again, part):
        assert torch.equal(first, second)
        assert torch.equal(first[66:], last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_through_triton_equal_those_of_the_reference(device, monkeypatch, dtype):
    monkeypatch.setattr(library, "_searcher", lambda tensor: product_key)
    monkeypatch.setattr(library, "_backend", lambda tensor: gpu)
    inputs = [tensor.requires_grad_() for tensor in draw(0, 5, 2, 11, 6, dtype, device, whole=True)]
    found, right = (op.product_key_topk(*inputs, 4) for op in (ops, reference))
    assert torch.equal(found[1], right[1])
    weight = torch.arange(found[0].numel(), device=device).view_as(found[0]).cos()
    for grad, right_grad in zip(*(torch.autograd.grad(s, inputs, weight) for s in (found[0], right[0]))):
        torch.testing.assert_close(grad, right_grad, **GRADIENT[dtype])


@pytest.mark.parametrize("through_triton", [False, True])
def test_gradients_in_16_bits_are_those_of_float32_copies_rounded_once(device, monkeypatch, through_triton):
    if through_triton:
        monkeypatch.setattr(library, "_searcher", lambda tensor: product_key)
        monkeypatch.setattr(library, "_backend", lambda tensor: gpu)
    inputs = draw(0, 9, 2, 11, 6, torch.bfloat16, device, whole=True)
    low, wide = ([t.detach().to(dtype).requires_grad_() for t in inputs] for dtype in (torch.bfloat16, torch.float32))
    (scores, slots), (wide_scores, wide_slots) = (ops.product_key_topk(*tensors, 4) for tensors in (low, wide))
    assert torch.equal(slots, wide_slots)
    # Whole numbers, so that every sum is exact in float32, in whatever order it is taken.
    weight = (torch.arange(scores.numel(), device=device) % 13 - 6.0).view_as(scores)
    found, right = torch.autograd.grad(scores, low, weight), torch.autograd.grad(wide_scores, wide, weight)
    assert all(torch.equal(grad, right_grad.bfloat16()) for grad, right_grad in zip(found, right))


@pytest.mark.parametrize(("dtype", "k"), [(torch.float64, 5), (torch.float32, 130)])
def test_what_the_kernels_cannot_pack_is_searched_all_the_same(device, dtype, k):
    check_exact(*draw(0, 3, 2, 140, 4, dtype, device, whole=True), k)


@given(n=st.integers(1, 5000), width=st.integers(1, 600), data=st.data(), dtype=st.sampled_from(DTYPES))
def test_tiles_are_powers_of_two_that_a_program_can_hold(n, width, data, dtype):
    k = data.draw(st.integers(1, min(n, product_key.MAX_TOP_K)))
    half = half_tiles(n, width, k, dtype)
    one, pair = (pair_tiles(k, pairs) for pairs in (ONE_WARP, FOUR_WARPS))
    assert max(ONE_WARP.CANDIDATES, pair.CANDIDATES) == one.LISTS * one.CANDIDATES
    assert all(size & (size - 1) == 0 for size in (*half, *pair))
    assert half.TOP == pair.TOP >= k
    assert half.KEYS >= half.TOP
    assert min(half.TOKENS, half.KEYS, half.COLUMNS) >= 16  # what tl.dot multiplies
    assert half_lists.SCORES[dtype] >= half.TOKENS * half.KEYS
    tile_bytes = (half.TOKENS + half.KEYS) * half.COLUMNS * dtype.itemsize
    assert half_lists.STAGES * tile_bytes <= half_lists.SHARED_BYTES
    assert sum(k // rank for rank in range(1, k + 1)) <= pair.CANDIDATES
