"""The optimizer's state of tables that processes share, saved as one process would have it: any number loads it.

Shapes: N slots, V value width, C columns here.
"""

from collections.abc import Mapping

import torch
from torch import nn

from memlayer.decoders.classes import is_first_of_all
from memlayer.layers.columns import Columns
from memlayer.layers.memory import MemoryTable


def whole_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict | None:
    """The optimizer's state dict, the moments (N, V) of each split table whole.

    All processes have to call it; the first one gets it, the others get None.
    """
    state, is_first = optimizer.state_dict(), is_first_of_all(model)
    whole = dict(state["state"])
    for index, columns in _columns(optimizer, model).items():
        if index in whole:  # every process has stepped it, or none has
            whole[index] = {
                name: columns.whole_table(tensor, keep=is_first) if tensor.ndim == 2 else tensor
                for name, tensor in whole[index].items()
            }
    return {**state, "state": whole} if is_first else None


def state_here(state: Mapping, optimizer: torch.optim.Optimizer, model: nn.Module) -> dict:
    """Of a state dict with whole moments what belongs to this process."""
    here = dict(state["state"])
    for index, columns in _columns(optimizer, model).items():
        if index in here:
            here[index] = {
                name: columns.of(tensor) if tensor.ndim == 2 else tensor for name, tensor in here[index].items()
            }
    return {**state, "state": here}


def _columns(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[int, Columns]:
    """Of each split table that the optimizer steps: its number among the parameters, as state dicts count them."""
    tables = (module for module in model.modules() if isinstance(module, MemoryTable))
    split = {id(table.weight): table.columns for table in tables if table.columns is not None}
    parameters = [id(p) for group in optimizer.param_groups for p in group["params"]]
    return {number: split[identity] for number, identity in enumerate(parameters) if identity in split}
