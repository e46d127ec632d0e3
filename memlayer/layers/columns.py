"""A table split by columns over the processes of a group: each holds all slots, and of every value a share.

A token's read needs all columns, and its process has some of them. So every process looks up its columns for the
tokens of all, and they exchange what they read. While a token reads fewer rows than a third of a value's width, that
sends fewer bytes than rows would (shared notes: 7.2 KB a token against 15 KB at width 1024, 128 reads, 8 processes),
and no process waits for one that holds a row which all tokens read.

    forward    slots and weights of all tokens are gathered; local columns are looked up; all columns of this
               process's tokens come back
    backward   the gradient of these columns goes where they are; the gradient of a weight is the sum, in the order of
               ranks, of what each share of columns gives

What a process looks up is the tokens of all in the order of ranks, so a table's gradient is summed in the order in
which one process would sum it over the same tokens. Every process of a group has to run every forward and backward
pass, at the same time as the others.

Left out: overlapping the exchange with the work of other layers; several groups of columns on one process.

Shapes: T tokens of this process, A tokens of all, K slots read, N slots, V value width, C columns here = V / ranks.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memlayer.layers.ranks import Ranks

BLOCK_BYTES = 64 << 20  # of a table that is made whole again, at a time


class Columns:
    """The columns of a table that this process holds.

    Args:
        ranks: the group over which the table is split.
        replicas: the processes that hold the same columns, in other groups.
        width: V.

    Attributes:
        here: the slice of columns.

    Raises:
        ValueError: the columns cannot be shared out evenly.
    """

    def __init__(self, ranks: Ranks, replicas: Ranks, width: int):
        if width % ranks.size:
            raise ValueError(f"values of width {width} cannot be shared evenly by {ranks.size} processes")
        self.ranks, self.replicas, self.width = ranks, replicas, width
        share = width // ranks.size
        self.here = slice(ranks.rank * share, (ranks.rank + 1) * share)

    def of(self, whole_RV: Tensor) -> Tensor:
        """The columns of whole rows that belong here, (R, C), in memory of their own."""
        return whole_RV[:, self.here].clone(memory_format=torch.contiguous_format)

    def whole(self, part_RC: Tensor) -> Tensor:
        """Whole rows (R, V) of the columns that each process of the group has of the same rows."""
        rows = len(part_RC)
        heard = self.ranks.gather(part_RC, [rows] * self.ranks.size)
        return _side_by_side(heard, self.ranks.size)

    def whole_table(self, part_NC: Tensor, keep: bool = True) -> Tensor | None:
        """``whole`` of a table, a block of rows at a time, on the CPU: no single device need hold it.

        Args:
            keep: whether this process wants it, or only helps the others to it.
        """
        part_NC = part_NC.detach()
        whole_NV = torch.empty(len(part_NC), self.width, dtype=part_NC.dtype) if keep else None
        step = max(1, BLOCK_BYTES // max(1, self.width * part_NC.element_size()))
        for first in range(0, len(part_NC), step):
            rows = self.whole(part_NC[first : first + step])
            if keep:
                whole_NV[first : first + step] = rows.cpu()
        return whole_NV

    @torch.compiler.disable(reason="other processes take part in it")
    def read(self, slots_TK: Tensor, weights_TK: Tensor, look_up: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What this process's tokens read, (T, V).

        Args:
            slots_TK: int64; any number of tokens, which may differ between processes.
            weights_TK: theirs.
            look_up: from slots (A, K) and weights (A, K) to the columns here, (A, C).
        """
        lengths = self.ranks.lengths(len(slots_TK), slots_TK.device)
        slots_AK = self.ranks.gather(slots_TK.int(), lengths)  # tables hold fewer than 2**31 slots
        weights_AK = _GatherWeights.apply(weights_TK, self.ranks, lengths)
        return _ExchangeColumns.apply(look_up(slots_AK, weights_AK), self.ranks, lengths)


class _GatherWeights(torch.autograd.Function):
    """Weights of all processes' tokens; their gradient is the sum over the columns that each process has."""

    @staticmethod
    def forward(ctx, weights_TK: Tensor, ranks: Ranks, lengths: list[int]) -> Tensor:
        ctx.ranks, ctx.lengths = ranks, lengths
        return ranks.gather(weights_TK, lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_AK: Tensor) -> tuple[Tensor, None, None]:
        ranks, lengths = ctx.ranks, ctx.lengths
        # Parts of a sum: in half precision each would be rounded before it is added.
        parts_AK = grad_AK.to(torch.promote_types(grad_AK.dtype, torch.float32))
        heard = ranks.exchange(parts_AK, lengths, [lengths[ranks.rank]] * ranks.size)
        return _sum_in_order(heard, ranks.size).to(grad_AK.dtype), None, None


class _ExchangeColumns(torch.autograd.Function):
    """From the columns here of all tokens to all columns of the tokens here, and back."""

    @staticmethod
    def forward(ctx, read_AC: Tensor, ranks: Ranks, lengths: list[int]) -> Tensor:
        ctx.ranks, ctx.lengths = ranks, lengths
        heard = ranks.exchange(read_AC, lengths, [lengths[ranks.rank]] * ranks.size)
        return _side_by_side(heard, ranks.size)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TV: Tensor) -> tuple[Tensor, None, None]:
        ranks, lengths = ctx.ranks, ctx.lengths
        share_of_each = grad_TV.unflatten(1, (ranks.size, -1)).transpose(0, 1).flatten(0, 1)
        return ranks.exchange(share_of_each, [len(grad_TV)] * ranks.size, lengths), None, None


def _side_by_side(parts: Tensor, number: int) -> Tensor:
    """Rows (R, number * C) of their columns, which lie one share after the other, (number * R, C)."""
    return parts.unflatten(0, (number, -1)).transpose(0, 1).flatten(1)


def _sum_in_order(parts: Tensor, number: int) -> Tensor:
    """The sum of parts that lie one after the other, the first two first."""
    total, *others = parts.unflatten(0, (number, -1)).unbind()
    for other in others:
        total = total + other
    return total
