"""Checks at the door of ops.py: every mistake a caller can make, named with its numbers, as a ValueError.

What only the numbers in a tensor can tell (slots and rows in range and in order) is asked inside the registered
operations, since torch.compile traces the door without numbers. On a GPU that question makes the host
wait for the device at every call, so it is asked there only with MEMLAYER_CHECK_SLOTS=1 in the environment.
"""

import os

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)
DEVICES = ("cpu", "cuda", "meta")  # torch calls AMD's GPUs cuda too; a meta tensor has a shape and no numbers
CHECK_ON_GPUS = os.environ.get("MEMLAYER_CHECK_SLOTS") == "1"


def check_search(queries_TH2Q: Tensor, half_keys_H2nQ: Tensor, k: int) -> None:
    """Queries (T, H, 2, Q) and half-keys (H, 2, n, Q) of one dtype and device, 1 <= k <= n.

    Raises:
        ValueError: they are not.
    """
    _check_tensor("queries", queries_TH2Q, 4, FLOATS)
    _check_tensor("half_keys", half_keys_H2nQ, 4, FLOATS)
    check_device("queries", queries_TH2Q)
    _check_same("half_keys", half_keys_H2nQ, "queries", queries_TH2Q, dtype=True)
    _, heads, halves, width = queries_TH2Q.shape
    num_half_keys = half_keys_H2nQ.shape[2]
    expected = (heads, 2, num_half_keys, width)
    if halves != 2:
        raise ValueError(f"queries has {halves} halves in dimension 2, expected 2")
    if tuple(half_keys_H2nQ.shape) != expected:
        raise ValueError(f"half_keys has shape {tuple(half_keys_H2nQ.shape)}, the queries ask for {expected}")
    if not 1 <= k <= num_half_keys:
        raise ValueError(f"k is {k}, expected 1 to {num_half_keys}, the number of half-keys")


def check_lookup(values_NV: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> None:
    """Values (N, V), slots (T, K > 0) and weights (T, K) on one device; fewer than 2**31 slots and reads.

    Raises:
        ValueError: they are not.
    """
    _check_tensor("values", values_NV, 2, FLOATS)
    _check_tensor("slots", slots_TK, 2, INTEGERS)
    _check_tensor("weights", weights_TK, 2, FLOATS)
    check_device("values", values_NV)
    _check_same("slots", slots_TK, "values", values_NV)
    _check_same("weights", weights_TK, "values", values_NV)
    if weights_TK.shape != slots_TK.shape:
        raise ValueError(f"weights has shape {tuple(weights_TK.shape)}, slots has {tuple(slots_TK.shape)}")
    if slots_TK.shape[1] == 0:
        raise ValueError("slots has 0 reads per token, expected at least 1")
    num_slots = values_NV.shape[0]
    if num_slots >= 2**31:
        raise ValueError(f"values has {num_slots} slots, expected fewer than {2**31}")
    if slots_TK.numel() >= 2**31:
        raise ValueError(f"slots has {slots_TK.numel()} reads, expected fewer than {2**31}")
    _check_last_dimension("values", values_NV)


def check_slots(slots_TK: Tensor, num_slots: int) -> None:
    """Slots from 0 to num_slots - 1.

    Raises:
        ValueError: one is not.
    """
    if may_ask(slots_TK):
        lowest, highest = (bound.item() for bound in slots_TK.aminmax())
        if lowest < 0 or highest >= num_slots:
            raise ValueError(f"slots range from {lowest} to {highest}, values has slots 0 to {num_slots - 1}")


def check_rows(values_NV: Tensor, rows_RV: Tensor | None, row_of_slot_N: Tensor | None) -> None:
    """Rows (R, V) and row_of_slot (N,) int32 given together or not at all, on the device of the values.

    What row_of_slot holds is looked at when gradients are taken, since it is filled in between.

    Raises:
        ValueError: they are not.
    """
    if (rows_RV is None) != (row_of_slot_N is None):
        missing, given = ("rows", "row_of_slot") if rows_RV is None else ("row_of_slot", "rows")
        raise ValueError(f"{given} is given without {missing}")
    if rows_RV is None:
        return
    _check_tensor("rows", rows_RV, 2, FLOATS)
    _check_tensor("row_of_slot", row_of_slot_N, 1, (torch.int32,))
    _check_same("rows", rows_RV, "values", values_NV)
    _check_same("row_of_slot", row_of_slot_N, "values", values_NV)
    num_slots, width = values_NV.shape
    if rows_RV.shape[1] != width:
        raise ValueError(f"rows has width {rows_RV.shape[1]}, values has {width}")
    if row_of_slot_N.shape[0] != num_slots:
        raise ValueError(f"row_of_slot has {row_of_slot_N.shape[0]} entries, values has {num_slots} slots")


def check_row_numbers(row_M: Tensor, num_rows: int) -> None:
    """Rows that row_of_slot names for the reads of this batch are below num_rows.

    Raises:
        ValueError: one is not.
    """
    if may_ask(row_M) and row_M.max() >= num_rows:
        raise ValueError(f"row_of_slot names row {row_M.max().item()}, rows has {num_rows}")


def check_device(name: str, tensor: Tensor) -> None:
    """A device that has kernels here.

    Raises:
        ValueError: it has none.
    """
    if tensor.device.type not in DEVICES:
        raise ValueError(
            f"{name} is on {tensor.device}: memory runs on CPUs and on GPUs of NVIDIA and AMD (cuda); move the model"
        )


def check_chosen_slots(slots_U: Tensor, num_slots: int) -> None:
    """Strictly ascending slots from 0 to num_slots - 1.

    Raises:
        ValueError: they are not.
    """
    if not may_ask(slots_U):
        return
    if not ascending(slots_U):
        raise ValueError(f"the {slots_U.numel()} slots are not strictly ascending")
    if slots_U[0] < 0 or slots_U[-1] >= num_slots:
        raise ValueError(f"slots range from {slots_U[0]} to {slots_U[-1]}, values has slots 0 to {num_slots - 1}")


def ascending(slots_U: Tensor) -> bool:
    """Whether each slot is above the one before it; the host waits for the answer."""
    return bool((slots_U[1:] > slots_U[:-1]).all())


def may_ask(tensor: Tensor) -> bool:
    """Whether what the tensor holds may be looked at."""
    return tensor.numel() > 0 and (tensor.is_cpu or CHECK_ON_GPUS)


def _check_tensor(name: str, tensor: Tensor, rank: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dim() != rank:
        raise ValueError(f"{name} has {tensor.dim()} dimensions, expected {rank}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected one of {', '.join(map(str, dtypes))}")


def _check_same(name: str, tensor: Tensor, other_name: str, other: Tensor, dtype: bool = False) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, {other_name} is on {other.device}")
    if dtype and tensor.dtype != other.dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}, {other_name} has {other.dtype}")


def _check_last_dimension(name: str, tensor: Tensor) -> None:
    """A copy of a table is never made in silence."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension, expected 1")
