"""How much a loss wants each slot to move: the length of its gradient, without one of the table's size.

Shapes: T tokens of a forward pass, K slots read a token, V value width, U distinct slots.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from memlayer.layers.memory import MemoryTable


class ReadsOfLoss:
    """What a forward pass read of each table, and what that became."""

    def __init__(self):
        self._reads: list[tuple[str, Tensor, Tensor, Tensor]] = []

    def norms(self, loss: Tensor, mask_T: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The gradients of ``loss``; nothing accumulates anywhere.

        Args:
            loss: of the forward pass that was recorded, whose graph is freed.
            mask_T: bool, the positions whose reads count.

        Returns:
            per table the distinct slots read at those positions, ascending, and the norm of each one's gradient.
        """
        gradients = torch.autograd.grad(loss, [read_TV for *_, read_TV in self._reads], allow_unused=True)
        parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for (name, slots_TK, weights_TK, read_TV), gradient_TV in zip(self._reads, gradients, strict=True):
            if gradient_TV is None:
                gradient_TV = torch.zeros_like(read_TV)
            some = mask_T.to(slots_TK.device)
            parts.setdefault(name, []).append((slots_TK[some], weights_TK[some], gradient_TV[some]))
        return {name: _norms(of_table) for name, of_table in parts.items()}

    def keep(self, name: str, slots_TK: Tensor, weights_TK: Tensor, read_TV: Tensor) -> None:
        """One read of a table."""
        self._reads.append((name, slots_TK, weights_TK.detach(), read_TV))


def _norms(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    slots_U, place = torch.cat([slots.flatten() for slots, _, _ in parts]).unique(return_inverse=True)
    sum_UV = parts[0][2].new_zeros(len(slots_U), parts[0][2].shape[1], dtype=torch.float32)
    places = place.split([slots.numel() for slots, _, _ in parts])
    for (slots_TK, weights_TK, gradient_TV), place_of_part in zip(parts, places, strict=True):
        place_TK = place_of_part.view_as(slots_TK)
        for k in range(slots_TK.shape[1]):  # all at once would take K times the memory
            sum_UV.index_add_(0, place_TK[:, k], (weights_TK[:, k, None] * gradient_TV).float())
    return slots_U, torch.linalg.vector_norm(sum_UV, dim=1)


@contextmanager
def recording(tables: Mapping[str, MemoryTable]) -> Iterator[ReadsOfLoss]:
    """Keep what a forward pass inside the context reads of these tables."""
    found = ReadsOfLoss()

    def follow(name: str):
        return lambda _table, inputs, read_TV: found.keep(name, *inputs, read_TV)

    handles = [table.register_forward_hook(follow(name)) for name, table in tables.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
