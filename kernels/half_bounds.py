"""Triton: the k best half-keys of each token, head and half, by a bound that at least k of them reach.

bound_kernel multiplies queries and half-keys and keeps only the best score of each group of half-keys (one instruction
a score, where a sort takes a hundred); the k-th best of these is the bound. collect_kernel multiplies again and stores
the few scores that reach it; order_kernel sorts those. A list is settled if at least k and at most ROOM scores were
found; the others (a row of zeros ties in all its scores) are sorted in full by redo_kernel of half_lists.py, which
reads on the device how many there are.

Why that is exact: all of a list's scores that its bound leaves out are below those found, in the numbers of the second
product, and the found ones are sorted with their half-keys. What the first product rounds otherwise can at most leave
too few, which is seen. Places are handed out by a counter, in no fixed order; sorting makes the result independent of
it. Nothing is exchanged within a kernel.

Trades: twice the product, and 8 bytes for each place of a list. For 16 bits and up to MOST_KEPT kept: without tensor
cores the second product costs more than it saves, and longer lists have more group maxima than registers.

Shapes: T tokens, X heads and halves, L = T * X lists, n half-keys, K kept of each list, Q key width of a half.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .half_lists import Lists, multiply, sort_again, write_lists, write_ranks
from .launch import launch
from .ordering import NOTHING, ascending32, kth, score_of, top
from .variants import Collect

MOST_KEPT = 32
COLLECTED = 64  # half-keys of a tile of collect_kernel: a place and 8 bytes for each take registers
ORDERED = 256  # places sorted by a program of one warp
LEAST_ROOM = 16


def can_collect(n: int, width: int, k: int, dtype: torch.dtype, tiles: Collect) -> bool:
    """Whether there are half-keys to leave out, and tiles and lists fit. Does not depend on the number of tokens."""
    return (
        dtype.itemsize == 2
        and k <= MOST_KEPT
        and n >= 2 * tiles.GROUPS >= 4 * triton.next_power_of_2(k)
        and (width <= tiles.COLUMNS or not tiles.RESIDENT)
    )


def collect(queries_TH2Q: Tensor, half_keys_H2nQ: Tensor, k: int, lists: Lists, tiles: Collect) -> None:
    """Fill the lists of all tokens, heads and halves."""
    num_tokens, heads, _, width = queries_TH2Q.shape
    n, halves, device = half_keys_H2nQ.shape[2], heads * 2, queries_TH2Q.device
    top_k = max(2, triton.next_power_of_2(k))
    room = max(LEAST_ROOM, 2 * top_k)
    bounds_L = torch.empty(num_tokens * halves, dtype=torch.float32, device=device)
    counts_L = torch.empty(num_tokens * halves, dtype=torch.int32, device=device)
    found_LR = torch.empty(num_tokens * halves, room, dtype=torch.int64, device=device)
    again_XT = torch.empty(halves, num_tokens, dtype=torch.int32, device=device)
    num_again_X = torch.empty(halves, dtype=torch.int32, device=device)
    columns = max(16, triton.next_power_of_2(width))
    sizes = {
        "TOKENS": tiles.TOKENS,
        "COLUMNS": columns if tiles.RESIDENT else min(columns, tiles.COLUMNS),
        "RESIDENT": tiles.RESIDENT,
        "STAGES": tiles.STAGES if tiles.RESIDENT else 1,  # else those of the loop within
        "num_warps": tiles.WARPS,
        "num_stages": tiles.STAGES,
    }
    grid = triton.cdiv(num_tokens, tiles.TOKENS), halves
    inputs, numbers = (queries_TH2Q, half_keys_H2nQ), (num_tokens, halves, n, width)
    options = {
        "GROUPS": tiles.GROUPS,
        "EVEN": n % tiles.GROUPS == 0,
        "TOP": top_k,
        "CANDIDATES": lists.ranks_2C.shape[1],
    }
    outputs = bounds_L, counts_L, num_again_X, lists.ranks_2C
    launch(bound_kernel, grid, *inputs, *outputs, *numbers, k, **sizes, **options)
    keys = min(COLLECTED, tiles.GROUPS)
    options = {"KEYS": keys, "EVEN": n % keys == 0, "ROOM": room}
    launch(collect_kernel, grid, *inputs, bounds_L, counts_L, found_LR, *numbers, **sizes, **options)
    per_program = ORDERED // room
    launch(
        order_kernel,
        (triton.cdiv(num_tokens * halves, per_program),),
        found_LR,
        counts_L,
        lists.best_TH2K,
        lists.index_TH2K,
        again_XT,
        num_again_X,
        num_tokens,
        halves,
        k,
        LISTS=per_program,
        ROOM=room,
        TOP=top_k,
        num_warps=1,
    )
    sort_again(queries_TH2Q, half_keys_H2nQ, k, lists, again_XT, num_again_X)


@triton.jit
def load_queries(queries, o_lists, m_t, width, COLUMNS: tl.constexpr, RESIDENT: tl.constexpr):
    """[TOKENS, COLUMNS] of them, if they are to stay."""
    if RESIDENT:
        o_q = tl.arange(0, COLUMNS)
        m_q = m_t[:, None] & (o_q < width)[None, :]
        b_queries = tl.load(queries + o_lists[:, None] * width + o_q[None, :], mask=m_q, other=0)
    else:
        b_queries = o_lists  # stands for nothing
    return b_queries


# i_t tile of tokens, i_x head and half, o_n half-keys, of which each place stands for a group, b_most the groups' best
@triton.jit(do_not_specialize=["num_tokens"])
def bound_kernel(
    queries,  # (T, X, Q) float
    half_keys,  # (X, n, Q) float
    bounds,  # (T, X) out, float32
    counts,  # (T, X) out, int32, made 0 for collect_kernel
    num_again,  # (X,) out, int32, made 0 for order_kernel
    ranks,  # (2, C) out, int32
    num_tokens,
    num_halves,
    n,
    width,
    k,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RESIDENT: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    TOP: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    i_x = tl.program_id(1).to(tl.int64)
    if i_t == 0:
        tl.store(num_again + i_x, 0)
        if i_x == 0:
            write_ranks(ranks, k, CANDIDATES)
    o_t = i_t * TOKENS + tl.arange(0, TOKENS)
    m_t = o_t < num_tokens
    o_lists = o_t * num_halves + i_x
    b_queries = load_queries(queries, o_lists, m_t, width, COLUMNS, RESIDENT)
    b_most = tl.full([TOKENS, GROUPS], float("-inf"), tl.float32)
    for first in tl.range(0, n, GROUPS, num_stages=STAGES):
        o_n = first + tl.arange(0, GROUPS)
        b_scores = multiply(
            queries, half_keys, b_queries, o_lists, m_t, i_x, o_n, n, width, TOKENS, GROUPS, COLUMNS, RESIDENT
        )
        if not EVEN:
            b_scores = tl.where((o_n < n)[None, :], b_scores, float("-inf"))
        b_most = tl.maximum(b_most, b_scores)
    tl.store(bounds + o_lists, score_of(kth(ascending32(b_most), TOP)), mask=m_t)
    tl.store(counts + o_lists, tl.zeros([TOKENS], tl.int32), mask=m_t)


# i_t tile of tokens, i_x head and half, o_n half-keys
@triton.jit(do_not_specialize=["num_tokens"])
def collect_kernel(
    queries,  # (T, X, Q) float
    half_keys,  # (X, n, Q) float
    bounds,  # (T, X) float32
    counts,  # (T, X) in and out, int32: scores that reach the bound, also those for which there is no room
    found,  # (T, X, ROOM) out, int64: the bits of a score, and its half-key
    num_tokens,
    num_halves,
    n,
    width,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RESIDENT: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    ROOM: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    i_x = tl.program_id(1).to(tl.int64)
    o_t = i_t * TOKENS + tl.arange(0, TOKENS)
    m_t = o_t < num_tokens
    o_lists = o_t * num_halves + i_x
    b_bounds = tl.load(bounds + o_lists, mask=m_t, other=float("inf"))  # [TOKENS]
    b_queries = load_queries(queries, o_lists, m_t, width, COLUMNS, RESIDENT)
    p_counts = tl.broadcast_to((counts + o_lists)[:, None], [TOKENS, KEYS])
    for first in tl.range(0, n, KEYS, num_stages=STAGES):
        o_n = first + tl.arange(0, KEYS)
        b_scores = multiply(
            queries, half_keys, b_queries, o_lists, m_t, i_x, o_n, n, width, TOKENS, KEYS, COLUMNS, RESIDENT
        )
        # Not below, so that what is not a number is found.
        m_found = m_t[:, None] & ((b_scores >= b_bounds[:, None]) | (b_scores != b_scores))
        if not EVEN:
            m_found = m_found & (o_n < n)[None, :]
        b_place = tl.atomic_add(p_counts, 1, mask=m_found, sem="relaxed")
        b_packed = (b_scores.to(tl.int32, bitcast=True).to(tl.int64) << 32) | o_n[None, :]
        tl.store(found + o_lists[:, None] * ROOM + b_place, b_packed, mask=m_found & (b_place < ROOM))


# o_l lists, o_r places of each
@triton.jit(do_not_specialize=["num_tokens"])
def order_kernel(
    found,  # (T, X, ROOM) int64, the first counts of each list
    counts,  # (T, X) int32
    best,  # (T, X, K) out, float32, descending
    index,  # (T, X, K) out, int32
    again,  # (X, T) out, int32: tokens whose list is not settled
    num_again,  # (X,) in and out, int32
    num_tokens,
    num_halves,
    k,
    LISTS: tl.constexpr,
    ROOM: tl.constexpr,
    TOP: tl.constexpr,
):
    o_l = tl.program_id(0).to(tl.int64) * LISTS + tl.arange(0, LISTS)
    num_lists = num_tokens.to(tl.int64) * num_halves
    m_l = o_l < num_lists
    b_counts = tl.load(counts + o_l, mask=m_l, other=0)  # [LISTS]
    m_settled = m_l & (b_counts >= k) & (b_counts <= ROOM)
    o_x = o_l % num_halves
    b_place = tl.atomic_add(num_again + o_x, 1, mask=m_l & ~m_settled, sem="relaxed")
    o_t = (o_l // num_halves).to(tl.int32)
    tl.store(again + o_x * num_tokens + b_place, o_t, mask=m_l & ~m_settled)
    o_r = tl.arange(0, ROOM)
    m_lr = m_settled[:, None] & (o_r[None, :] < b_counts[:, None])
    b_found = tl.load(found + o_l[:, None] * ROOM + o_r[None, :], mask=m_lr, other=0)  # [LISTS, ROOM]
    b_scores = (b_found >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    b_packed = (ascending32(b_scores).to(tl.int64) << 32) | (b_found.to(tl.int32) ^ 0x7FFFFFFF)
    b_packed = tl.where(m_lr, b_packed, NOTHING)
    b_packed, _ = top(b_packed, b_packed, TOP, ASCENDING=False, TIES=False)
    write_lists(best, index, b_packed, o_l, m_settled, k, TOP)
