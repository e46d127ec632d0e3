"""Triton: gradients of a lookup from sorted reads, each output written once by one program.

segment_sums gives every row of the result to one program per tile of columns, which walks the row's
reads in order; one very long run (a hub slot) is therefore walked by one program. read_products takes
blocks of sorted reads, whose value rows are then mostly the same few. No atomics and no autotuning: the
same bits on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gather import ROWS, accumulator, column_tile
from .reads import SortedReads

READS = 16  # reads per program of read_products
PRODUCT_COLUMNS = 128  # columns they are multiplied at a time


def segment_sums(
    grad_TV: Tensor, reads: SortedReads, weights_M: Tensor, bounds_S1: Tensor, dtype: torch.dtype
) -> Tensor:
    """sums_SV[s] = sum over the reads m of segment s of weights[m] * grad[tokens[m]].

    Args:
        grad_TV: gradient of what each token read.
        reads: sorted reads.
        weights_M: weight of each sorted read.
        bounds_S1: where each segment begins and the last one ends, int64; a segment may be empty.
        dtype: of the result; sums are taken in float32 (float64 for float64 gradients).
    """
    num_segments, width = bounds_S1.numel() - 1, grad_TV.shape[1]
    sums_SV = torch.empty(num_segments, width, dtype=dtype, device=grad_TV.device)
    if sums_SV.numel() == 0:
        return sums_SV
    columns = column_tile(width)
    segment_sums_kernel[(num_segments, triton.cdiv(width, columns))](
        grad_TV.contiguous(),
        reads.tokens_M,
        weights_M.contiguous(),
        bounds_S1,
        sums_SV,
        width,
        ACC=accumulator(grad_TV.dtype),
        ROWS=ROWS,
        COLUMNS=columns,
    )
    return sums_SV


def read_products(grad_TV: Tensor, values_NV: Tensor, reads: SortedReads) -> Tensor:
    """products_M[reads[m]] = <grad[tokens[m]], values[slots[m]]>, float32 (float64 for float64 values)."""
    num_reads = reads.reads_M.numel()
    dtype = torch.promote_types(values_NV.dtype, torch.float32)
    products_M = torch.empty(num_reads, dtype=dtype, device=values_NV.device)
    if num_reads == 0:
        return products_M
    read_products_kernel[(triton.cdiv(num_reads, READS),)](
        grad_TV.contiguous(),
        values_NV.contiguous(),
        reads.labels_M,
        reads.reads_M,
        reads.tokens_M,
        products_M,
        num_reads,
        values_NV.shape[1],
        ACC=accumulator(values_NV.dtype),
        READS=READS,
        COLUMNS=PRODUCT_COLUMNS,
    )
    return products_M


# i_s segment, i_v tile of columns, o_m reads of the segment, o_v columns, b_acc one partial sum per row
# in flight
@triton.jit
def segment_sums_kernel(
    grad,  # (T, V) float
    tokens,  # (M,) int64
    weights,  # (M,) float
    bounds,  # (S + 1,) int64
    sums,  # (S, V) out, float
    width,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i_s = tl.program_id(0).to(tl.int64)
    i_v = tl.program_id(1)
    o_v = i_v * COLUMNS + tl.arange(0, COLUMNS)
    m_v = o_v < width
    first = tl.load(bounds + i_s)
    last = tl.load(bounds + i_s + 1)
    b_acc = tl.zeros([ROWS, COLUMNS], dtype=ACC)
    for start in range(first, last, ROWS):
        o_m = start + tl.arange(0, ROWS)
        m_m = o_m < last
        b_tokens = tl.load(tokens + o_m, mask=m_m, other=0)  # [ROWS]
        b_weights = tl.load(weights + o_m, mask=m_m, other=0).to(ACC)  # [ROWS]
        o_rows = b_tokens[:, None] * width + o_v[None, :]
        b_rows = tl.load(grad + o_rows, mask=m_m[:, None] & m_v[None, :], other=0)  # [ROWS, COLUMNS]
        b_acc += b_weights[:, None] * b_rows.to(ACC)
    b_sum = tl.sum(b_acc, 0)  # [COLUMNS]
    tl.store(sums + i_s * width + o_v, b_sum.to(sums.dtype.element_ty), mask=m_v)


# i_m block of sorted reads, o_m its reads, o_v columns, b_acc one partial product per read and column
@triton.jit
def read_products_kernel(
    grad,  # (T, V) float
    values,  # (N, V) float
    slots,  # (M,) int32, ascending
    reads,  # (M,) int64
    tokens,  # (M,) int64
    products,  # (M,) out, in the order of the reads
    num_reads,
    width,
    ACC: tl.constexpr,
    READS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i_m = tl.program_id(0).to(tl.int64)
    o_m = i_m * READS + tl.arange(0, READS)
    m_m = o_m < num_reads
    b_slots = tl.load(slots + o_m, mask=m_m, other=0).to(tl.int64)  # [READS]
    b_tokens = tl.load(tokens + o_m, mask=m_m, other=0)  # [READS]
    b_acc = tl.zeros([READS, COLUMNS], dtype=ACC)
    for start in range(0, width, COLUMNS):
        o_v = start + tl.arange(0, COLUMNS)
        m_mv = m_m[:, None] & (o_v < width)[None, :]
        b_grad = tl.load(
            grad + b_tokens[:, None] * width + o_v[None, :], mask=m_mv, other=0
        )  # [READS, COLUMNS]
        b_rows = tl.load(
            values + b_slots[:, None] * width + o_v[None, :], mask=m_mv, other=0
        )  # [READS, COLUMNS]
        b_acc += b_grad.to(ACC) * b_rows.to(ACC)
    b_reads = tl.load(reads + o_m, mask=m_m, other=0)  # [READS]
    tl.store(products + b_reads, tl.sum(b_acc, 1), mask=m_m)
