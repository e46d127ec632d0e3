"""Reads sorted by where their gradients go, so that each row is summed once, in one order, by one writer.

A read is one token using one slot; the reads of a batch are numbered 0 .. T*K - 1 in the order of
slots_TK. Works on any device and costs one sort of the reads, whatever the size of the table. On a GPU
only distinct_segments makes the host wait, since the number of distinct labels is the size of its result.

Shapes: M reads, N labels (slots or rows), U distinct labels, S segments.
"""

from typing import NamedTuple

import torch
from torch import Tensor

RADIX_READS = 1 << 15  # from here on torch sorts integers on CPUs by their digits; fewer it compares one by one


class SortedReads(NamedTuple):
    """Reads in ascending order of a label (a slot or a row); equal labels in the order of the reads."""

    labels_M: Tensor  # int32; a negative label belongs to no segment
    reads_M: Tensor  # int64, number of each read
    tokens_M: Tensor  # int32, token of each read


def sort_reads(
    labels_M: Tensor, top_k: int, reads_M: Tensor | None = None, labels: range = range(-(2**31), 2**31)
) -> SortedReads:
    """Sort reads by label.

    Args:
        labels_M: label of each read, of any integer dtype.
        top_k: slots read per token, which turns the number of a read into its token.
        reads_M: number of each read, int64; by default 0 .. M - 1.
        labels: the numbers that a label may be; up to 2**16 of them are sorted faster.
    """
    labels_M, order_M = _stable_sort(labels_M, labels)
    reads_M = order_M if reads_M is None else reads_M[order_M]
    return SortedReads(labels_M, reads_M, _tokens_of(reads_M, top_k))


def _tokens_of(reads_M: Tensor, top_k: int) -> Tensor:
    """reads // top_k, int32, for reads below 2**31.

    CPUs divide integers one by one, and torch's float64 division on GPUs is a product with 1 / top_k, which makes
    less than 1 of 49 / 49. Half a read more keeps every quotient further from a whole number than float64 rounds.
    """
    return reads_M.double().add_(0.5).mul_(1 / top_k).int()


def _stable_sort(labels_M: Tensor, labels: range) -> tuple[Tensor, Tensor]:
    """Sorted labels (int32), and where each was (int64)."""
    if labels_M.is_cpu and labels_M.numel() < RADIX_READS:
        # numpy compares several int64 at once: 0.13 ms for 27,000 reads, where torch takes 1.4.
        keys_M = (labels_M.long() << 32).bitwise_or_(torch.arange(labels_M.numel()))
        keys_M.numpy().sort()
        return (keys_M >> 32).int(), keys_M & (2**32 - 1)
    if len(labels) > 2**16:
        return labels_M.int().sort(stable=True)
    # 16 bits take half the passes of 32, and wrap, so that each label becomes its distance from the middle.
    middle = labels.start + 2**15
    sorted_M, order_M = labels_M.short().sub_((middle + 2**15) % 2**16 - 2**15).sort(stable=True)
    return sorted_M.int().add_(middle), order_M


def segments_of_rows(row_M: Tensor, top_k: int, num_rows: int) -> tuple[SortedReads, Tensor]:
    """The reads that have a row sorted by it, and where the run, maybe empty, of each row begins and the last ends.

    Args:
        row_M: row of each read or a negative number, int32.
        top_k: slots read per token.
        num_rows: R.
    """
    reads = (reads_with_a_row if row_M.is_cpu else all_reads_by_row)(row_M, top_k, num_rows)
    return reads, _search_bounds(reads.labels_M, num_rows)


def reads_with_a_row(row_M: Tensor, top_k: int, num_rows: int) -> SortedReads:
    """Only these are sorted, but how many there are has to be asked."""
    reads_M = (row_M >= 0).nonzero().flatten()
    return sort_reads(row_M.index_select(0, reads_M), top_k, reads_M, range(num_rows))


def all_reads_by_row(row_M: Tensor, top_k: int, num_rows: int) -> SortedReads:
    """Those without a row first, those of a row that does not exist last: nothing is asked."""
    return sort_reads(row_M.clamp(-1, num_rows), top_k, labels=range(-1, num_rows + 1))


def distinct_segments(labels_M: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct labels (U,) int64 of sorted labels; where their runs begin and the last ends (U + 1,)."""
    begins_M = torch.ones_like(labels_M, dtype=torch.bool)
    torch.ne(labels_M[1:], labels_M[:-1], out=begins_M[1:])
    first_U = begins_M.nonzero().flatten()
    return labels_M.index_select(0, first_U).long(), torch.cat([first_U, first_U.new_full((1,), labels_M.numel())])


def all_segments(labels_M: Tensor, num_labels: int) -> Tensor:
    """Where the run, maybe empty, of each label 0 .. num_labels - 1 begins; and where the last one ends."""
    if not labels_M.is_cpu:
        return _search_bounds(labels_M, num_labels)  # bincount would make the host wait
    counts_N = torch.bincount(labels_M, minlength=num_labels)
    return torch.cat([counts_N.new_zeros(1), counts_N.cumsum(0)])


def _search_bounds(labels_M: Tensor, num_labels: int) -> Tensor:
    labels_N1 = torch.arange(num_labels + 1, dtype=labels_M.dtype, device=labels_M.device)
    return torch.searchsorted(labels_M, labels_N1)
