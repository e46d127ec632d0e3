"""Optimizer steps on chosen rows of a table, in place, with state per slot.

A row that is not named is not read or written, nor is its state, whatever the optimizer: that is the
promise, and why torch's own optimizers (which decay and carry momentum in every row) are not used on
tables. Rows are stepped in blocks that stay in cache. Runs on any device torch does.

Shapes: N slots, V value width, U distinct slots.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ROWS = 1024  # 1 MB of float32 rows of width 256; five such blocks are in use at a time


def sparse_rows(grad_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct slots (U,) in ascending order and gradient rows (U, V) of a sparse COO gradient.

    Autograd drops the coalesced mark when it fills .grad, and coalescing again costs a sort and a copy
    of the rows: both are spared where the slots are ascending as they stand, which they are after one
    backward through one lookup.

    Raises:
        ValueError: the gradient is not a sparse COO tensor over rows.
    """
    if grad_NV.layout != torch.sparse_coo or grad_NV.sparse_dim() != 1:
        raise ValueError(
            f"gradient has layout {grad_NV.layout}, expected sparse COO over rows (sparse_dim 1)"
        )
    if not _ascending(grad_NV._indices()[0]):
        grad_NV = grad_NV.coalesce()
    return grad_NV._indices()[0], grad_NV._values()


def sgd_rows_(values_NV: Tensor, slots_U: Tensor, grad_UV: Tensor, lr: float) -> None:
    """values[slots] -= lr * grad, in place.

    Args:
        values_NV: the table.
        slots_U: int64, strictly ascending.
        grad_UV: gradient of each of these rows.
        lr: learning rate.

    Raises:
        ValueError: slots are out of order or out of range (asked on CPUs only), or shapes do not fit.
    """
    _check(values_NV, slots_U, grad_UV)
    with torch.no_grad():
        for slots_B, grad_BV in _blocks(values_NV, slots_U, grad_UV):
            rows_BV = values_NV.index_select(0, slots_B).to(grad_BV.dtype)
            values_NV.index_copy_(0, slots_B, rows_BV.add_(grad_BV, alpha=-lr).to(values_NV.dtype))


def adam_rows_(
    values_NV: Tensor,
    slots_U: Tensor,
    grad_UV: Tensor,
    exp_avg_NV: Tensor,
    exp_avg_sq_NV: Tensor,
    steps_N: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One step of Adam on chosen rows, in place; the bias correction counts the steps of each slot apart.

    A slot stepped every time moves as under torch.optim.Adam. Source: arXiv:1412.6980, algorithm 1.

    Args:
        values_NV: the table.
        slots_U: int64, strictly ascending.
        grad_UV: gradient of each of these rows.
        exp_avg_NV: first moments, zero at the start, float32 (float64 for float64 values).
        exp_avg_sq_NV: second moments, likewise.
        steps_N: float32, how often each slot was stepped, zero at the start.
        lr: learning rate.
        beta1: decay of the first moments; beta2 of the second.
        eps: added to the root of the second moments.

    Raises:
        ValueError: slots are out of order or out of range (asked on CPUs only), or shapes do not fit.
    """
    _check(values_NV, slots_U, grad_UV, exp_avg_NV, exp_avg_sq_NV, steps_N)
    with torch.no_grad():
        for slots_B, grad_BV in _blocks(values_NV, slots_U, grad_UV):
            steps_B = steps_N.index_select(0, slots_B).add_(1)
            steps_N.index_copy_(0, slots_B, steps_B)
            mean_BV = exp_avg_NV.index_select(0, slots_B).lerp_(grad_BV, 1 - beta1)
            exp_avg_NV.index_copy_(0, slots_B, mean_BV)
            square_BV = (
                exp_avg_sq_NV.index_select(0, slots_B).mul_(beta2).addcmul_(grad_BV, grad_BV, value=1 - beta2)
            )
            exp_avg_sq_NV.index_copy_(0, slots_B, square_BV)
            # float64, for one number a row: 1 - beta2 ** steps loses half its digits in float32.
            correct1_B1 = (1 - beta1 ** steps_B.double()).to(grad_BV.dtype).unsqueeze(1)
            correct2_B1 = (1 - beta2 ** steps_B.double()).sqrt().to(grad_BV.dtype).unsqueeze(1)
            root_BV = square_BV.sqrt_().div_(correct2_B1).add_(eps)
            rows_BV = values_NV.index_select(0, slots_B).to(grad_BV.dtype)
            rows_BV.addcdiv_(mean_BV.div_(correct1_B1), root_BV, value=-lr)
            values_NV.index_copy_(0, slots_B, rows_BV.to(values_NV.dtype))


def _blocks(values_NV: Tensor, slots_U: Tensor, grad_UV: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Slots and gradient rows of each block, the latter in the dtype that the step is computed in."""
    dtype = torch.promote_types(values_NV.dtype, torch.float32)
    for start in range(0, slots_U.numel(), BLOCK_ROWS):
        yield slots_U[start : start + BLOCK_ROWS], grad_UV[start : start + BLOCK_ROWS].to(dtype)


def _ascending(slots_U: Tensor) -> bool:
    return bool((slots_U[1:] > slots_U[:-1]).all())


def _check(values_NV: Tensor, slots_U: Tensor, grad_UV: Tensor, *state_N: Tensor) -> None:
    num_slots, width = values_NV.shape
    if grad_UV.shape != (slots_U.numel(), width):
        raise ValueError(f"gradient has shape {tuple(grad_UV.shape)}, expected {(slots_U.numel(), width)}")
    compute = torch.promote_types(values_NV.dtype, torch.float32)
    for state in state_N:
        if state.dim() == 2 and state.dtype != compute:
            raise ValueError(
                f"optimizer state has dtype {state.dtype}, expected {compute} for values in {values_NV.dtype}"
            )
        if state.shape not in ((num_slots, width), (num_slots,)):
            raise ValueError(
                f"optimizer state has shape {tuple(state.shape)}, values has {(num_slots, width)}"
            )
    if slots_U.device.type == "cpu" and slots_U.numel():
        if not _ascending(slots_U):
            raise ValueError(f"the {slots_U.numel()} slots are not strictly ascending")
        if slots_U[0] < 0 or slots_U[-1] >= num_slots:
            raise ValueError(
                f"slots range from {slots_U[0]} to {slots_U[-1]}, values has slots 0 to {num_slots - 1}"
            )
