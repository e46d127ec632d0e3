"""Reads sorted by where their gradients go, so that each row is summed once, in one order, by one writer.

A read is one token using one slot; the reads of a batch are numbered 0 .. T*K - 1 in the order of
slots_TK. Works on any device and costs one sort of the reads, whatever the size of the table.

Shapes: M reads, U distinct labels (slots or rows), S segments.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class SortedReads(NamedTuple):
    """Reads in ascending order of a label (a slot or a row); equal labels in the order of the reads."""

    labels_M: Tensor  # int32
    reads_M: Tensor  # int64, number of each read
    tokens_M: Tensor  # int64, token of each read


def sort_reads(labels_M: Tensor, top_k: int, reads_M: Tensor | None = None) -> SortedReads:
    """Sort reads by label.

    Args:
        labels_M: label of each read, below 2**31.
        top_k: slots read per token, which turns the number of a read into its token.
        reads_M: number of each read, int64; by default 0 .. M - 1.
    """
    labels_M, order_M = labels_M.int().sort(stable=True)
    reads_M = order_M if reads_M is None else reads_M[order_M]
    return SortedReads(labels_M, reads_M, reads_M // top_k)


def distinct_segments(labels_M: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct labels (U,) int64 of sorted labels; where their runs begin and the last ends (U + 1,)."""
    labels_U, counts_U = torch.unique_consecutive(labels_M, return_counts=True)
    return labels_U.long(), _bounds(counts_U)


def all_segments(labels_M: Tensor, num_labels: int) -> Tensor:
    """Where the run, maybe empty, of each label 0 .. num_labels - 1 begins; and where the last one ends."""
    return _bounds(torch.bincount(labels_M, minlength=num_labels))


def _bounds(counts_S: Tensor) -> Tensor:
    return torch.cat([counts_S.new_zeros(1), counts_S.cumsum(0)])
