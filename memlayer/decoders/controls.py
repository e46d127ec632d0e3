"""What stands where memory stands: memory, or what it is compared with, as ``memory.control`` of a config says.

A control is made, saved and loaded by the same functions as memory is, from the same settings, so that two models
differ in nothing else. Three kinds answer three doubts:

    dense      arithmetic alone would do it          a gated block of as many FLOPs a token, without a table
    one_slot   the gate alone would do it            the memory layer with nothing to look up: one slot, read always
    shuffled   any table would do it                 the memory layer with addresses that know no token
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from memlayer.decoders.dense_control import DenseBlock, inner_width
from memlayer.decoders.shuffled_address import ShuffledMemory
from memlayer.layers.config import MemoryConfig
from memlayer.layers.costs import multiply_adds
from memlayer.layers.memory import MemoryLayer, MemoryTable


class Made(NamedTuple):
    """Tables, and a layer for each of ``MemoryConfig.layers``, in their order."""

    tables: list[MemoryTable]
    layers: list[nn.Module]


def make(width: int, config: MemoryConfig) -> Made:
    """What ``config`` puts into a decoder of this width."""
    return MAKERS[config.control](width, config)


def _memory(width: int, config: MemoryConfig, kind: type[MemoryLayer] = MemoryLayer) -> Made:
    value_width, number = config.value_width or width, len(config.layers)
    tables = [MemoryTable(config.num_keys**2, value_width) for _ in range(1 if config.share else number)]
    layers = []
    for place in range(number):
        table = tables[0 if config.share else place]
        layer = kind(width, table, config.num_keys, config.num_heads, config.top_k, config.key_width)
        layers.append(_silent(layer, config))
    return Made(tables, layers)


def _shuffled(width: int, config: MemoryConfig) -> Made:
    return _memory(width, config, ShuffledMemory)


def _dense(width: int, config: MemoryConfig) -> Made:
    with torch.device("meta"):  # the layer that is stood in for is counted, not made
        (counted,) = _memory(width, replace(config, layers=config.layers[:1], mode="replace", start=None)).layers
    inner = inner_width(width, sum(multiply_adds(counted).values()))
    return Made([], [_silent(DenseBlock(width, inner), config) for _ in config.layers])


def _silent(layer: MemoryLayer | DenseBlock, config: MemoryConfig) -> nn.Module:
    if config.mode == "add":
        layer.silence(config.start)
    return layer


MAKERS: dict[str | None, Callable[[int, MemoryConfig], Made]] = {None: _memory, "dense": _dense, "shuffled": _shuffled}

# Name of a control -> what it changes in the settings of a memory.
CONTROLS: dict[str, dict] = {
    "dense": {"control": "dense"},
    "one_slot": {"num_keys": 1, "top_k": 1},
    "shuffled": {"control": "shuffled"},
}


def as_control(memory: MemoryConfig, name: str) -> MemoryConfig:
    """The settings of a memory as those of the control of that name."""
    return replace(memory, **CONTROLS[name])
