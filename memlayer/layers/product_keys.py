"""Product keys: from a hidden state to the best slots of a table of n*n values.

Two searches among n half-keys stand in for one search among n*n keys, so a million slots cost two
thousand dot products a head. The module returns scores and slots and reads nothing itself: whoever
wants to know what is read listens to it (``heard_by``; attach.record_reads for all layers of a model).

Shapes: T tokens, H heads, n half-keys, K slots read, Q width of half a key, D model width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from memlayer_kernels.ops import product_key_topk


class FindsSlots(nn.Module):
    """A module that finds slots, and tells whoever listens which."""

    def __init__(self):
        super().__init__()
        self._listeners: list[Callable[[Tensor], None]] = []
        self._is_heard = False  # what torch.compile looks at: hooks added later would not be heard

    @contextmanager
    def heard_by(self, listener: Callable[[Tensor], None]) -> Iterator[None]:
        """Call ``listener`` with the slots (T, H, K) of every forward pass while the context lasts.

        A model that was compiled before is compiled anew, with a break in its graph at every memory layer.
        """
        self._listeners.append(listener)
        self._is_heard = True
        try:
            yield
        finally:
            self._listeners.remove(listener)
            self._is_heard = bool(self._listeners)

    def tell(self, slots_THK: Tensor) -> None:
        """Say which slots a forward pass found."""
        if self._is_heard:
            self._tell(slots_THK)

    @torch.compiler.disable(reason="whoever listens to what is read is told outside graphs")
    def _tell(self, slots_THK: Tensor) -> None:
        for listener in self._listeners:
            listener(slots_THK.detach())


class ProductKeys(FindsSlots):
    """Finds the ``top_k`` slots of each head whose two half-keys match the query best.

    Source: arXiv:1907.05242, section 3; defaults of arXiv:2412.09764. Each half of the query is
    normalised, because without it training collapses onto a few hundred slots.

    Args:
        width: model width D.
        num_keys: half-keys n per half and head; the table has n * n slots.
        num_heads: independent queries per token.
        top_k: slots read per head, at most ``num_keys``.
        key_width: width of a whole query; even.

    Raises:
        ValueError: ``top_k`` exceeds ``num_keys``, or ``key_width`` is odd.
    """

    def __init__(self, width: int, num_keys: int, num_heads: int = 4, top_k: int = 32, key_width: int = 128):
        super().__init__()
        if not 1 <= top_k <= num_keys:
            raise ValueError(f"top_k is {top_k}, must be between 1 and num_keys = {num_keys}")
        if key_width < 2 or key_width % 2:
            raise ValueError(f"key_width is {key_width}, must be even and positive: a query has two halves")
        self.num_keys, self.num_heads, self.top_k = num_keys, num_heads, top_k
        self.half_width = key_width // 2
        self.query = nn.Linear(width, num_heads * key_width, bias=False)
        self.norm = nn.LayerNorm(self.half_width)
        self.half_keys = nn.Parameter(torch.empty(num_heads, 2, num_keys, self.half_width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Half-keys so that the score of a half has unit variance under a normalised query."""
        nn.init.normal_(self.half_keys, std=self.half_width**-0.5)

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (T, H, K) float32, best first, and slots (T, H, K) int64."""
        scores_THK, slots_THK = self.search(hidden_TD)
        self.tell(slots_THK)
        return scores_THK, slots_THK

    def search(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        """What ``forward`` gives, told to nobody."""
        queries_TH2Q = self.norm(self.query(hidden_TD).unflatten(-1, (self.num_heads, 2, self.half_width)))
        # Under autocast the projection is in half precision; the search keeps the precision of its keys.
        return product_key_topk(queries_TH2Q.to(self.half_keys.dtype), self.half_keys, self.top_k)

    def extra_repr(self) -> str:
        return f"num_slots={self.num_keys**2}, num_heads={self.num_heads}, top_k={self.top_k}"
