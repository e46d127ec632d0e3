"""The Triton gather equals the CPU path and the reference, under the interpreter or on a GPU."""

import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlayer_kernels import gather, gpu, ops, reference
from memlayer_kernels.reads import sort_reads
from memlayer_kernels.variants import FEW_PROGRAMS, GATHERS

# sums of a few dozen terms in float32, then one rounding to the dtype
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
}


def draw(seed, num_tokens, num_slots, top_k, width, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(num_slots, width, generator=random).to(dtype)
    slots = torch.randint(num_slots, (num_tokens, top_k), generator=random)
    return values, slots, torch.randn(num_tokens, top_k, generator=random).to(dtype)


def check(device, values, slots, weights):
    found = gather.weighted_sum(values.to(device), slots.to(device), weights.to(device))
    assert found.dtype == values.dtype
    torch.testing.assert_close(found.cpu(), reference.memory_lookup(values, slots, weights), **TOLERANCE[values.dtype])


size = st.integers(1, 7)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 99),
    num_tokens=size,
    num_slots=size,
    top_k=size,
    width=size,
    dtype=st.sampled_from([*TOLERANCE]),
)
def test_equals_the_reference(seed, num_tokens, num_slots, top_k, width, dtype):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check(device, *draw(seed, num_tokens, num_slots, top_k, width, dtype))


@pytest.mark.parametrize(("top_k", "width"), [(9, 33), (4, 16), (1, 1025), (32, 100)])
def test_several_column_tiles_and_odd_sizes(device, top_k, width):
    check(device, *draw(0, 3, 11, top_k, width))


@pytest.mark.parametrize("shape", [(0, 5), (1, 0)])
def test_no_tokens_and_no_reads(device, shape):
    check(device, torch.randn(4, 3), torch.zeros(shape, dtype=torch.int64), torch.zeros(shape))


def test_int32_slots_every_read_on_one_slot_and_strided_inputs(device):
    values, slots, weights = draw(0, 3, 5, 6, 10)
    check(device, values, torch.full_like(slots, 4).int(), weights)
    check(device, values[:, :7], slots[:, ::2], weights[:, ::2])


def test_equals_the_cpu_path(device):
    inputs = draw(1, 6, 20, 8, 24)
    found = gather.weighted_sum(*(t.to(device) for t in inputs)).cpu()
    torch.testing.assert_close(found, ops.memory_lookup(*inputs), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [10, 1030])
def test_rows_are_fetched_to_the_bit(device, dtype, width):
    """On a GPU from pinned memory of the host."""
    values, slots = torch.randn(9, width).to(dtype), torch.tensor([8, 0, 3])
    table = values.pin_memory() if device.type == "cuda" else values
    assert torch.equal(gather.fetch_rows(table, slots.to(device)).cpu(), values[slots])
    assert gather.fetch_rows(table, slots[:0].to(device)).shape == (0, width)


def test_a_lookup_over_the_bus_is_the_lookup_with_its_gradient(device):
    values, slots, weights = draw(2, 5, 20, 8, 24)
    table = values.pin_memory() if device.type == "cuda" else values
    found = []
    for lookup, place in ((ops.memory_lookup, values.to(device)), (ops.lookup_over_the_bus, table)):
        leaf = weights.to(device).requires_grad_()
        reads = lookup(place, slots.to(device), leaf)
        reads.square().sum().backward()
        found.append((reads.detach(), leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], **TOLERANCE[torch.float32])


def test_a_table_past_2_to_the_31_elements(device):
    """Its last rows are read, and multiplied with gradients."""
    num_slots, width = 2**21 + 9, 1024
    if device.type == "cuda":
        values = torch.empty(num_slots, width, device=device)
    else:
        try:
            pages = mmap.mmap(-1, num_slots * width * 4)  # zero until touched: only the rows used take memory
        except OSError as error:
            pytest.skip(f"no address space for {num_slots * width * 4} bytes: {error}")
        values = torch.frombuffer(pages, dtype=torch.float32).view(num_slots, width)
    last = torch.tensor([0, 5, 2**20, num_slots - 2, num_slots - 1])
    rows = torch.randn(5, width)
    values[last.to(device)] = rows.to(device)
    slots, weights, grad = torch.randint(5, (2, 4)), torch.randn(2, 4), torch.randn(2, width)
    found = gpu.weighted_sum(values, last[slots].to(device), weights.to(device))
    torch.testing.assert_close(found.cpu(), reference.memory_lookup(rows, slots, weights), rtol=1e-5, atol=1e-5)
    reads = sort_reads(last[slots].flatten().to(device), 4)
    products = gpu.read_products(grad.to(device), values, reads)
    # 1,024 terms in two orders
    expected = (grad.unsqueeze(1) * rows[slots]).sum(-1).flatten()
    torch.testing.assert_close(products.cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", GATHERS)
def test_every_way_sums_in_the_same_order(device, name):
    values, slots, weights = (t.to(device) for t in draw(0, 2, 11, 9, 1100, torch.bfloat16))
    right = gather.weighted_sum(values, slots, weights, GATHERS["wide"])
    assert torch.equal(gather.weighted_sum(values, slots, weights, GATHERS[name]), right)


def test_few_tokens_go_another_way_only_where_a_thread_holds_the_rows_of_a_group():
    wide, narrow = torch.empty(5, 1024), torch.empty(5, 512)
    assert gather.chosen_way(wide, FEW_PROGRAMS - 1) == "narrow"
    assert gather.chosen_way(wide, FEW_PROGRAMS) == gather.chosen_way(narrow, 1) == "wide"
