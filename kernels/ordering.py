"""Triton: exact selection by sorting networks over integers, of which a search is made.

Scores become integers that order as they do, packed above an index where ties are to go to the lower one. A network has
no branch that depends on data and needs no scratch memory. Device functions only; product_key.py says what they cost.
"""

import triton
import triton.language as tl

# What a position that holds no candidate is packed as: below every score, NaN and infinities included.
NOTHING = tl.constexpr(-(2**63))


@triton.jit
def ascending32(b_scores):
    """int32 that order as the scores do; both zeros are one number and any NaN is the largest."""
    b_bits = tl.where(b_scores == 0, 0.0, b_scores).to(tl.int32, bitcast=True)
    return tl.where(b_scores == b_scores, b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def ascending64(b_scores):
    """The same for float64 and int64."""
    b_bits = tl.where(b_scores == 0, 0.0, b_scores).to(tl.int64, bitcast=True)
    return tl.where(b_scores == b_scores, b_bits ^ ((b_bits >> 63) & 0x7FFFFFFFFFFFFFFF), 0x7FFFFFFFFFFFFFFF)


@triton.constexpr_function
def log2(size):
    """Of a power of two."""
    return size.bit_length() - 1


@triton.jit
def other(b_pairs):
    """Of (R, B, 2, S), each number's partner: their sum less the number, whatever overflows on the way.

    By maximum and minimum a sort of 64-bit keys takes 158 instructions a half score on sm_90, so 114.
    """
    return tl.sum(b_pairs, 2, keep_dims=True) - b_pairs


@triton.jit
def less(b_keys, b_slots, TIES: tl.constexpr):
    """Whether each number is less than its partner; with TIES the lower slot is the larger of equal keys."""
    m_less = other(b_keys) > b_keys
    if TIES:
        m_less = m_less | ((other(b_keys) == b_keys) & (other(b_slots) < b_slots))
    return m_less


@triton.jit
def exchange(b_keys, b_slots, SPAN: tl.constexpr, RUN: tl.constexpr, ASCENDING: tl.constexpr, TIES: tl.constexpr):
    """Places SPAN apart in a row trade what they hold if out of order: one step of a bitonic sort of (R, C).

    Runs of RUN places are ordered in turn one way and the other, the first ascending or not. Without TIES keys
    are distinct, and slots are not moved.
    """
    ROWS: tl.constexpr = b_keys.shape[0]
    SIZE: tl.constexpr = b_keys.shape[1]
    BLOCKS: tl.constexpr = SIZE // (2 * SPAN)
    b_keys = tl.reshape(b_keys, [ROWS, BLOCKS, 2, SPAN])
    b_slots = tl.reshape(b_slots, [ROWS, BLOCKS, 2, SPAN])
    m_less = less(b_keys, b_slots, TIES)
    m_ascending = (tl.arange(0, BLOCKS) * (2 * SPAN) // RUN % 2 != ASCENDING)[None, :, None, None]
    m_second = (tl.arange(0, 2) == 1)[None, None, :, None]
    m_trade = m_less == (m_second == m_ascending)
    b_keys = tl.where(m_trade, other(b_keys), b_keys)
    if TIES:
        b_slots = tl.where(m_trade, other(b_slots), b_slots)
    return tl.reshape(b_keys, [ROWS, SIZE]), tl.reshape(b_slots, [ROWS, SIZE])


@triton.jit
def merge(b_keys, b_slots, RUN: tl.constexpr, ASCENDING: tl.constexpr, TIES: tl.constexpr):
    """Order each run of RUN places that rises and then falls, or the other way round."""
    for step in tl.static_range(log2(RUN)):
        b_keys, b_slots = exchange(b_keys, b_slots, RUN >> (step + 1), RUN, ASCENDING, TIES)
    return b_keys, b_slots


@triton.jit
def halve(b_keys, b_slots, RUN: tl.constexpr, TIES: tl.constexpr):
    """Of each two runs, one ascending and one not, the larger at each place: the RUN largest of both."""
    ROWS: tl.constexpr = b_keys.shape[0]
    HALF: tl.constexpr = b_keys.shape[1] // 2
    b_keys = tl.reshape(b_keys, [ROWS, HALF // RUN, 2, RUN])
    b_slots = tl.reshape(b_slots, [ROWS, HALF // RUN, 2, RUN])
    b_slots = tl.sum(tl.where(less(b_keys, b_slots, TIES), 0, b_slots), 2)
    return tl.reshape(tl.max(b_keys, 2), [ROWS, HALF]), tl.reshape(b_slots, [ROWS, HALF])


@triton.jit
def top(b_keys, b_slots, TOP: tl.constexpr, ASCENDING: tl.constexpr, TIES: tl.constexpr):
    """The TOP largest keys of each row in order, and their slots."""
    for stage in tl.static_range(log2(TOP)):
        b_keys, b_slots = merge(b_keys, b_slots, 2 << stage, ASCENDING, TIES)
    for _ in tl.static_range(log2(b_keys.shape[1]) - log2(TOP)):
        b_keys, b_slots = halve(b_keys, b_slots, TOP, TIES)
        b_keys, b_slots = merge(b_keys, b_slots, TOP, ASCENDING, TIES)
    return b_keys, b_slots


@triton.jit
def score_of(b_keys):
    """The float32 that ascending32 made these int32 of."""
    return (b_keys ^ ((b_keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def exchange32(b_keys, SPAN: tl.constexpr, RUN: tl.constexpr, ASCENDING: tl.constexpr):
    """As exchange, of int32 alone: for these maximum and minimum are one instruction each."""
    ROWS: tl.constexpr = b_keys.shape[0]
    SIZE: tl.constexpr = b_keys.shape[1]
    BLOCKS: tl.constexpr = SIZE // (2 * SPAN)
    b_pairs = tl.reshape(b_keys, [ROWS, BLOCKS, 2, SPAN])
    b_high, b_low = tl.max(b_pairs, 2, keep_dims=True), tl.min(b_pairs, 2, keep_dims=True)
    m_ascending = (tl.arange(0, BLOCKS) * (2 * SPAN) // RUN % 2 != ASCENDING)[None, :, None, None]
    m_second = (tl.arange(0, 2) == 1)[None, None, :, None]
    return tl.reshape(tl.where(m_second == m_ascending, b_high, b_low), [ROWS, SIZE])


@triton.jit
def kth(b_keys, TOP: tl.constexpr):
    """The TOP-th largest int32 of each row of 2 * TOP or more."""
    ROWS: tl.constexpr = b_keys.shape[0]
    for stage in tl.static_range(log2(TOP)):
        for step in tl.static_range(stage + 1):
            b_keys = exchange32(b_keys, (1 << stage) >> step, 2 << stage, True)
    for _ in tl.static_range(log2(b_keys.shape[1]) - log2(TOP) - 1):
        b_keys = tl.reshape(b_keys, [ROWS, b_keys.shape[1] // (2 * TOP), 2, TOP])
        b_keys = tl.reshape(tl.max(b_keys, 2), [ROWS, b_keys.shape[1] * TOP])
        for step in tl.static_range(log2(TOP)):
            b_keys = exchange32(b_keys, TOP >> (step + 1), TOP, True)
    return tl.min(tl.max(tl.reshape(b_keys, [ROWS, 2, TOP]), 1), 1)
