"""Triton: gradients of a lookup from sorted reads, each output written once by one program.

segment_sums gives every row of the result to one program per tile of columns, which walks the row's
reads in order. The reads are also cut into chunks of CHUNK; a chunk that lies whole in one segment (of a
hub slot) is summed by a program of its own into a float32 buffer, which the segment's program then adds
up in order. So no program walks more than 2 * CHUNK reads, and nothing about the segments has to be known
to the host. read_products takes blocks of sorted reads, whose value rows are then mostly the same few.
No atomics and no autotuning: the same bits on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ROWS, accumulator, column_tile, launch, row_stages
from .reads import SortedReads

CHUNK = 256  # reads; their float32 sums take at most a 1 / CHUNK of what the reads read
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
        bounds_S1: where each segment begins and the last one ends, int64. A segment holds all reads of
            one label that is not negative, or none.
        dtype: of the result; sums are taken in float32 (float64 for float64 gradients).
    """
    num_segments, width = bounds_S1.numel() - 1, grad_TV.shape[1]
    sums_SV = torch.empty(num_segments, width, dtype=dtype, device=grad_TV.device)
    if sums_SV.numel() == 0:
        return sums_SV
    grad_TV, weights_M = grad_TV.contiguous(), weights_M.contiguous()
    columns = column_tile(width)
    sizes = {"ACC": accumulator(grad_TV.dtype), "ROWS": ROWS, "COLUMNS": columns}
    sizes |= {"STAGES": row_stages(grad_TV.dtype), "CHUNK": CHUNK}
    tiles, num_chunks = triton.cdiv(width, columns), weights_M.numel() // CHUNK
    chunks_dtype = torch.promote_types(grad_TV.dtype, torch.float32)
    chunks_CV = torch.empty(num_chunks, width, dtype=chunks_dtype, device=grad_TV.device)
    if num_chunks:
        grid = num_chunks, tiles
        launch(chunk_sums_kernel, grid, grad_TV, reads.labels_M, reads.tokens_M, weights_M, chunks_CV, width, **sizes)
    grid = num_segments, tiles
    launch(segment_sums_kernel, grid, grad_TV, reads.tokens_M, weights_M, bounds_S1, chunks_CV, sums_SV, width, **sizes)
    return sums_SV


def read_products(grad_TV: Tensor, values_NV: Tensor, reads: SortedReads, bounds_N1: Tensor | None = None) -> Tensor:
    """products_M[reads[m]] = <grad[tokens[m]], values[slots[m]]>, float32 (float64 for float64 values)."""
    num_reads = reads.reads_M.numel()
    dtype = torch.promote_types(values_NV.dtype, torch.float32)
    products_M = torch.empty(num_reads, dtype=dtype, device=values_NV.device)
    if num_reads == 0:
        return products_M
    launch(
        read_products_kernel,
        (triton.cdiv(num_reads, READS),),
        grad_TV.contiguous(),
        values_NV,
        reads.labels_M,
        reads.reads_M,
        reads.tokens_M,
        products_M,
        num_reads,
        values_NV.shape[1],
        values_NV.stride(0),
        ACC=accumulator(values_NV.dtype),
        READS=READS,
        COLUMNS=PRODUCT_COLUMNS,
    )
    return products_M


