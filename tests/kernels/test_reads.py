"""Reads are sorted by label, stably, and the runs of labels are found, on every device alike."""

from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memlayer_kernels import reads


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
def test_sorted_by_label_and_then_by_number(device, dtype):
    labels = torch.tensor([3, 0, 3, 1, 0, 3], dtype=dtype, device=device)
    found = reads.sort_reads(labels, top_k=2)
    assert found.labels_M.tolist() == [0, 0, 1, 3, 3, 3]
    assert found.reads_M.tolist() == [1, 4, 3, 0, 2, 5]
    assert found.tokens_M.tolist() == [0, 2, 1, 0, 1, 2]


@pytest.mark.parametrize("num_reads", [0, 1, 1000, reads.RADIX_READS - 1, reads.RADIX_READS + 1])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
def test_few_reads_and_many_are_sorted_alike(dtype, num_reads, device):
    low, high = (-300, 2**15) if dtype == torch.int16 else (-300, 2**31 - 1)
    for highest in (3, high):
        labels = torch.randint(low, highest, (num_reads,), generator=torch.Generator().manual_seed(0)).to(dtype)
        found = reads.sort_reads(labels.to(device), top_k=7)
        order = sorted(range(num_reads), key=labels.tolist().__getitem__)
        assert found.reads_M.tolist() == order
        assert found.labels_M.tolist() == labels[order].tolist()


@pytest.mark.parametrize("num_reads", [0, 1, 1000, reads.RADIX_READS + 1])
@pytest.mark.parametrize("num_labels", [2**16, 2**16 + 1])
@pytest.mark.parametrize("start", [0, -1, -(2**15), 10**6])
def test_labels_of_16_bits_are_sorted_as_others_are(start, num_labels, num_reads, device):
    """As many as fit, and one more."""
    labels = range(start, start + num_labels)
    some = torch.randint(labels.start, labels.stop, (num_reads,), generator=torch.Generator().manual_seed(0))
    some[: num_reads // 4], some[num_reads // 2 : num_reads // 2 + 9] = labels.start, labels.stop - 1
    found = reads.sort_reads(some.to(device), top_k=7, labels=labels)
    expected = some.sort(stable=True)
    assert found.labels_M.dtype == torch.int32
    assert torch.equal(found.labels_M.cpu().long(), expected.values)
    assert torch.equal(found.reads_M.cpu(), expected.indices)
    assert torch.equal(found.tokens_M.cpu(), (expected.indices // 7).int())


@pytest.mark.parametrize("top_k", [1, 3, 127, 128, 2**31 - 1])
def test_tokens_are_whole_quotients_up_to_the_largest_read(top_k, device):
    last = torch.tensor([2**31 - 1, 2**31 - 2, 2**31 - 128, 2**31 - 129, 2**24 + 1, 127, 126, 3, 2, 0])
    found = reads.sort_reads(torch.arange(10, device=device), top_k, last.to(device))
    assert found.tokens_M.tolist() == [number // top_k for number in last.tolist()]


class AsGpusDivide(TorchDispatchMode):
    """Division by a number as torch does it on GPUs: a product with its reciprocal."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.div_.Tensor, torch.ops.aten.div_.Scalar):
            return args[0].mul_(1 / float(args[1]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("top_k", [49, 98, 103, 107, 161, 187, 196])
def test_tokens_are_whole_quotients_where_a_product_with_the_reciprocal_is_less(top_k, device):
    numbers = torch.arange(20000 * top_k, device=device)
    with AsGpusDivide():
        assert not torch.equal(numbers.double().div_(top_k).int(), (numbers // top_k).int())
        found = reads.sort_reads(numbers, top_k)
    assert torch.equal(found.tokens_M, (numbers // top_k).int())


def test_tokens_of_every_number_of_slots_read_are_whole_quotients():
    """At both ends of every token's reads, up to the largest read there is."""
    for top_k in range(1, 513):
        tokens = torch.cat([torch.arange(3000), torch.arange(2**31 // top_k - 3000, 2**31 // top_k)])
        first = (tokens * top_k).view(-1, 1) + torch.tensor([0, top_k - 1])
        assert torch.equal(reads._tokens_of(first, top_k), tokens.int().view(-1, 1).expand(-1, 2))


@pytest.mark.parametrize("labels", [[], [2], [0, 0, 1, 4], [4, 4, 4]])
def test_bounds_of_all_labels_and_of_the_distinct_ones(device, labels):
    labels_M = torch.tensor(labels, dtype=torch.int32, device=device)
    bounds = reads.all_segments(labels_M, 5).tolist()
    assert [labels[a:b] for a, b in pairwise(bounds)] == [[n] * labels.count(n) for n in range(5)]
    distinct, bounds = (tensor.tolist() for tensor in reads.distinct_segments(labels_M))
    assert distinct == sorted(set(labels))
    assert [labels[a:b] for a, b in pairwise(bounds)] == [[n] * labels.count(n) for n in distinct]


@pytest.mark.parametrize("num_rows", [1, 4, 2**15, 2**16])
def test_sorting_all_reads_by_row_gives_those_with_a_row_last(device, num_rows):
    row_M = torch.randint(-2, min(num_rows, 6), (50,), dtype=torch.int32, device=device)
    expected, found = (sort(row_M, 5, num_rows) for sort in (reads.reads_with_a_row, reads.all_reads_by_row))
    num_ignored = int((row_M < 0).sum())
    for right, tensor in zip(expected, found):
        assert torch.equal(tensor[num_ignored:], right.to(tensor.dtype))
    assert (found.labels_M[:num_ignored] < 0).all()


@pytest.mark.parametrize("num_rows", [3, 2**15 - 1, 2**15])
def test_rows_that_do_not_exist_are_in_no_segment_however_large(device, num_rows):
    row_M = torch.tensor([2**15, 2, -(2**15) - 1, 2**16 + 1, 0, -(2**31), 2**31 - 1], dtype=torch.int32, device=device)
    found = reads.all_reads_by_row(row_M, 1, num_rows)
    assert found.reads_M.tolist() == [2, 5, 4, 1, 0, 3, 6]
    assert (found.labels_M[:2] < 0).all()
    assert (found.labels_M[4:] >= num_rows).all()


def test_segments_of_rows_are_runs_of_the_reads_of_each_row(device):
    row_M = torch.tensor([1, -1, 3, 1, -1, 0], dtype=torch.int32, device=device)
    found, bounds = reads.segments_of_rows(row_M, 1, 4)
    numbers, bounds = found.reads_M.tolist(), bounds.tolist()
    assert [numbers[a:b] for a, b in pairwise(bounds)] == [[5], [0, 3], [], [2]]
