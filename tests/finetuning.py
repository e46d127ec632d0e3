"""Sparse memory finetuning of the tiny models under several optimizers, shared by the tests."""

from functools import partial

import tiny
import torch

from memlayer.methods.sparse_memory import SparseMemoryFinetuner

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=1.0),
    "sgd_momentum_decay": partial(torch.optim.SGD, lr=1.0, momentum=0.9, weight_decay=0.1),
    "adam": partial(torch.optim.Adam, lr=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
}


def finetuner_of(model, num_rows=5, **settings):
    return SparseMemoryFinetuner(model, tiny.background(model), num_rows, **settings)


def learn(model, batches, make=OPTIMIZERS["sgd"], **settings):
    """Take one step a batch; returns the finetuner and the slots selected in each step."""
    finetuner = finetuner_of(model, **settings)
    optimizer = finetuner.watch(make(finetuner.parameters()))
    selected = []
    for batch in batches:
        finetuner.loss(batch).backward()
        selected.append({name: slots.clone() for name, slots in finetuner.selected.items()})
        optimizer.step()
        optimizer.zero_grad()
    return finetuner, selected
