"""Triton: weighted sum of value rows, one program per token and tile of columns; and rows fetched over the bus.

The K slots of a token are read ROWS at a time, and the next groups of rows are asked for before one is summed, so that
loads overlap. Sums are taken in float32 (float64 for float64 values) in an order that depends on nothing but the
shapes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import MAX_COLUMNS, ROWS, accumulator, column_tile, launch
from .variants import FEW_PROGRAMS, GATHERS, Gather, chosen


def weighted_sum(values_NV: Tensor, slots_TK: Tensor, weights_TK: Tensor, way: Gather | None = None) -> Tensor:
    """reads_TV[t] = sum over k of weights[t, k] * values[slots[t, k]], in the dtype of the values.

    The rows of the values may lie apart; within a row the numbers are next to each other.
    """
    num_tokens, top_k = slots_TK.shape
    width = values_NV.shape[1]
    out_TV = torch.empty(num_tokens, width, dtype=values_NV.dtype, device=values_NV.device)
    if out_TV.numel() == 0:
        return out_TV
    way = way or GATHERS[chosen_way(values_NV, num_tokens)]
    columns = min(column_tile(width), way.COLUMNS)
    launch(
        gather_kernel,
        (num_tokens, triton.cdiv(width, columns)),
        values_NV,
        slots_TK.contiguous(),
        weights_TK.contiguous(),
        out_TV,
        top_k,
        width,
        values_NV.stride(0),
        ACC=accumulator(values_NV.dtype),
        ROWS=ROWS,
        COLUMNS=columns,
        STAGES=1 if values_NV.dtype == torch.float64 else way.STAGES,  # more of float64 spill registers
        num_warps=way.WARPS,
    )
    return out_TV


def chosen_way(values_NV: Tensor, num_tokens: int) -> str:
    """That of few tokens, where programs are fewer than a GPU can run and narrow ones sum in the same order.

    They do where a thread holds all rows of a group, which it does in tiles of 1,024 columns and four warps, and of 256
    and one.
    """
    few = column_tile(values_NV.shape[1]) == MAX_COLUMNS
    few = few and num_tokens * triton.cdiv(values_NV.shape[1], MAX_COLUMNS) < FEW_PROGRAMS
    return chosen("gather few tokens" if few else "gather", values_NV)


# i_t token, i_v tile of columns, o_k reads of the token, o_v columns, b_acc one partial sum per row of a group
@triton.jit
def gather_kernel(
    values,  # (N, V) float
    slots,  # (T, K) int
    weights,  # (T, K) float
    out,  # (T, V), dtype of values
    top_k,
    width,
    row_stride,  # from one row of values to the next
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    i_v = tl.program_id(1)
    o_v = i_v * COLUMNS + tl.arange(0, COLUMNS)
    m_v = o_v < width
    b_acc = tl.zeros([ROWS, COLUMNS], dtype=ACC)
    for start in tl.range(0, top_k, ROWS, num_stages=STAGES):
        o_k = start + tl.arange(0, ROWS)
        m_k = o_k < top_k
        b_slots = tl.load(slots + i_t * top_k + o_k, mask=m_k, other=0).to(tl.int64)  # [ROWS]
        b_weights = tl.load(weights + i_t * top_k + o_k, mask=m_k, other=0).to(ACC)  # [ROWS]
        o_rows = b_slots[:, None] * row_stride + o_v[None, :]
        b_rows = tl.load(values + o_rows, mask=m_k[:, None] & m_v[None, :], other=0)  # [ROWS, COLUMNS]
        b_acc += b_weights[:, None] * b_rows.to(ACC)
    b_read = tl.sum(b_acc, 0)  # [COLUMNS]
    tl.store(out + i_t * width + o_v, b_read.to(out.dtype.element_ty), mask=m_v)


def fetch_rows(values_NV: Tensor, slots_U: Tensor) -> Tensor:
    """rows_UV[u] = values[slots[u]] on the device of the slots; the values may be in pinned memory of the host.

    A GPU reads pinned memory by the host's own addresses, so each row crosses the bus once and nothing waits.
    """
    num_rows, width = slots_U.numel(), values_NV.shape[1]
    rows_UV = torch.empty(num_rows, width, dtype=values_NV.dtype, device=slots_U.device)
    if rows_UV.numel() == 0:
        return rows_UV
    columns = column_tile(width)
    grid = num_rows, triton.cdiv(width, columns)
    launch(fetch_kernel, grid, rows_UV, values_NV, slots_U.contiguous(), width, values_NV.stride(0), COLUMNS=columns)
    return rows_UV


# i_u row, i_v tile of columns, o_v columns
@triton.jit
def fetch_kernel(
    rows,  # (U, V), dtype of values
    values,  # (N, V) float, on the device or in pinned memory of the host
    slots,  # (U,) int
    width,
    row_stride,  # from one row of values to the next
    COLUMNS: tl.constexpr,
):
    i_u = tl.program_id(0).to(tl.int64)
    i_v = tl.program_id(1)
    o_v = i_v * COLUMNS + tl.arange(0, COLUMNS)
    m_v = o_v < width
    slot = tl.load(slots + i_u).to(tl.int64)
    b_row = tl.load(values + slot * row_stride + o_v, mask=m_v, other=0)  # [COLUMNS]
    tl.store(rows + i_u * width + o_v, b_row, mask=m_v)
