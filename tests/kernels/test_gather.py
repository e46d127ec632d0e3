"""The Triton gather equals the CPU path and the reference, under the interpreter or on a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlayer_kernels import gather, ops, reference

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
    torch.testing.assert_close(
        found.cpu(), reference.memory_lookup(values, slots, weights), **TOLERANCE[values.dtype]
    )


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
    check(device, values[:, ::2], slots[:, ::2], weights[:, ::2])


def test_equals_the_cpu_path(device):
    inputs = draw(1, 6, 20, 8, 24)
    found = gather.weighted_sum(*(t.to(device) for t in inputs)).cpu()
    torch.testing.assert_close(found, ops.memory_lookup(*inputs), **TOLERANCE[torch.float32])
