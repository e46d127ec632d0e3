"""Triton: the k best half-keys of each token, head and half, by sorting all scores as they are made.

half_topk_kernel multiplies a tile of queries with all half-keys of one head and half, a tile at a time, and keeps the k
best in registers: what leaves the chip is k scores and indices a list. redo_kernel does the same for the lists that
half_bounds.py could not settle, of which only the device knows how many there are.

Shapes: T tokens, X heads and halves, n half-keys, K kept of each list, Q key width of a half.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .ordering import NOTHING, ascending32, merge, score_of, top

# Half scores sorted at a time by a program: 32 per thread, 64 registers once packed. Without tensor cores
# the product takes registers too.
SCORES = {torch.float32: 2048, torch.bfloat16: 4096, torch.float16: 4096}
COLUMNS = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}  # of queries and keys multiplied at a time
WARPS = 4
STAGES = 3  # tiles of queries and half-keys under way
SHARED_BYTES = 65536  # for them; the least that a GPU meant here has for a program (MI300, Turing)
REDO_PROGRAMS = 64  # for each head and half, as what is to be done again is not known


class HalfTiles(NamedTuple):
    """Sizes of half_topk_kernel, all powers of two: tokens, half-keys and columns of a tile, and the list kept."""

    TOKENS: int
    KEYS: int
    COLUMNS: int
    TOP: int


class Lists(NamedTuple):
    """What both halves of a search pass on to the sum of pairs."""

    best_TH2K: Tensor  # float32, descending
    index_TH2K: Tensor  # int32
    ranks_2C: Tensor  # int32, of the first and of the second half of each pair that can win


def half_tiles(n: int, width: int, k: int, dtype: torch.dtype) -> HalfTiles:
    """Twice as many half-keys as are kept, if so many there are, and as many tokens (16 or more) as then fit.

    Columns are halved where the tiles under way would need more than SHARED_BYTES.
    """
    top_k = max(2, triton.next_power_of_2(k))
    keys = min(2 * max(top_k, 32), triton.next_power_of_2(n), SCORES[dtype] // 16)
    keys = max(16, top_k, keys)
    tokens = SCORES[dtype] // max(64, keys)
    columns = max(16, min(triton.next_power_of_2(width), COLUMNS[dtype]))
    while STAGES * (tokens + keys) * columns * dtype.itemsize > SHARED_BYTES:
        columns //= 2
    return HalfTiles(tokens, keys, columns, top_k)


def sort_all(queries_TH2Q: Tensor, half_keys_H2nQ: Tensor, k: int, lists: Lists) -> None:
    """Fill the lists of all tokens, heads and halves."""
    num_tokens, heads, _, width = queries_TH2Q.shape
    n = half_keys_H2nQ.shape[2]
    tiles = half_tiles(n, width, k, queries_TH2Q.dtype)
    grid = triton.cdiv(num_tokens, tiles.TOKENS), heads * 2
    sizes = num_tokens, heads * 2, n, width, k
    options = {**tiles._asdict(), "CANDIDATES": lists.ranks_2C.shape[1], "num_warps": WARPS, "num_stages": STAGES}
    launch(half_topk_kernel, grid, queries_TH2Q, half_keys_H2nQ, *lists, *sizes, **options)


def sort_again(
    queries_TH2Q: Tensor, half_keys_H2nQ: Tensor, k: int, lists: Lists, again_XT: Tensor, num_again_X: Tensor
) -> None:
    """Fill those lists only, of head and half x, whose tokens are the first num_again[x] of again[x]."""
    num_tokens, heads, _, width = queries_TH2Q.shape
    n = half_keys_H2nQ.shape[2]
    tiles = half_tiles(n, width, k, queries_TH2Q.dtype)
    grid = min(triton.cdiv(num_tokens, tiles.TOKENS), REDO_PROGRAMS), heads * 2
    sizes = num_tokens, heads * 2, n, width, k
    tensors = queries_TH2Q, half_keys_H2nQ, lists.best_TH2K, lists.index_TH2K, again_XT, num_again_X
    launch(redo_kernel, grid, *tensors, *sizes, **tiles._asdict(), num_warps=WARPS, num_stages=STAGES)


@triton.jit
def write_ranks(ranks, k, CANDIDATES: tl.constexpr):
    """The pairs of ranks that can win: rank i of the first half goes with ranks 0 .. k // (i + 1) - 1 of the second.

    Once a search, by one program: all programs of the kernel that adds the pairs would divide k times each.
    """
    o_c = tl.arange(0, CANDIDATES)
    b_i = tl.zeros([CANDIDATES], tl.int32)
    b_start = tl.zeros([CANDIDATES], tl.int32)
    end = 0
    for rank in range(1, k + 1):
        end += k // rank
        b_i += (o_c >= end).to(tl.int32)
        b_start = tl.where(o_c >= end, end, b_start)
    m_c = o_c < end
    tl.store(ranks + o_c, tl.where(m_c, b_i, 0))
    tl.store(ranks + CANDIDATES + o_c, tl.where(m_c, o_c - b_start, 0))


@triton.jit
def multiply(
    queries,
    half_keys,
    b_queries,
    o_lists,
    m_t,
    i_x,
    o_n,
    n,
    width,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """Scores [TOKENS, KEYS] of a tile of half-keys; resident, of queries that are there already."""
    m_n = o_n < n
    p_keys = half_keys + (i_x * n + o_n)[None, :] * width
    if RESIDENT:
        o_q = tl.arange(0, COLUMNS)
        b_keys = tl.load(p_keys + o_q[:, None], mask=m_n[None, :] & (o_q < width)[:, None], other=0)  # [COLUMNS, KEYS]
        b_scores = tl.dot(b_queries, b_keys, input_precision="ieee")
    else:
        b_scores = tl.zeros([TOKENS, KEYS], tl.float32)
        for start in range(0, width, COLUMNS):
            o_q = start + tl.arange(0, COLUMNS)
            m_q = o_q < width
            o_queries = o_lists[:, None] * width + o_q[None, :]
            b_tile = tl.load(queries + o_queries, mask=m_t[:, None] & m_q[None, :], other=0)  # [TOKENS, COLUMNS]
            b_keys = tl.load(p_keys + o_q[:, None], mask=m_n[None, :] & m_q[:, None], other=0)  # [COLUMNS, KEYS]
            b_scores = tl.dot(b_tile, b_keys, b_scores, input_precision="ieee")
    return b_scores


# o_t tokens, o_n half-keys, b_best the list so far
@triton.jit
def fill_lists(
    queries,
    half_keys,
    best,
    index,
    o_t,
    m_t,
    i_x,
    num_halves,
    n,
    width,
    k,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOP: tl.constexpr,
):
    """Scores and indices of the k best half-keys of these tokens."""
    o_lists = o_t * num_halves + i_x
    b_best = tl.full([TOKENS, TOP], NOTHING, tl.int64)
    for first in range(0, n, KEYS):
        o_n = first + tl.arange(0, KEYS)
        # Queries are loaded there, so that any number stands for those that are here already.
        b_scores = multiply(
            queries, half_keys, o_t, o_lists, m_t, i_x, o_n, n, width, TOKENS, KEYS, COLUMNS, RESIDENT=False
        )
        # One integer comparison ranks by score, then by lower index.
        b_packed = (ascending32(b_scores).to(tl.int64) << 32) | (o_n ^ 0x7FFFFFFF)[None, :]
        b_packed = tl.where((o_n < n)[None, :], b_packed, NOTHING)
        b_tile, _ = top(b_packed, b_packed, TOP, ASCENDING=True, TIES=False)
        b_best, _ = merge(tl.maximum(b_best, b_tile), b_best, TOP, ASCENDING=False, TIES=False)
    write_lists(best, index, b_best, o_lists, m_t, k, TOP)


@triton.jit
def write_lists(best, index, b_best, o_lists, m_lists, k, TOP: tl.constexpr):
    """Stores the first k of packed scores and indices."""
    o_k = tl.arange(0, TOP)
    o_out = o_lists[:, None] * k + o_k[None, :]
    m_k = m_lists[:, None] & (o_k < k)[None, :]
    tl.store(best + o_out, score_of((b_best >> 32).to(tl.int32)), mask=m_k)
    tl.store(index + o_out, b_best.to(tl.int32) ^ 0x7FFFFFFF, mask=m_k)


# i_t tile of tokens, i_x head and half
@triton.jit(do_not_specialize=["num_tokens"])
def half_topk_kernel(
    queries,  # (T, X, Q) float, X heads and halves
    half_keys,  # (X, n, Q) float
    best,  # (T, X, K) out, float32, descending
    index,  # (T, X, K) out, int32
    ranks,  # (2, C) out, int32
    num_tokens,
    num_halves,
    n,
    width,
    k,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOP: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    i_x = tl.program_id(1).to(tl.int64)
    if (i_t == 0) & (i_x == 0):
        write_ranks(ranks, k, CANDIDATES)
    o_t = i_t * TOKENS + tl.arange(0, TOKENS)
    m_t = o_t < num_tokens
    fill_lists(queries, half_keys, best, index, o_t, m_t, i_x, num_halves, n, width, k, TOKENS, KEYS, COLUMNS, TOP)


# i_x head and half, o_t places in its list of tokens
@triton.jit(do_not_specialize=["num_tokens"])
def redo_kernel(
    queries,  # (T, X, Q) float, X heads and halves
    half_keys,  # (X, n, Q) float
    best,  # (T, X, K) out, float32, descending
    index,  # (T, X, K) out, int32
    again,  # (X, T) int32, tokens in any order
    num_again,  # (X,) int32
    num_tokens,
    num_halves,
    n,
    width,
    k,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOP: tl.constexpr,
):
    i_x = tl.program_id(1).to(tl.int64)
    count = tl.load(num_again + i_x)
    for first in range(tl.program_id(0) * TOKENS, count, tl.num_programs(0) * TOKENS):
        o_place = first + tl.arange(0, TOKENS)
        m_t = o_place < count
        o_t = tl.load(again + i_x * num_tokens + o_place, mask=m_t, other=0).to(tl.int64)
        fill_lists(queries, half_keys, best, index, o_t, m_t, i_x, num_halves, n, width, k, TOKENS, KEYS, COLUMNS, TOP)
