"""Triton: the exact k best of n * n product-key slots, in two kernels of which neither writes all scores.

half_topk_kernel multiplies a tile of queries with all half-keys of one head and half, a tile at a time,
and keeps the k best in registers: what leaves the chip is k scores and indices per token, head and half.
pair_topk_kernel adds the pairs of ranks that can win (product_key_cpu.py says which) and sorts them. They
are apart because the second needs both halves of a token, and the registers of the first are full.

Trades: selection is a sorting network over packed (score, index) integers. That is exact, has no branch
that depends on data and needs no scratch memory, but takes about 131 instructions per half score and 35 for the
pairs (counted in the machine code for sm_90, 32 of 1024 kept), where the matrix product takes a fraction of one:
it, not memory, bounds the search. Groups of half-keys of which at first only the best counts would sort half as
much; they need the scores a second time, which on a GPU means multiplying twice or writing them.

Shapes: T tokens, H heads, n half-keys, K slots read, Q key width of a half, C candidate pairs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import product_key_cpu
from .launch import launch

MAX_TOP_K = 128  # lists of twice that no longer fit in registers
# Half scores sorted at a time by a program: 32 per thread, 64 registers once packed. Without tensor cores
# the product takes registers too.
SCORES = {torch.float32: 2048, torch.bfloat16: 4096, torch.float16: 4096}
COLUMNS = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}  # of queries and keys multiplied at a time
CANDIDATES = 1024  # sorted at a time by a program
WARPS = 4
STAGES = 3  # tiles of queries and half-keys under way
SHARED_BYTES = 65536  # for them; the least that a GPU meant here has for a program (MI300, Turing)

# What a position that holds no candidate is packed as: below every score, NaN and infinities included.
NOTHING = tl.constexpr(-(2**63))


class HalfTiles(NamedTuple):
    """Sizes of half_topk_kernel, all powers of two: tokens, half-keys and columns of a tile, and the list kept."""

    TOKENS: int
    KEYS: int
    COLUMNS: int
    TOP: int


class PairTiles(NamedTuple):
    """Sizes of pair_topk_kernel, all powers of two: lists per program, candidates of each, and how many are kept."""

    LISTS: int
    CANDIDATES: int
    TOP: int


def search(queries_TH2Q: Tensor, half_keys_H2nQ: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and slots of the k best pairs, (T, H, K) float32 and int64, equal scores in order of slots.

    What the kernels cannot pack goes to the torch search, on the device it is on: float64, longer lists, slots
    past int32. NaN ranks above all scores. Where fewer than k sums are finite, which of the infinite ones
    are chosen is fixed, but they need not be the lowest slots.
    """
    num_tokens, heads, _, width = queries_TH2Q.shape
    n = half_keys_H2nQ.shape[2]
    if queries_TH2Q.dtype == torch.float64 or k > MAX_TOP_K or n * n > 2**31:
        return product_key_cpu.search(queries_TH2Q, half_keys_H2nQ, k)
    device = queries_TH2Q.device
    best_TH2K = torch.empty(num_tokens, heads, 2, k, dtype=torch.float32, device=device)
    index_TH2K = torch.empty(num_tokens, heads, 2, k, dtype=torch.int32, device=device)
    scores_THK = torch.empty(num_tokens, heads, k, dtype=torch.float32, device=device)
    slots_THK = torch.empty(num_tokens, heads, k, dtype=torch.int64, device=device)
    if num_tokens == 0:
        return scores_THK, slots_THK
    half = half_tiles(n, width, k, queries_TH2Q.dtype)
    launch(
        half_topk_kernel,
        (triton.cdiv(num_tokens, half.TOKENS), heads * 2),
        queries_TH2Q.contiguous(),
        half_keys_H2nQ.contiguous(),
        best_TH2K,
        index_TH2K,
        num_tokens,
        heads * 2,
        n,
        width,
        k,
        **half._asdict(),
        num_warps=WARPS,
        num_stages=STAGES,
    )
    pair = pair_tiles(k)
    launch(
        pair_topk_kernel,
        (triton.cdiv(num_tokens * heads, pair.LISTS),),
        best_TH2K,
        index_TH2K,
        scores_THK,
        slots_THK,
        num_tokens * heads,
        n,
        k,
        **pair._asdict(),
        num_warps=WARPS,
    )
    return scores_THK, slots_THK


