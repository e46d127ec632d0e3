"""What a finetuning method hands to a training loop."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from memlayer.patch import MemoryPatch

if TYPE_CHECKING:
    from memlayer.methods.sparse_memory import SparseMemoryFinetuner


@dataclass
class Prepared:
    """A model made ready for finetuning.

    Attributes:
        model: the model to run forward (LoRA wraps it).
        optimizer: steps what the method trains.
        finish: call after training; leaves the caller's model as an ordinary one that has learned, and
            returns a patch where the method changes memory rows only.
        finetuner: the sparse memory finetuner, if the method is that.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    finish: Callable[[], MemoryPatch | None]
    finetuner: "SparseMemoryFinetuner | None" = None
