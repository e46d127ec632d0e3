"""Every input that does not fit is refused with its name and its number."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memlayer_kernels import checks, ops, rows

VALUES = torch.randn(10, 4)
SLOTS = torch.zeros(3, 2, dtype=torch.int64)
WEIGHTS = torch.ones(3, 2)
ROWS = torch.zeros(5, 4)
ROW_OF_SLOT = torch.full((10,), -1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values_NV": VALUES[0]}, "values has 1 dimensions, expected 2"),
        ({"values_NV": VALUES[:, ::2]}, "values has stride 2 in its last dimension, expected 1"),
        (
            {"slots_TK": SLOTS[:1, :1].expand(2**16, 2**15), "weights_TK": WEIGHTS[:1, :1].expand(2**16, 2**15)},
            "slots has 2147483648 reads, expected fewer than 2147483648",
        ),
        ({"values_NV": VALUES.int()}, "values has dtype torch.int32"),
        ({"slots_TK": SLOTS.float()}, "slots has dtype torch.float32"),
        ({"slots_TK": SLOTS[0]}, "slots has 1 dimensions, expected 2"),
        ({"weights_TK": WEIGHTS[:2]}, r"weights has shape \(2, 2\), slots has \(3, 2\)"),
        ({"weights_TK": WEIGHTS.to("meta")}, "weights is on meta, values is on cpu"),
        ({"slots_TK": SLOTS[:, :0], "weights_TK": WEIGHTS[:, :0]}, "slots has 0 reads per token"),
        ({"slots_TK": SLOTS + 10}, "slots range from 10 to 10, values has slots 0 to 9"),
        ({"slots_TK": SLOTS - 1}, "slots range from -1 to -1, values has slots 0 to 9"),
        ({"rows_RV": None}, "row_of_slot is given without rows"),
        ({"row_of_slot_N": None}, "rows is given without row_of_slot"),
        ({"rows_RV": ROWS[:, :3]}, "rows has width 3, values has 4"),
        ({"row_of_slot_N": ROW_OF_SLOT[:9]}, "row_of_slot has 9 entries, values has 10 slots"),
        ({"row_of_slot_N": ROW_OF_SLOT.long()}, "row_of_slot has dtype torch.int64"),
    ],
)
def test_lookup_refuses(change, message):
    inputs = {
        "values_NV": VALUES,
        "slots_TK": SLOTS,
        "weights_TK": WEIGHTS,
        "rows_RV": ROWS,
        "row_of_slot_N": ROW_OF_SLOT,
    }
    with pytest.raises(ValueError, match=message):
        ops.memory_lookup(**(inputs | change))


def test_lookup_refuses_a_row_that_does_not_exist_in_backward():
    rows = ROWS.clone().requires_grad_()
    reads = ops.memory_lookup(VALUES, SLOTS, WEIGHTS, rows, torch.full((10,), 5, dtype=torch.int32))
    with pytest.raises(ValueError, match="row_of_slot names row 5, rows has 5"):
        reads.sum().backward()


@pytest.mark.gpu
def test_slots_and_rows_are_checked_on_gpus_when_asked(monkeypatch, device):
    monkeypatch.setattr(checks, "CHECK_ON_GPUS", True)
    values, weights = VALUES.to(device), WEIGHTS.to(device)
    with pytest.raises(ValueError, match="slots range from 10 to 10"):
        ops.memory_lookup(values, SLOTS.to(device) + 10, weights)
    rows = ROWS.to(device).requires_grad_()
    reads = ops.memory_lookup(values, SLOTS.to(device), weights, rows, ROW_OF_SLOT.to(device) + 6)
    with pytest.raises(ValueError, match="row_of_slot names row 5, rows has 5"):
        reads.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize(("slots", "message"), [([0, 10], "slots range from 0 to 10"), ([3, 3], "strictly ascending")])
def test_slots_to_step_are_checked_on_gpus_when_asked(slots, message, monkeypatch, device):
    monkeypatch.setattr(checks, "CHECK_ON_GPUS", True)
    with pytest.raises(ValueError, match=message):
        rows.sgd_rows_(VALUES.to(device), torch.tensor(slots, device=device), torch.ones(2, 4, device=device), lr=0.1)


def test_what_a_tensor_off_the_cpu_holds_is_looked_at_only_when_asked(monkeypatch):
    """A meta tensor stands for one on a GPU: it has no numbers, so a look is an error."""
    values, slots, grad = VALUES.to("meta"), torch.arange(2, device="meta"), torch.ones(2, 4, device="meta")
    rows.sgd_rows_(values, slots, grad, lr=0.1)
    monkeypatch.setattr(checks, "CHECK_ON_GPUS", True)
    with pytest.raises(RuntimeError, match="meta tensors"):
        rows.sgd_rows_(values, slots, grad, lr=0.1)


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_a_device_without_kernels_is_refused_by_name(device):
    with FakeTensorMode():
        values, weights = torch.ones(4, 4, device=device), torch.ones(4, 4, device=device)
        slots, chosen = (torch.ones(size, dtype=torch.int64, device=device) for size in ((4, 4), (4,)))
        half_keys = torch.ones(2, 2, 5, 4, device=device)
        for call in (
            lambda: ops.memory_lookup(values, slots, weights),
            lambda: ops.product_key_topk(torch.ones(3, 2, 2, 4, device=device), half_keys, 2),
            lambda: rows.sgd_rows_(values, chosen, weights, lr=0.1),
        ):
            with pytest.raises(ValueError, match=f"is on {device}:0: memory runs on CPUs and on GPUs of NVIDIA"):
                call()


@pytest.mark.parametrize(
    ("queries", "half_keys", "k", "message"),
    [
        ((3, 2, 4), (2, 2, 5, 4), 2, "queries has 3 dimensions, expected 4"),
        ((3, 2, 3, 4), (2, 2, 5, 4), 2, "queries has 3 halves"),
        (
            (3, 2, 2, 4),
            (2, 2, 5, 6),
            2,
            r"half_keys has shape \(2, 2, 5, 6\), the queries ask for \(2, 2, 5, 4\)",
        ),
        ((3, 2, 2, 4), (1, 2, 5, 4), 2, r"half_keys has shape \(1, 2, 5, 4\)"),
        ((3, 2, 2, 4), (2, 2, 5, 4), 0, "k is 0, expected 1 to 5"),
        ((3, 2, 2, 4), (2, 2, 5, 4), 6, "k is 6, expected 1 to 5"),
    ],
)
def test_search_refuses(queries, half_keys, k, message):
    with pytest.raises(ValueError, match=message):
        ops.product_key_topk(torch.zeros(queries), torch.zeros(half_keys), k)


def test_search_refuses_two_dtypes():
    with pytest.raises(ValueError, match=r"half_keys has dtype torch.bfloat16, queries has torch.float32"):
        ops.product_key_topk(torch.zeros(1, 1, 2, 4), torch.zeros(1, 2, 5, 4, dtype=torch.bfloat16), 1)
