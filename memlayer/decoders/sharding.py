"""Shard a decoder's weights over processes with torch's FSDP2, and leave its tables out.

FSDP2 would gather a whole table for every forward pass, and cannot take gradients of rows. So the tables are its
``ignored_params``: whole on every process, or split by columns (split.py), which is done first. What FSDP2 does with
the rest is torch's own; the gradients of tables are averaged by ``average_table_gradients``.

In a training loop of one's own::

    split_tables(model, shards)  # or leave the tables whole
    shard_decoder(model)
    optimizer = RowAdamW(...)    # after it: sharding replaces the parameters
    for batch in batches:
        model(**batch).loss.backward()
        average_table_gradients(model, ranks)
        optimizer.step()
    model.save_pretrained(folder)  # every process calls it; the first one writes what one process would

accelerate starts FSDP2 on accelerators only (1.15), where ``ignored_modules="model.memory.*"`` of its plugin says the
same; no run of ours has tried that, so ``train.py`` refuses it.
"""

from torch import nn
from torch.distributed.fsdp import fully_shard

from memlayer.decoders.attach import memory_layers, memory_tables
from memlayer.decoders.structure import decoder_layers


def shard_decoder(model: nn.Module, **settings) -> nn.Module:
    """``fully_shard`` for each memory layer, each decoder layer and the rest, in place; returns the model.

    Args:
        settings: of torch.distributed.fsdp.fully_shard, for instance ``mesh``, ``mp_policy``.

    Raises:
        ValueError: the model has no tables, or a finetuner is attached to one, whose rows no shard could address.
    """
    tables = memory_tables(model)
    for name, table in tables.items():
        if table.rows is not None:
            raise ValueError(f"a finetuner is attached to table {name!r}: rows are learned in whole models")
    settings["ignored_params"] = {table.weight for table in tables.values()}
    layers, _ = decoder_layers(model)
    for memory in memory_layers(model).values():
        fully_shard(memory, **settings)  # a unit of its own, as it may have another dtype than its layer
    for layer in layers:
        fully_shard(layer, **settings)
    return fully_shard(model, **settings)
