"""The Triton gradients equal the CPU path, under the interpreter or on a GPU, whole and in parts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memlayer_kernels import cpu, gpu, library, ops, reference, scatter
from memlayer_kernels.reads import SortedReads, all_segments, distinct_segments, sort_reads

# bfloat16 results are rounded once; float32 sums of a few terms in two orders
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
}


def draw(num_tokens, num_slots, top_k, width, dtype=torch.float32):
    random = torch.Generator().manual_seed(num_tokens + width)
    values = torch.randn(num_slots, width, generator=random).to(dtype)
    grad = torch.randn(num_tokens, width, generator=random).to(dtype)
    slots = torch.randint(num_slots, (num_tokens, top_k), generator=random)
    return values, grad, slots, torch.randn(num_tokens, top_k, generator=random).to(dtype)


def on(device, reads):
    return type(reads)(*(t.to(device) for t in reads))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 9, 6, 19), (3, 50, 4, 130), (9, 2, 7, 1030), (2, 5, 3, 16)])
def test_segment_sums_equal_the_cpu_path(device, dtype, shape):
    values, grad, slots, weights = draw(*shape, dtype)
    reads = sort_reads(slots.flatten(), slots.shape[1])
    weights = weights.flatten()[reads.reads_M]
    for bounds in (all_segments(reads.labels_M, len(values)), distinct_segments(reads.labels_M)[1]):
        inputs = grad.to(device), on(device, reads), weights.to(device), bounds.to(device)
        expected = cpu.segment_sums(grad, reads, weights, bounds, dtype)
        torch.testing.assert_close(gpu.segment_sums(*inputs, dtype).cpu(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 9, 6, 19), (3, 50, 7, 300), (9, 2, 7, 31)])
def test_read_products_equal_the_cpu_path(device, dtype, shape):
    values, grad, slots, _ = draw(*shape, dtype)
    reads = sort_reads(slots.flatten(), slots.shape[1])
    found = gpu.read_products(grad.to(device), values.to(device), on(device, reads))
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.cpu(), cpu.read_products(grad, values, reads), rtol=1e-5, atol=1e-4)


def test_no_reads(device):
    values, grad, slots, weights = draw(0, 4, 3, 5)
    reads = on(device, sort_reads(slots.flatten(), 3))
    bounds = torch.zeros(5, dtype=torch.int64, device=device)
    assert torch.equal(
        gpu.segment_sums(grad.to(device), reads, weights.flatten().to(device), bounds, grad.dtype).cpu(),
        torch.zeros(4, 5),
    )
    assert gpu.read_products(grad.to(device), values.to(device), reads).numel() == 0


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 23), min_size=1, max_size=6),
    width=st.integers(1, 20),
    num_ignored=st.integers(0, 12),
    dtype=st.sampled_from([*TOLERANCE]),
)
def test_long_runs_are_summed_in_chunks(lengths, width, num_ignored, dtype):
    """Runs of any length and place against chunks of 5 reads, after reads that have no row."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    random = torch.Generator().manual_seed(width)
    row_M = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).int()
    labels_M = torch.cat([torch.full((num_ignored,), -1, dtype=torch.int32), row_M])
    tokens_M = torch.randint(9, labels_M.shape, generator=random, dtype=torch.int32)
    reads = SortedReads(labels_M, torch.arange(len(labels_M)), tokens_M)
    bounds = torch.tensor([0, *lengths]).cumsum(0) + num_ignored
    grad = torch.randn(9, width, generator=random).to(dtype)
    weights = torch.randn(labels_M.shape, generator=random).to(dtype)
    expected = cpu.segment_sums(grad, reads, weights, bounds, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scatter, "CHUNK", 5)
        inputs = grad.to(device), on(device, reads), weights.to(device), bounds.to(device)
        found, again = (gpu.segment_sums(*inputs, dtype) for _ in range(2))
    torch.testing.assert_close(found.cpu(), expected, **TOLERANCE[dtype])
    assert torch.equal(found, again)


def test_every_read_on_one_slot_is_summed_in_chunks_of_the_size_in_use(device):
    grad = torch.randn(3, 40)
    reads = sort_reads(torch.full((3 * scatter.CHUNK + 7,), 2), scatter.CHUNK + 3)
    weights = torch.randn(reads.reads_M.shape)
    bounds = all_segments(reads.labels_M, 4)
    found = gpu.segment_sums(*(grad.to(device), on(device, reads), weights.to(device), bounds.to(device)), grad.dtype)
    # 775 terms in two orders
    torch.testing.assert_close(
        found.cpu(), cpu.segment_sums(grad, reads, weights, bounds, grad.dtype), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("num_tokens", "chosen"), [(5, []), (5, [3]), (5, [7, 0, 5]), (5, list(range(9))), (0, [3]), (1, [3])]
)
def test_every_gradient_of_a_lookup_through_triton(device, monkeypatch, num_tokens, chosen):
    monkeypatch.setattr(library, "_backend", lambda tensor: gpu)
    values, _, slots, weights = draw(num_tokens, 9, 6, 19)
    slots[:, 3:] = slots[:, :3]
    row_of_slot = torch.full((9,), -1, dtype=torch.int32)
    row_of_slot[chosen] = torch.arange(len(chosen), dtype=torch.int32)
    rows = torch.zeros(len(chosen), 19)

    def gradients(lookup, where, *rows_and_map, **options):
        inputs = [t.to(where).requires_grad_() for t in (values, weights, *rows_and_map[:1])]
        reads = lookup(
            inputs[0],
            slots.to(where),
            inputs[1],
            *inputs[2:],
            *(m.to(where) for m in rows_and_map[1:]),
            **options,
        )
        grads = torch.autograd.grad(reads.square().sum(), inputs, allow_unused=True)
        return [None if g is None else g.to_dense().cpu() for g in grads]

    for rows_and_map in ((), (rows, row_of_slot)):
        expected = gradients(reference.memory_lookup, "cpu", *rows_and_map)
        for sparse_grad in (False, True):
            found = gradients(ops.memory_lookup, device, *rows_and_map, sparse_grad=sparse_grad)
            for grad, right in zip(found[1:], expected[1:]):
                torch.testing.assert_close(grad, right, rtol=1e-5, atol=1e-4)
            if not rows_and_map:
                torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-4)


def test_two_runs_give_identical_bits(device):
    values, grad, slots, weights = draw(9, 3, 8, 40)
    reads = on(device, sort_reads(slots.flatten(), 8))
    bounds = all_segments(reads.labels_M, 3)
    weights = weights.flatten().to(device)

    def run():
        sums = gpu.segment_sums(grad.to(device), reads, weights, bounds, grad.dtype)
        return sums, gpu.read_products(grad.to(device), values.to(device), reads)

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))