def half_tiles(n: int, width: int, k: int, dtype: torch.dtype) -> HalfTiles:
    """Twice as many half-keys as are kept, if so many there are, and as many tokens (16 or more) as then fit.

    Columns are halved where the tiles under way would need more than SHARED_BYTES.
    """
    top = max(2, triton.next_power_of_2(k))
    keys = min(2 * max(top, 32), triton.next_power_of_2(n), SCORES[dtype] // 16)
    keys = max(16, top, keys)
    tokens = SCORES[dtype] // max(64, keys)
    columns = max(16, min(triton.next_power_of_2(width), COLUMNS[dtype]))
    while STAGES * (tokens + keys) * columns * dtype.itemsize > SHARED_BYTES:
        columns //= 2
    return HalfTiles(tokens, keys, columns, top)


def pair_tiles(k: int) -> PairTiles:
    """As many lists per program as give each thread a few candidates."""
    top = max(2, triton.next_power_of_2(k))
    candidates = max(top, triton.next_power_of_2(sum(k // rank for rank in range(1, k + 1))))
    return PairTiles(max(1, CANDIDATES // candidates), candidates, top)


@triton.jit
def _ascending32(b_scores):
    """int32 that order as the scores do; both zeros are one number and any NaN is the largest."""
    b_bits = tl.where(b_scores == 0, 0.0, b_scores).to(tl.int32, bitcast=True)
    return tl.where(b_scores == b_scores, b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def _ascending64(b_scores):
    """The same for float64 and int64."""
    b_bits = tl.where(b_scores == 0, 0.0, b_scores).to(tl.int64, bitcast=True)
    return tl.where(b_scores == b_scores, b_bits ^ ((b_bits >> 63) & 0x7FFFFFFFFFFFFFFF), 0x7FFFFFFFFFFFFFFF)


@triton.constexpr_function
def _log2(size):
    return size.bit_length() - 1


@triton.jit
def _other(b_pairs):
    """Of (R, B, 2, S), each number's partner: their sum less the number, whatever overflows on the way.

    By maximum and minimum a sort of 64-bit keys takes 158 instructions a half score on sm_90, so 114.
    """
    return tl.sum(b_pairs, 2, keep_dims=True) - b_pairs


@triton.jit
def _less(b_keys, b_slots, TIES: tl.constexpr):
    """Whether each number is less than its partner; with TIES the lower slot is the larger of equal keys."""
    m_less = _other(b_keys) > b_keys
    if TIES:
        m_less = m_less | ((_other(b_keys) == b_keys) & (_other(b_slots) < b_slots))
    return m_less


@triton.jit
def _exchange(b_keys, b_slots, SPAN: tl.constexpr, RUN: tl.constexpr, ASCENDING: tl.constexpr, TIES: tl.constexpr):
    """Places SPAN apart in a row trade what they hold if out of order: one step of a bitonic sort of (R, C).

    Runs of RUN places are ordered in turn one way and the other, the first ascending or not. Without TIES keys
    are distinct, and slots are not moved.
    """
    ROWS: tl.constexpr = b_keys.shape[0]
    SIZE: tl.constexpr = b_keys.shape[1]
    BLOCKS: tl.constexpr = SIZE // (2 * SPAN)
    b_keys = tl.reshape(b_keys, [ROWS, BLOCKS, 2, SPAN])
    b_slots = tl.reshape(b_slots, [ROWS, BLOCKS, 2, SPAN])
    m_less = _less(b_keys, b_slots, TIES)
    m_ascending = (tl.arange(0, BLOCKS) * (2 * SPAN) // RUN % 2 != ASCENDING)[None, :, None, None]
    m_second = (tl.arange(0, 2) == 1)[None, None, :, None]
    m_trade = m_less == (m_second == m_ascending)
    b_keys = tl.where(m_trade, _other(b_keys), b_keys)
    if TIES:
        b_slots = tl.where(m_trade, _other(b_slots), b_slots)
    return tl.reshape(b_keys, [ROWS, SIZE]), tl.reshape(b_slots, [ROWS, SIZE])


@triton.jit
def _merge(b_keys, b_slots, RUN: tl.constexpr, ASCENDING: tl.constexpr, TIES: tl.constexpr):
    """Order each run of RUN places that rises and then falls, or the other way round."""
    for step in tl.static_range(_log2(RUN)):
        b_keys, b_slots = _exchange(b_keys, b_slots, RUN >> (step + 1), RUN, ASCENDING, TIES)
    return b_keys, b_slots


@triton.jit
def _halve(b_keys, b_slots, RUN: tl.constexpr, TIES: tl.constexpr):
    """Of each two runs, one ascending and one not, the larger at each place: the RUN largest of both."""
    ROWS: tl.constexpr = b_keys.shape[0]
    HALF: tl.constexpr = b_keys.shape[1] // 2
    b_keys = tl.reshape(b_keys, [ROWS, HALF // RUN, 2, RUN])
    b_slots = tl.reshape(b_slots, [ROWS, HALF // RUN, 2, RUN])
    b_slots = tl.sum(tl.where(_less(b_keys, b_slots, TIES), 0, b_slots), 2)
    return tl.reshape(tl.max(b_keys, 2), [ROWS, HALF]), tl.reshape(b_slots, [ROWS, HALF])


@triton.jit
def _top(b_keys, b_slots, TOP: tl.constexpr, ASCENDING: tl.constexpr, TIES: tl.constexpr):
    """The TOP largest keys of each row in order, and their slots."""
    for stage in tl.static_range(_log2(TOP)):
        b_keys, b_slots = _merge(b_keys, b_slots, 2 << stage, ASCENDING, TIES)
    for _ in tl.static_range(_log2(b_keys.shape[1]) - _log2(TOP)):
        b_keys, b_slots = _halve(b_keys, b_slots, TOP, TIES)
        b_keys, b_slots = _merge(b_keys, b_slots, TOP, ASCENDING, TIES)
    return b_keys, b_slots


# i_t tile of tokens, i_x head and half, o_n half-keys, o_q columns, b_best the list so far
@triton.jit(do_not_specialize=["num_tokens"])
def half_topk_kernel(
    queries,  # (T, X, Q) float, X heads and halves
    half_keys,  # (X, n, Q) float
    best,  # (T, X, K) out, float32, descending
    index,  # (T, X, K) out, int32
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
    i_t = tl.program_id(0).to(tl.int64)
    i_x = tl.program_id(1).to(tl.int64)
    o_t = i_t * TOKENS + tl.arange(0, TOKENS)
    m_t = o_t < num_tokens
    o_lists = o_t * num_halves + i_x
    b_best = tl.full([TOKENS, TOP], NOTHING, tl.int64)
    for first in range(0, n, KEYS):
        o_n = first + tl.arange(0, KEYS)
        m_n = o_n < n
        b_scores = tl.zeros([TOKENS, KEYS], tl.float32)
        for start in range(0, width, COLUMNS):
            o_q = start + tl.arange(0, COLUMNS)
            m_q = o_q < width
            o_queries = o_lists[:, None] * width + o_q[None, :]
            b_queries = tl.load(queries + o_queries, mask=m_t[:, None] & m_q[None, :], other=0)  # [TOKENS, COLUMNS]
            o_keys = (i_x * n + o_n)[None, :] * width + o_q[:, None]
            b_keys = tl.load(half_keys + o_keys, mask=m_n[None, :] & m_q[:, None], other=0)  # [COLUMNS, KEYS]
            b_scores = tl.dot(b_queries, b_keys, b_scores, input_precision="ieee")
        # One integer comparison ranks by score, then by lower index.
        b_packed = (_ascending32(b_scores).to(tl.int64) << 32) | (o_n ^ 0x7FFFFFFF)[None, :]
        b_packed = tl.where(m_n[None, :], b_packed, NOTHING)
        b_tile, _ = _top(b_packed, b_packed, TOP, ASCENDING=True, TIES=False)
        b_best, _ = _merge(tl.maximum(b_best, b_tile), b_best, TOP, ASCENDING=False, TIES=False)
    o_k = tl.arange(0, TOP)
    m_k = m_t[:, None] & (o_k < k)[None, :]
    b_high = (b_best >> 32).to(tl.int32)
    b_high = (b_high ^ ((b_high >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    b_index = b_best.to(tl.int32) ^ 0x7FFFFFFF
    tl.store(best + o_lists[:, None] * k + o_k[None, :], b_high, mask=m_k)
    tl.store(index + o_lists[:, None] * k + o_k[None, :], b_index, mask=m_k)


# o_x lists (token and head), o_c candidates of each
@triton.jit(do_not_specialize=["num_lists"])
def pair_topk_kernel(
    best,  # (X, 2, K) float32, descending
    index,  # (X, 2, K) int32
    scores,  # (X, K) out, float32
    slots,  # (X, K) out, int64
    num_lists,
    n,
    k,
    LISTS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    TOP: tl.constexpr,
):
    o_c = tl.arange(0, CANDIDATES)
    # Rank i of the first half goes with ranks 0 .. k // (i + 1) - 1 of the second: where each run begins.
    b_i = tl.zeros([CANDIDATES], tl.int32)
    b_start = tl.zeros([CANDIDATES], tl.int32)
    end = 0
    for rank in range(1, k + 1):
        end += k // rank
        b_i += (o_c >= end).to(tl.int32)
        b_start = tl.where(o_c >= end, end, b_start)
    o_x = tl.program_id(0).to(tl.int64) * LISTS + tl.arange(0, LISTS)
    m_xc = (o_x < num_lists)[:, None] & (o_c < end)[None, :]
    o_first = o_x[:, None] * (2 * k) + b_i[None, :]
    o_second = o_x[:, None] * (2 * k) + (k + o_c - b_start)[None, :]
    b_first = tl.load(best + o_first, mask=m_xc, other=0).to(tl.float64)  # [LISTS, CANDIDATES]
    b_second = tl.load(best + o_second, mask=m_xc, other=0).to(tl.float64)
    b_slots = tl.load(index + o_first, mask=m_xc, other=0) * n + tl.load(index + o_second, mask=m_xc, other=0)
    b_sums = tl.where(m_xc, _ascending64(b_first + b_second), NOTHING)
    b_sums, b_slots = _top(b_sums, b_slots, TOP, ASCENDING=False, TIES=True)
    b_sums = b_sums ^ ((b_sums >> 63) & 0x7FFFFFFFFFFFFFFF)
    b_scores = b_sums.to(tl.float64, bitcast=True).to(tl.float32)
    o_k = tl.arange(0, TOP)
    o_out = o_x[:, None] * k + o_k[None, :]
    m_out = (o_x < num_lists)[:, None] & (o_k < k)[None, :]
    tl.store(scores + o_out, b_scores, mask=m_out)
    tl.store(slots + o_out, b_slots.to(tl.int64), mask=m_out)
