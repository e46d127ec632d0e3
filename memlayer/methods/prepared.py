"""What a finetuning method hands to a training loop."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from memlayer.methods.open_table import Capacity, Selection
from memlayer.patch import MemoryPatch


class Finetuner(Protocol):
    """What a training loop asks of a method that chooses for each step which rows may move.

    Attributes:
        last_selection: per table, what the latest choice was made among; for a log.
    """

    last_selection: Mapping[str, Selection]

    def select(self, micro_batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Choose for one optimizer step over all its micro-batches."""

    def selecting(self, batch: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """A context around a forward pass on ``batch``, for which it chooses."""

    def alongside(self) -> AbstractContextManager[None]:
        """A context around a forward pass whose loss is added to that of the batch which was chosen for."""

    def begin(self, lesson: str) -> None:
        """Teach this lesson from now on."""

    def capacity(self) -> Mapping[str, Capacity]:
        """How full each table is."""

    def state_dict(self) -> dict[str, dict]:
        """What later steps depend on, for a checkpoint."""

    def load_state_dict(self, state: Mapping[str, Mapping]) -> None:
        """Go on from a checkpoint."""


@dataclass
class Prepared:
    """A model made ready for finetuning.

    Attributes:
        model: the model to run forward (LoRA wraps it).
        optimizer: steps what the method trains.
        finish: call after training; leaves the caller's model as an ordinary one that has learned, and
            returns a patch where the method changes memory rows only.
        finetuner: what chooses the rows of each step, if the method does that.
        save: writes what answers beside the model's own weights into a folder, where the method keeps it apart.
        beside: writes what changing the patch later takes, beside it, where the method keeps that; after ``finish``.
        found: numbers that the method found when it looked at the lessons, by name.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    finish: Callable[[], MemoryPatch | None]
    finetuner: Finetuner | None = None
    save: Callable[[Path], None] | None = None
    beside: Callable[[Path], None] | None = None
    found: Mapping[str, float] = field(default_factory=dict)
