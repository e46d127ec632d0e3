"""Optimizer steps on chosen rows of a table, in place, with state per slot.

A row that is not named is not read or written, nor is its state, whatever the optimizer: that is the
promise, and why torch's own optimizers (which decay and carry momentum in every row) are not used on
tables. CUDA tensors take one Triton kernel that reads and writes each row once (rows_gpu.py), others
and float64 take torch (rows_cpu.py).

A step much smaller than a bfloat16 number is lost when the sum is rounded to the nearest. Stochastic
rounding goes up or down with the odds that keep the mean; its random bits are a hash of seed, slot and
column, the same on every device and in every run.

Shapes: N slots, V value width, U distinct slots.
"""

import torch
from torch import Tensor

from . import rows_cpu
from .checks import ascending, check_chosen_slots, check_device


def sparse_rows(grad_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct slots (U,) in ascending order and gradient rows (U, V) of a sparse COO gradient.

    Autograd drops the coalesced mark when it fills .grad, and coalescing again costs a sort and a copy
    of the rows: both are spared where the slots are ascending as they stand, which they are after one
    backward through one lookup.

    Raises:
        ValueError: the gradient is not a sparse COO tensor over rows.
    """
    if grad_NV.layout != torch.sparse_coo or grad_NV.sparse_dim() != 1:
        raise ValueError(f"gradient has layout {grad_NV.layout}, expected sparse COO over rows (sparse_dim 1)")
    if not ascending(grad_NV._indices()[0]):
        grad_NV = grad_NV.coalesce()
    return grad_NV._indices()[0], grad_NV._values()


@torch.no_grad()
def sgd_rows_(
    values_NV: Tensor, slots_U: Tensor, grad_UV: Tensor, lr: float, *, rounding_seed: int | None = None
) -> None:
    """values[slots] -= lr * grad, in place.

    Args:
        values_NV: the table.
        slots_U: int64, strictly ascending. Checked on CPUs, on GPUs with MEMLAYER_CHECK_SLOTS=1 in the environment;
            unchecked, a slot past the end writes what is not the table's, and of equal ones one step is lost.
        grad_UV: gradient of each of these rows.
        lr: learning rate.
        rounding_seed: of stochastic rounding, for bfloat16 tables, another one for every step; None
            rounds to the nearest.

    Raises:
        ValueError: slots are out of order or out of range, a shape, dtype or device does not fit, a tensor is not
            contiguous, or a seed is given for a table that is not bfloat16.
    """
    _check(values_NV, slots_U, grad_UV, {}, rounding_seed)
    _backend(values_NV).sgd_rows_(values_NV, slots_U, grad_UV, lr, rounding_seed)


@torch.no_grad()
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
    *,
    weight_decay: float = 0.0,
    rounding_seed: int | None = None,
) -> None:
    """One step of Adam on chosen rows, in place; the bias correction counts the steps of each slot apart.

    A slot stepped every time moves as under torch.optim.AdamW. Source: arXiv:1412.6980, algorithm 1;
    arXiv:1711.05101, algorithm 2 for the decay.

    Args:
        values_NV: the table.
        slots_U: int64, strictly ascending; see sgd_rows_.
        grad_UV: gradient of each of these rows.
        exp_avg_NV: first moments, zero at the start, float32 (float64 for float64 values).
        exp_avg_sq_NV: second moments, likewise.
        steps_N: float32, how often each slot was stepped, zero at the start.
        lr: learning rate.
        beta1: decay of the first moments; beta2 of the second.
        eps: added to the root of the second moments.
        weight_decay: the chosen rows shrink by lr * weight_decay first; others never do.
        rounding_seed: see sgd_rows_.

    Raises:
        ValueError: see sgd_rows_.
    """
    state = {"exp_avg": exp_avg_NV, "exp_avg_sq": exp_avg_sq_NV, "steps": steps_N}
    _check(values_NV, slots_U, grad_UV, state, rounding_seed)
    steps_U = steps_N.index_select(0, slots_U).add_(1)
    steps_N.index_copy_(0, slots_U, steps_U)
    _backend(values_NV).adam_rows_(
        values_NV,
        slots_U,
        grad_UV,
        exp_avg_NV,
        exp_avg_sq_NV,
        steps_U,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        rounding_seed,
    )


def _backend(values_NV: Tensor):
    """The module that steps rows of this table: Triton takes numbers like lr as float32, too few for float64."""
    if values_NV.is_cuda and values_NV.dtype != torch.float64:
        from . import rows_gpu  # Triton is imported only where a GPU calls for it

        return rows_gpu
    return rows_cpu


def _check(
    values_NV: Tensor,
    slots_U: Tensor,
    grad_UV: Tensor,
    state: dict[str, Tensor],
    rounding_seed: int | None,
) -> None:
    num_slots, width = values_NV.shape
    check_device("values", values_NV)
    if grad_UV.shape != (slots_U.numel(), width):
        raise ValueError(f"gradient has shape {tuple(grad_UV.shape)}, expected {(slots_U.numel(), width)}")
    if rounding_seed is not None and values_NV.dtype != torch.bfloat16:
        raise ValueError(f"rounding_seed is {rounding_seed} for values in {values_NV.dtype}, expected bfloat16")
    _check_state(values_NV, state)
    for name, tensor in {"values": values_NV, **state}.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}, expected to be contiguous")
    for name, tensor in {"slots": slots_U, "gradient": grad_UV, **state}.items():
        if tensor.device != values_NV.device:
            raise ValueError(f"{name} is on {tensor.device}, values is on {values_NV.device}")
    check_chosen_slots(slots_U, num_slots)


def _check_state(values_NV: Tensor, state: dict[str, Tensor]) -> None:
    num_slots, width = values_NV.shape
    moments = torch.promote_types(values_NV.dtype, torch.float32)
    for name, tensor in state.items():
        shape, dtype = ((num_slots,), torch.float32) if name == "steps" else ((num_slots, width), moments)
        if tensor.shape != shape:
            raise ValueError(f"optimizer state {name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype != dtype:
            raise ValueError(
                f"optimizer state {name} has dtype {tensor.dtype}, expected {dtype} for values in {values_NV.dtype}"
            )
