"""The CPU path where size matters: blocks of rows, tables past 2**31 elements, memory in use."""

import mmap

import pytest
import torch

from memlayer_kernels import cpu, ops, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_change_no_bit(monkeypatch, dtype):
    random = torch.Generator().manual_seed(0)
    values = torch.randn(50, 8, generator=random).to(dtype).requires_grad_()
    slots = torch.randint(50, (40, 6), generator=random)
    weights = torch.randn(40, 6, generator=random).to(dtype).requires_grad_()

    def run():
        reads = ops.memory_lookup(values, slots, weights)
        return [reads, *torch.autograd.grad(reads.square().sum(), (values, weights))]

    whole = run()
    monkeypatch.setattr(cpu, "BLOCK_BYTES", 200)
    assert all(torch.equal(a, b) for a, b in zip(whole, run()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("num_slots", [3, 50, 400])
def test_large_sums_written_in_place_equal_the_reference(monkeypatch, dtype, sparse_grad, num_slots):
    """Slots never read, repeated in a read and read by every token; what is there before is not looked at."""
    monkeypatch.setattr(cpu, "IN_PLACE_BYTES", -1)
    poisoned = lambda rows, width, dtype: torch.full((rows, width), torch.nan, dtype=dtype)  # noqa: E731
    monkeypatch.setattr(cpu, "empty_rows", poisoned)
    random = torch.Generator().manual_seed(num_slots)
    values = torch.randn(num_slots, 33, generator=random, dtype=dtype).requires_grad_()
    slots = torch.randint(num_slots, (40, 6), generator=random)
    slots[:, 1] = 2
    slots[:, 5] = slots[:, 4]
    weights = torch.randn(40, 6, generator=random, dtype=dtype)
    upstream = torch.randn(40, 33, generator=random, dtype=dtype)
    (expected,) = torch.autograd.grad(reference.memory_lookup(values, slots, weights), values, upstream)
    runs = [
        torch.autograd.grad(ops.memory_lookup(values, slots, weights, sparse_grad=sparse_grad), values, upstream)[0]
        for _ in range(2)
    ]
    torch.testing.assert_close(runs[0].to_dense(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(runs[0].to_dense(), runs[1].to_dense())


def test_a_table_past_2_to_the_31_elements():
    """On pages that are zero until they are touched, so that only those of the rows used take memory."""
    num_slots, width = 2**21 + 9, 1024
    try:
        pages = mmap.mmap(-1, num_slots * width * 4)
    except OSError as error:
        pytest.skip(f"no address space for {num_slots * width * 4} bytes: {error}")
    values = torch.frombuffer(pages, dtype=torch.float32).view(num_slots, width)
    last = torch.tensor([0, 5, 2**20, num_slots - 2, num_slots - 1])
    values[last] = torch.randn(5, width)
    slots = last[torch.randint(5, (7, 4))]
    weights = torch.randn(7, 4, requires_grad=True)
    small = values[last].requires_grad_()
    small_slots = torch.searchsorted(last, slots)
    expected = reference.memory_lookup(small, small_slots, weights)
    expected_small, expected_weights = torch.autograd.grad(expected.sum(), (small, weights))

    values.requires_grad_()
    reads = ops.memory_lookup(values, slots, weights, sparse_grad=True)
    torch.testing.assert_close(reads, expected)
    grad, grad_weights = torch.autograd.grad(reads.sum(), (values, weights))
    torch.testing.assert_close(grad_weights, expected_weights, rtol=1e-5, atol=1e-4)
    used = torch.searchsorted(last, grad.indices()[0])
    torch.testing.assert_close(grad.values(), expected_small[used])

    rows = torch.zeros(2, width, requires_grad=True)
    row_of_slot = torch.full((num_slots,), -1, dtype=torch.int32)
    row_of_slot[last[-2:]] = torch.arange(2, dtype=torch.int32)
    reads = ops.memory_lookup(values, slots, weights, rows, row_of_slot)
    torch.testing.assert_close(torch.autograd.grad(reads.sum(), rows)[0], expected_small[-2:])


def test_the_gradient_of_rows_takes_memory_for_the_reads_and_not_for_the_table():
    """Counted by the profiler: 4,000 reads of which 40 are chosen, a table of 4 million numbers."""
    values = torch.zeros(2**18, 16)
    slots = torch.randint(2**18, (1000, 4))
    slots[::100, 0] = 7
    row_of_slot = torch.full((2**18,), -1, dtype=torch.int32)
    row_of_slot[7] = 0
    rows = torch.zeros(1, 16, requires_grad=True)
    reads = ops.memory_lookup(values, slots, torch.ones(1000, 4), rows, row_of_slot).sum()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        reads.backward()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    upstream = 1000 * 16 * 4
    assert upstream <= allocated < upstream * 2 + 4000 * 32
    assert (rows.grad == (slots == 7).sum()).all()
