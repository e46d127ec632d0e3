"""Split a model's tables over processes by columns, and make them whole again; what DistributedDataParallel leaves.

The rest of the model stays whole on every process, under DistributedDataParallel or FSDP2 (sharding.py). While the
tables are split, every process has to take part in every forward pass, and in ``save_pretrained``.

Every process builds or loads the whole table once, in the memory of its host, before it keeps its columns: devices
need not hold it, hosts do.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from memlayer.decoders.attach import memory_tables
from memlayer.layers.columns import Columns
from memlayer.layers.memory import MemoryTable
from memlayer.layers.ranks import Ranks, grid
from memlayer.layers.row_gradients import average_rows_

BLOCK_BYTES = 64 << 20  # of a table that is sent, at a time


@torch.no_grad()
def split_tables(model: nn.Module, shards: int) -> None:
    """Keep of each table of ``model`` this process's columns, in place.

    Call it before an optimizer has stepped a table, and before DistributedDataParallel takes the model, which is told
    to leave the tables alone: after a backward pass ``average_table_gradients`` does what it does.

    Args:
        shards: so many neighbouring processes share a table; their number divides that of all processes.

    Raises:
        ValueError: the model has no tables, they are split already, or the processes or the columns do not come out
            even; the model is left as it was.
    """
    tables = memory_tables(model)
    for name, table in tables.items():
        if table.columns is not None:
            raise ValueError(f"table {name!r} is split already, over {table.columns.ranks.size} processes")
        if table.embedding_dim % shards:
            raise ValueError(
                f"table {name!r} has values of width {table.embedding_dim}, which {shards} processes cannot share "
                "evenly by columns"
            )
    ranks, replicas = grid(shards)
    for table in tables.values():
        columns = Columns(ranks, replicas, table.embedding_dim)
        table.weight.data = columns.of(table.weight)
        table.weight.grad, table.columns = None, columns
    leave_to_us(model, tables.values())


@torch.no_grad()
def join_tables(model: nn.Module) -> None:
    """Make split tables whole again on every process, in place and on the CPU, where memory layers read them too."""
    for table in memory_tables(model).values():
        if table.columns is not None:
            table.weight.data = table.columns.whole_table(table.weight)
            table.weight.grad, table.columns = None, None


@contextmanager
def tables_split(model: nn.Module, shards: int) -> Iterator[None]:
    """A context in which the tables are split, and at whose end they are whole; with 1 it does nothing.

    Where an error ends it they stay as they are, since the other processes may not come.
    """
    if shards == 1:
        yield
        return
    split_tables(model, shards)
    yield
    join_tables(model)


def leave_to_us(model: nn.Module, tables) -> None:
    """Have DistributedDataParallel neither reduce nor overwrite these tables of a model that it is still to take."""
    ours = {id(tensor) for table in tables for tensor in (table.weight, table.row_of_slot) if tensor is not None}
    named = [*model.named_parameters(), *model.named_buffers()]
    names = [name for name, tensor in named if id(tensor) in ours]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


@torch.no_grad()
def copy_tables_from_first(tables: list[MemoryTable], ranks: Ranks) -> None:
    """Give every process the first one's tables, as DistributedDataParallel does with what it reduces."""
    for table in tables:
        step = max(1, BLOCK_BYTES // max(1, table.weight[:1].nbytes))
        for block in table.weight.detach().split(step):
            ranks.copy_from_first(block)


def average_table_gradients(model: nn.Module, ranks: Ranks) -> None:
    """Put into the gradient of each trained table the mean over all processes; see layers/row_gradients.py.

    Args:
        ranks: all processes.

    Raises:
        ValueError: a table has a dense gradient, which DistributedDataParallel reduces; or the table is split, and has
            one.
    """
    for table in memory_tables(model).values():
        if table.weight.requires_grad:
            average_rows_(table.weight, ranks if table.columns is None else table.columns.replicas, ranks.size)
