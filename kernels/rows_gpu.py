"""Triton: optimizer steps on chosen rows, one program per row and tile of columns.

Each number of a row, its gradient and its moments is read once and written once: SGD moves 6 bytes a
number in bfloat16 (12 in float32), Adam 22 (28). Steps are computed in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rows_cpu
from .launch import column_tile, launch
from .rows_cpu import bias_corrections, start_of

MIX1, MIX2, STEP = (tl.constexpr(number) for number in (rows_cpu.MIX1, rows_cpu.MIX2, rows_cpu.STEP))


def sgd_rows_(values_NV: Tensor, slots_U: Tensor, grad_UV: Tensor, lr: float, rounding_seed: int | None) -> None:
    """See rows.sgd_rows_."""
    grid, sizes = _launch(values_NV, slots_U, rounding_seed)
    if all(grid):
        launch(sgd_rows_kernel, grid, values_NV, slots_U, grad_UV.contiguous(), values_NV.shape[1], lr, **sizes)


def adam_rows_(
    values_NV: Tensor,
    slots_U: Tensor,
    grad_UV: Tensor,
    exp_avg_NV: Tensor,
    exp_avg_sq_NV: Tensor,
    steps_U: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    rounding_seed: int | None,
) -> None:
    """See rows.adam_rows_; steps_U counts this step."""
    grid, sizes = _launch(values_NV, slots_U, rounding_seed)
    if all(grid):
        launch(
            adam_rows_kernel,
            grid,
            values_NV,
            slots_U,
            grad_UV.contiguous(),
            exp_avg_NV,
            exp_avg_sq_NV,
            *bias_corrections(steps_U, beta1, beta2, torch.float32),
            values_NV.shape[1],
            lr,
            # Differences from 1 are taken here, in float64: Triton gets numbers as float32.
            1 - beta1,
            1 - beta2,
            eps,
            1 - lr * weight_decay,
            **sizes,
        )


def _launch(values_NV: Tensor, slots_U: Tensor, rounding_seed: int | None) -> tuple[tuple[int, int], dict]:
    """The grid of programs, and the arguments of both kernels that follow from the table and the seed."""
    columns = column_tile(values_NV.shape[1])
    grid = (slots_U.numel(), triton.cdiv(values_NV.shape[1], columns))
    stochastic = rounding_seed is not None
    return grid, {
        "start": start_of(rounding_seed) if stochastic else 0,
        "STOCHASTIC": stochastic,
        "COLUMNS": columns,
    }


@triton.jit
def mix(bits):
    """rows_cpu._mix, on unsigned integers."""
    bits = (bits ^ (bits >> 16)) * MIX1
    bits = (bits ^ (bits >> 13)) * MIX2
    return bits ^ (bits >> 16)


# o_v columns, b_row float32
@triton.jit
def write_row(row, b_row, slot, start, o_v, m_v, STOCHASTIC: tl.constexpr):
    """Stores a row in the dtype of the table, rounded to the nearest or as rows_cpu._write rounds."""
    if STOCHASTIC:
        b_bits = mix(mix((slot.to(tl.int32) ^ start).to(tl.uint32, bitcast=True)) + o_v.to(tl.uint32) * STEP) >> 16
        b_rounded = (b_row.to(tl.uint32, bitcast=True) + b_bits) & 0xFFFF0000
        b_finite = tl.abs(b_row) < float("inf")
        b_row = tl.where(b_finite, b_rounded.to(tl.float32, bitcast=True), b_row)
    tl.store(row + o_v, b_row.to(row.dtype.element_ty), mask=m_v)


# i_u chosen row, i_v tile of columns, o_v columns
@triton.jit(do_not_specialize=["start"])
def sgd_rows_kernel(
    values,  # (N, V) float, stepped in place
    slots,  # (U,) int64
    grad,  # (U, V) float
    width,
    lr,
    start,  # of the random bits
    STOCHASTIC: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i_u = tl.program_id(0).to(tl.int64)
    o_v = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_v = o_v < width
    slot = tl.load(slots + i_u)
    b_row = tl.load(values + slot * width + o_v, mask=m_v, other=0).to(tl.float32)  # [COLUMNS]
    b_grad = tl.load(grad + i_u * width + o_v, mask=m_v, other=0).to(tl.float32)  # [COLUMNS]
    write_row(values + slot * width, b_row - lr * b_grad, slot, start, o_v, m_v, STOCHASTIC)


# i_u chosen row, i_v tile of columns, o_v columns, rate1 and rate2 are 1 - beta1 and 1 - beta2
@triton.jit(do_not_specialize=["start"])
def adam_rows_kernel(
    values,  # (N, V) float, stepped in place
    slots,  # (U,) int64
    grad,  # (U, V) float
    exp_avg,  # (N, V) float32, stepped in place
    exp_avg_sq,  # (N, V) float32, stepped in place
    corrections1,  # (U,) float32, by which the means are divided
    corrections2,  # (U,) float32, by which the roots are divided
    width,
    lr,
    rate1,
    rate2,
    eps,
    shrink,  # 1 - lr * weight decay
    start,  # of the random bits
    STOCHASTIC: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i_u = tl.program_id(0).to(tl.int64)
    o_v = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    m_v = o_v < width
    slot = tl.load(slots + i_u)
    o_row = slot * width + o_v
    b_row = tl.load(values + o_row, mask=m_v, other=0).to(tl.float32)  # [COLUMNS]
    b_grad = tl.load(grad + i_u * width + o_v, mask=m_v, other=0).to(tl.float32)  # [COLUMNS]
    b_mean = tl.load(exp_avg + o_row, mask=m_v, other=0)  # [COLUMNS]
    b_square = tl.load(exp_avg_sq + o_row, mask=m_v, other=0)  # [COLUMNS]
    b_mean += rate1 * (b_grad - b_mean)
    b_square += rate2 * (b_grad * b_grad - b_square)
    tl.store(exp_avg + o_row, b_mean, mask=m_v)
    tl.store(exp_avg_sq + o_row, b_square, mask=m_v)
    b_root = tl.sqrt(b_square) / tl.load(corrections2 + i_u) + eps
    b_row = shrink * b_row - (lr / tl.load(corrections1 + i_u)) * (b_mean / b_root)
    write_row(values + slot * width, b_row, slot, start, o_v, m_v, STOCHASTIC)
