"""Full finetuning: every parameter, AdamW, dense gradients, as the papers' baseline has it."""

import torch
from torch import nn

from memlayer.attach import memory_tables
from memlayer.methods.prepared import Prepared


def full(model: nn.Module, background, settings) -> Prepared:
    """Train everything. ``background`` is not used."""
    tables = memory_tables(model).values()
    for table in tables:
        table.sparse = False  # torch's AdamW takes dense gradients only

    def finish() -> None:
        for table in tables:
            table.sparse = True

    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    return Prepared(model, optimizer, finish)
