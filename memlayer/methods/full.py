"""Full finetuning: every parameter, AdamW or plain SGD.

The tables take AdamW row by row, as in pretraining: rows that a batch does not read stay where they are. Dense AdamW
would move them too, by momentum and decay, so this is the kinder baseline, and the faster one. SGD, without momentum
and decay, is the control of arXiv:2510.15103, table 2.
"""

import torch
from torch import nn

from memlayer.decoders.attach import memory_tables
from memlayer.decoders.mapped import refuse_mapped
from memlayer.layers.optimizer import RowAdamW
from memlayer.methods.prepared import Prepared


def prepare(model: nn.Module, background, settings, lessons=()) -> Prepared:
    """Train everything. ``background`` and ``lessons`` are not used.

    Raises:
        ValueError: a table of the model is mapped.
    """
    refuse_mapped(model, "full finetuning trains whole tables")
    modules = memory_tables(model).values()
    tables = [table.weight for table in modules]
    rest = [p for p in model.parameters() if all(p is not table for table in tables)]
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD([*tables, *rest], lr=settings.learning_rate)
    else:
        groups = [{"params": tables, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.01}]
        optimizer = RowAdamW(groups, lr=settings.learning_rate)

    def sparse_gradients(sparse: bool) -> None:
        for table in modules:
            table.sparse = sparse

    sparse_gradients(True)
    return Prepared(model, optimizer, finish=lambda: sparse_gradients(False))
