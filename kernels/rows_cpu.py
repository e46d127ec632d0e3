"""Optimizer steps on chosen rows in torch, on any device: rows are stepped in blocks that stay in cache.

Shapes: N slots, V value width, U distinct slots, B slots of a block.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ROWS = 1024  # 1 MB of float32 rows of width 256; five such blocks are in use at a time

WIDE_DTYPES = torch.complex128, torch.int64  # in which bits are moved as they are, the widest first

# Constants of the 32-bit finaliser of MurmurHash3 (public domain) and the step of splitmix32.
MIX1, MIX2, STEP = 0x85EBCA6B, 0xC2B2AE35, 0x9E3779B9


def sgd_rows_(values_NV: Tensor, slots_U: Tensor, grad_UV: Tensor, lr: float, rounding_seed: int | None) -> None:
    """See rows.sgd_rows_."""
    if rounding_seed is None and grad_UV.dtype == values_NV.dtype in (torch.float32, torch.float64):
        values_NV.index_add_(0, slots_U, grad_UV, alpha=-lr)  # in one pass: 6 ms for 64,000 rows of 256, blocks take 13
        return
    for slots_B, grad_BV in _blocks(values_NV, slots_U, grad_UV):
        rows_BV = values_NV.index_select(0, slots_B).to(grad_BV.dtype)
        _write(values_NV, slots_B, rows_BV.add_(grad_BV, alpha=-lr), rounding_seed)


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
    for slots_B, grad_BV, steps_B in _blocks(values_NV, slots_U, grad_UV, steps_U):
        mean_BV = exp_avg_NV.index_select(0, slots_B).lerp_(grad_BV, 1 - beta1)
        _put(exp_avg_NV, slots_B, mean_BV)
        square_BV = exp_avg_sq_NV.index_select(0, slots_B).mul_(beta2).addcmul_(grad_BV, grad_BV, value=1 - beta2)
        _put(exp_avg_sq_NV, slots_B, square_BV)
        correct1_B1, correct2_B1 = bias_corrections(steps_B.unsqueeze(1), beta1, beta2, grad_BV.dtype)
        root_BV = square_BV.sqrt_().div_(correct2_B1).add_(eps)
        rows_BV = values_NV.index_select(0, slots_B).to(grad_BV.dtype)
        if weight_decay:
            rows_BV.mul_(1 - lr * weight_decay)
        rows_BV.addcdiv_(mean_BV.div_(correct1_B1), root_BV, value=-lr)
        _write(values_NV, slots_B, rows_BV, rounding_seed)


def bias_corrections(steps_B: Tensor, beta1: float, beta2: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the means, and the roots of the second moments, of rows stepped so often are divided by.

    Taken in float64, one number a row: 1 - beta2 ** steps loses half its digits in float32.
    """
    steps_B = steps_B.double()
    return (1 - beta1**steps_B).to(dtype), (1 - beta2**steps_B).sqrt().to(dtype)


def random_bits(slots_B: Tensor, width: int, seed: int) -> Tensor:
    """16 random bits for each number of the rows of these slots: int32 from 0 to 65535, shape (B, width).

    A hash of seed, slot and column in 32-bit integers, which wrap; rows_gpu.py has the same in Triton.
    """
    row_B = _mix(slots_B.int() ^ start_of(seed))
    columns_V = torch.arange(width, dtype=torch.int32, device=slots_B.device) * _signed(STEP)
    return (_mix(row_B.unsqueeze(1) + columns_V) >> 16) & 0xFFFF


def start_of(seed: int) -> int:
    """A seed of any size as a 32-bit integer that is far from that of the next seed."""
    return int(_mix(torch.tensor(_signed(seed & 0xFFFFFFFF), dtype=torch.int32)))


def _mix(bits: Tensor) -> Tensor:
    """The finaliser; int32 shifts carry the sign in, which the masks take away."""
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * _signed(MIX1)
    bits = (bits ^ ((bits >> 13) & 0x7FFFF)) * _signed(MIX2)
    return bits ^ ((bits >> 16) & 0xFFFF)


def _signed(number: int) -> int:
    """The int32 with the bits of this unsigned one."""
    return number - 2**32 if number >= 2**31 else number


def _write(values_NV: Tensor, slots_B: Tensor, rows_BV: Tensor, rounding_seed: int | None) -> None:
    if rounding_seed is not None:
        # A bfloat16 is the upper half of a float32: random lower halves added carry with the right odds.
        bits_BV = rows_BV.view(torch.int32) + random_bits(slots_B, rows_BV.shape[1], rounding_seed)
        rounded_BV = (bits_BV & -65536).view(torch.float32)
        rows_BV = torch.where(rows_BV.isfinite(), rounded_BV, rows_BV)
    _put(values_NV, slots_B, rows_BV.to(values_NV.dtype))


def _put(table_NV: Tensor, slots_B: Tensor, rows_BV: Tensor) -> None:
    """table[slots] = rows, of one dtype, both contiguous.

    index_copy_ moves one number at a time: 64 MB of float32 take 5.3 ms, the same bits as complex128 3.0.
    """
    wide = next((dtype for dtype in WIDE_DTYPES if all(_fits(t, dtype) for t in (table_NV, rows_BV))), table_NV.dtype)
    table_NV.view(wide).index_copy_(0, slots_B, rows_BV.view(wide))


def _fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether the rows of a contiguous tensor can be viewed as this dtype, at addresses that it may have."""
    numbers = tensor.shape[1] * tensor.itemsize, tensor.storage_offset() * tensor.itemsize, tensor.data_ptr()
    return all(number % dtype.itemsize == 0 for number in numbers)


def _blocks(values_NV: Tensor, slots_U: Tensor, grad_UV: Tensor, *others_U: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The part of each tensor in each block, gradients in the dtype that the step is computed in."""
    dtype = torch.promote_types(values_NV.dtype, torch.float32)
    for start in range(0, slots_U.numel(), BLOCK_ROWS):
        slots_B, grad_BV, *others_B = (t[start : start + BLOCK_ROWS] for t in (slots_U, grad_UV, *others_U))
        yield slots_B, grad_BV.to(dtype), *others_B
