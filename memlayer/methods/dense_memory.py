"""All values: every row that a step reads may move, and nothing else in the model does.

The control to sparse memory finetuning that chooses no slots: what choosing spares is the difference ("all values" in
figure 6 of arXiv:2510.15103). Rows that a batch does not read stay where they are, whatever the optimizer.
"""

import torch
from torch import nn

from memlayer.decoders.attach import refuse_split, unsharded_tables
from memlayer.decoders.mapped import refuse_mapped
from memlayer.layers.optimizer import RowAdamW
from memlayer.methods.prepared import Prepared


def prepare(model: nn.Module, background, settings, lessons=()) -> Prepared:
    """Train the tables. ``background`` is not used.

    Raises:
        ValueError: the model has no memory, FSDP has sharded it, or a table of it is mapped.
    """
    refuse_mapped(model, "dense memory finetuning trains whole tables")
    refuse_split(model)
    tables = list(unsharded_tables(model).values())
    weights = [table.weight for table in tables]
    was_trainable = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    for table in tables:
        table.weight.requires_grad_(True)
        table.sparse = True
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(weights, lr=settings.learning_rate)
    else:
        optimizer = RowAdamW(weights, lr=settings.learning_rate, weight_decay=0.0)

    def finish() -> None:
        for table in tables:
            table.sparse = False
        for parameter in was_trainable:
            parameter.requires_grad_(True)

    return Prepared(model, optimizer, finish)