# o_m reads, o_v columns, b_acc one partial sum per row of a group
@triton.jit
def add_reads(
    b_acc,
    grad,
    tokens,
    weights,
    first,
    last,
    o_v,
    m_v,
    width,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Adds weights[m] * grad[tokens[m]] for the sorted reads m from first to last."""
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        o_m = start + tl.arange(0, ROWS)
        m_m = o_m < last
        b_tokens = tl.load(tokens + o_m, mask=m_m, other=0).to(tl.int64)  # [ROWS]
        b_weights = tl.load(weights + o_m, mask=m_m, other=0).to(ACC)  # [ROWS]
        o_rows = b_tokens[:, None] * width + o_v[None, :]
        b_rows = tl.load(grad + o_rows, mask=m_m[:, None] & m_v[None, :], other=0)  # [ROWS, COLUMNS]
        b_acc += b_weights[:, None] * b_rows.to(ACC)
    return b_acc


# i_c chunk of sorted reads, i_v tile of columns
@triton.jit
def chunk_sums_kernel(
    grad,  # (T, V) float
    labels,  # (M,) int, ascending
    tokens,  # (M,) int32
    weights,  # (M,) float
    chunks,  # (M // CHUNK, V) out, only those that lie whole in one segment
    width,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    i_c = tl.program_id(0).to(tl.int64)
    i_v = tl.program_id(1)
    first = i_c * CHUNK
    label = tl.load(labels + first)
    if (label >= 0) & (tl.load(labels + first + CHUNK - 1) == label):
        o_v = i_v * COLUMNS + tl.arange(0, COLUMNS)
        m_v = o_v < width
        b_acc = tl.zeros([ROWS, COLUMNS], dtype=ACC)
        b_acc = add_reads(b_acc, grad, tokens, weights, first, first + CHUNK, o_v, m_v, width, ACC, ROWS, STAGES)
        tl.store(chunks + i_c * width + o_v, tl.sum(b_acc, 0), mask=m_v)


# i_s segment, i_v tile of columns, o_c chunks, o_v columns, b_acc one partial sum per row of a group
@triton.jit
def segment_sums_kernel(
    grad,  # (T, V) float
    tokens,  # (M,) int32
    weights,  # (M,) float
    bounds,  # (S + 1,) int64
    chunks,  # (M // CHUNK, V) ACC
    sums,  # (S, V) out, float
    width,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    i_s = tl.program_id(0).to(tl.int64)
    i_v = tl.program_id(1)
    o_v = i_v * COLUMNS + tl.arange(0, COLUMNS)
    m_v = o_v < width
    first = tl.load(bounds + i_s)
    last = tl.load(bounds + i_s + 1)
    first_chunk = tl.cdiv(first, CHUNK)
    last_chunk = tl.maximum(last // CHUNK, first_chunk)
    # Reads before the whole chunks, and after; without a whole chunk all of them come before.
    head = tl.where(first_chunk < last_chunk, first_chunk * CHUNK, last)
    tail = tl.where(first_chunk < last_chunk, last_chunk * CHUNK, last)
    b_acc = tl.zeros([ROWS, COLUMNS], dtype=ACC)
    b_acc = add_reads(b_acc, grad, tokens, weights, first, head, o_v, m_v, width, ACC, ROWS, STAGES)
    for start in range(first_chunk, last_chunk, ROWS):
        o_c = start + tl.arange(0, ROWS)
        m_cv = (o_c < last_chunk)[:, None] & m_v[None, :]
        b_acc += tl.load(chunks + o_c[:, None] * width + o_v[None, :], mask=m_cv, other=0)
    b_acc = add_reads(b_acc, grad, tokens, weights, tail, last, o_v, m_v, width, ACC, ROWS, STAGES)
    b_sum = tl.sum(b_acc, 0)  # [COLUMNS]
    tl.store(sums + i_s * width + o_v, b_sum.to(sums.dtype.element_ty), mask=m_v)


# i_m block of sorted reads, o_m its reads, o_v columns, b_acc one partial product per read and column
@triton.jit(do_not_specialize=["num_reads"])
def read_products_kernel(
    grad,  # (T, V) float
    values,  # (N, V) float
    slots,  # (M,) int32, ascending
    reads,  # (M,) int64
    tokens,  # (M,) int32
    products,  # (M,) out, in the order of the reads
    num_reads,
    width,
    row_stride,  # from one row of values to the next
    ACC: tl.constexpr,
    READS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i_m = tl.program_id(0).to(tl.int64)
    o_m = i_m * READS + tl.arange(0, READS)
    m_m = o_m < num_reads
    b_slots = tl.load(slots + o_m, mask=m_m, other=0).to(tl.int64)  # [READS]
    b_tokens = tl.load(tokens + o_m, mask=m_m, other=0).to(tl.int64)  # [READS]
    b_acc = tl.zeros([READS, COLUMNS], dtype=ACC)
    for start in range(0, width, COLUMNS):
        o_v = start + tl.arange(0, COLUMNS)
        m_mv = m_m[:, None] & (o_v < width)[None, :]
        b_grad = tl.load(grad + b_tokens[:, None] * width + o_v[None, :], mask=m_mv, other=0)  # [READS, COLUMNS]
        b_rows = tl.load(values + b_slots[:, None] * row_stride + o_v[None, :], mask=m_mv, other=0)  # [READS, COLUMNS]
        b_acc += b_grad.to(ACC) * b_rows.to(ACC)
    b_reads = tl.load(reads + o_m, mask=m_m, other=0)  # [READS]
    tl.store(products + b_reads, tl.sum(b_acc, 1), mask=m_m)
