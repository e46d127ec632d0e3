"""Patches of the tiny model, small enough to work out by hand, shared by the tests of memlayer.patch."""

import tiny
import torch

from memlayer.decoders.attach import memory_tables
from memlayer.decoders.fingerprint import product_key_fingerprints
from memlayer.patch import Base, MemoryPatch, TablePatch

SLOTS = torch.tensor([2, 7, 40, 63])


def table_of(model):
    return memory_tables(model)[tiny.TABLE].weight.data


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def patch_of(model, slots, rows, provenance=None):
    """A patch that writes ``rows`` at ``slots`` of the model as it is."""
    table = table_of(model)
    slots = torch.as_tensor(slots, dtype=torch.int64)
    keys = product_key_fingerprints(model)[tiny.TABLE]
    patch = TablePatch(slots, rows.to(table.dtype), table[slots].clone(), len(table), keys)
    return MemoryPatch({tiny.TABLE: patch}, provenance or {}, Base.of(model))


def odd_patch(model):
    """New rows for SLOTS; NaN and infinity among the originals, which the model holds, and -0.0 on either side."""
    table = table_of(model)
    table[7, :3] = torch.tensor([float("nan"), -0.0, float("inf")], dtype=table.dtype)
    rows = torch.randn(4, table.shape[1], generator=torch.Generator().manual_seed(5))
    rows[2, :3] = torch.tensor([-0.0, 1.0, 0.0])
    return patch_of(model, SLOTS, rows, {"seed": 3})
