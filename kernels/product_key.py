"""Triton: the exact k best of n * n product-key slots, of which no kernel writes all scores.

The k best of each half are found first: by half_bounds.py, which multiplies twice and sorts little, or by
half_lists.py, which multiplies once and sorts everything. pair_topk_kernel adds the pairs of ranks that can win
(product_key_cpu.py says which) and sorts them; it is apart because it needs both halves of a token.

What it costs: instructions, not memory. Thread instructions per half score, counted in the machine code for sm_90
(triton 3.6, 32 of 1024 kept): 128 to sort everything, about 42 for bounds and lists (8 + 25 + 9), 18 for the pairs by
one warp, where the matrix product takes a fraction of one. variants.py says which way a search goes.

Shapes: T tokens, H heads, n half-keys, K slots read, Q key width of a half, C candidate pairs, X = T * H lists.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import product_key_cpu
from .half_bounds import can_collect, collect
from .half_lists import Lists, sort_all
from .launch import launch
from .ordering import NOTHING, ascending64, top
from .variants import SEARCHES, Pairs, Search, chosen

MAX_TOP_K = 128  # lists of twice that no longer fit in registers


class PairTiles(NamedTuple):
    """Sizes of pair_topk_kernel, all powers of two: lists per program, candidates of each, and how many are kept."""

    LISTS: int
    CANDIDATES: int
    TOP: int


def search(queries_TH2Q: Tensor, half_keys_H2nQ: Tensor, k: int, way: Search | None = None) -> tuple[Tensor, Tensor]:
    """Scores and slots of the k best pairs, (T, H, K) float32 and int64, equal scores in order of slots.

    What the kernels cannot pack goes to the torch search, on the device it is on: float64, longer lists, slots
    past int32. NaN ranks above all scores. Where fewer than k sums are finite, which of the infinite ones
    are chosen is fixed, but they need not be the lowest slots. A way that does not fit the sizes sorts everything.
    """
    num_tokens, heads, _, width = queries_TH2Q.shape
    n = half_keys_H2nQ.shape[2]
    if queries_TH2Q.dtype == torch.float64 or k > MAX_TOP_K or n * n > 2**31:
        return product_key_cpu.search(queries_TH2Q, half_keys_H2nQ, k)
    way = way or SEARCHES[chosen("search", queries_TH2Q)]
    device, tiles = queries_TH2Q.device, pair_tiles(k, way.pairs)
    lists = Lists(
        torch.empty(num_tokens, heads, 2, k, dtype=torch.float32, device=device),
        torch.empty(num_tokens, heads, 2, k, dtype=torch.int32, device=device),
        torch.empty(2, tiles.CANDIDATES, dtype=torch.int32, device=device),
    )
    scores_THK = torch.empty(num_tokens, heads, k, dtype=torch.float32, device=device)
    slots_THK = torch.empty(num_tokens, heads, k, dtype=torch.int64, device=device)
    if num_tokens == 0:
        return scores_THK, slots_THK
    inputs = queries_TH2Q.contiguous(), half_keys_H2nQ.contiguous()
    if way.collect and can_collect(n, width, k, queries_TH2Q.dtype, way.collect):
        collect(*inputs, k, lists, way.collect)
    else:
        sort_all(*inputs, k, lists)
    num_lists = num_tokens * heads
    launch(
        pair_topk_kernel,
        (triton.cdiv(num_lists, tiles.LISTS),),
        *lists,
        scores_THK,
        slots_THK,
        num_lists,
        n,
        k,
        num_pairs(k),
        **tiles._asdict(),
        num_warps=max(way.pairs.WARPS, tiles.LISTS * tiles.CANDIDATES // 256),
    )
    return scores_THK, slots_THK


def num_pairs(k: int) -> int:
    """Pairs of ranks, from 1, whose product is at most k."""
    return sum(k // rank for rank in range(1, k + 1))


def pair_tiles(k: int, pairs: Pairs) -> PairTiles:
    """As many lists per program as there are candidates for."""
    top_k = max(2, triton.next_power_of_2(k))
    candidates = max(top_k, triton.next_power_of_2(num_pairs(k)))
    return PairTiles(max(1, pairs.CANDIDATES // candidates), candidates, top_k)


# o_x lists (token and head), o_c candidates of each
@triton.jit(do_not_specialize=["num_lists"])
def pair_topk_kernel(
    best,  # (X, 2, K) float32, descending
    index,  # (X, 2, K) int32
    ranks,  # (2, C) int32
    scores,  # (X, K) out, float32
    slots,  # (X, K) out, int64
    num_lists,
    n,
    k,
    num_pairs,
    LISTS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    TOP: tl.constexpr,
):
    o_c = tl.arange(0, CANDIDATES)
    b_i = tl.load(ranks + o_c)  # [CANDIDATES]
    b_j = tl.load(ranks + CANDIDATES + o_c)
    o_x = tl.program_id(0).to(tl.int64) * LISTS + tl.arange(0, LISTS)
    m_xc = (o_x < num_lists)[:, None] & (o_c < num_pairs)[None, :]
    o_first = o_x[:, None] * (2 * k) + b_i[None, :]
    o_second = o_x[:, None] * (2 * k) + (k + b_j)[None, :]
    b_first = tl.load(best + o_first, mask=m_xc, other=0).to(tl.float64)  # [LISTS, CANDIDATES]
    b_second = tl.load(best + o_second, mask=m_xc, other=0).to(tl.float64)
    b_slots = tl.load(index + o_first, mask=m_xc, other=0) * n + tl.load(index + o_second, mask=m_xc, other=0)
    b_sums = tl.where(m_xc, ascending64(b_first + b_second), NOTHING)
    b_sums, b_slots = top(b_sums, b_slots, TOP, ASCENDING=False, TIES=True)
    b_sums = b_sums ^ ((b_sums >> 63) & 0x7FFFFFFFFFFFFFFF)
    b_scores = b_sums.to(tl.float64, bitcast=True).to(tl.float32)
    o_k = tl.arange(0, TOP)
    o_out = o_x[:, None] * k + o_k[None, :]
    m_out = (o_x < num_lists)[:, None] & (o_k < k)[None, :]
    tl.store(scores + o_out, b_scores, mask=m_out)
    tl.store(slots + o_out, b_slots.to(tl.int64), mask=m_out)
