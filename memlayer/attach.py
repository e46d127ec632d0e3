"""Put memory layers into a Hugging Face decoder, take them out, and listen to what they read.

The only file that knows decoder families: where the layers are and what their feed-forward block is
called. Everything else works on the modules found here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from operator import attrgetter

import torch
from torch import Tensor, nn

from memlayer.config import MemoryConfig
from memlayer.memory import FeedForwardWithMemory, MemoryLayer, MemoryTable
from memlayer.product_keys import ProductKeys

# model_type of the Hugging Face config -> (where the decoder layers are, name of the feed-forward block)
FAMILIES = {"llama": ("model.layers", "mlp")}


def add_memory(model: nn.Module, config: MemoryConfig) -> nn.Module:
    """Attach memory layers to ``model`` in place and return it.

    The tables are registered once, as ``model.memory``; the configuration is kept in
    ``model.config.memory`` so that a saved model says how to rebuild itself.

    Args:
        model: a causal language model of a family in ``FAMILIES``.
        config: which layers, how many slots, and how they are read.

    Raises:
        ValueError: the family is unknown, a layer does not exist or is named twice, or memory is attached already.
    """
    if getattr(model, "memory", None) is not None:
        raise ValueError(f"memory is attached already, at layers {model.config.memory['layers']}")
    layers, ffn_name = _decoder_layers(model)
    missing = [i for i in config.layers if not 0 <= i < len(layers)]
    if missing or not config.layers:
        raise ValueError(
            f"memory layers {list(config.layers)} asked for, the model has layers 0 to {len(layers) - 1}"
        )
    if len(set(config.layers)) < len(config.layers):
        raise ValueError(f"memory layers {list(config.layers)} asked for, one of them twice")
    width = model.config.hidden_size
    num_tables = 1 if config.share else len(config.layers)
    tables = [MemoryTable(config.num_keys**2, config.value_width or width) for _ in range(num_tables)]
    for position, index in enumerate(config.layers):
        table = tables[0 if config.share else position]
        memory = MemoryLayer(width, table, config.num_keys, config.num_heads, config.top_k, config.key_width)
        ffn = getattr(layers[index], ffn_name)
        block = memory if config.mode == "replace" else FeedForwardWithMemory(ffn, memory)
        reference = next(ffn.parameters())
        setattr(layers[index], ffn_name, block.to(reference.device, reference.dtype))
    model.memory = nn.ModuleList(tables).to(reference.device, reference.dtype)
    model.config.memory = asdict(config)
    return model


def _decoder_layers(model: nn.Module) -> tuple[nn.ModuleList, str]:
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if model_type not in FAMILIES:
        raise ValueError(
            f"no decoder layers known for {model_type!r}; known families: {', '.join(sorted(FAMILIES))}"
        )
    path, ffn_name = FAMILIES[model_type]
    return attrgetter(path)(model), ffn_name


def memory_layers(model: nn.Module) -> dict[str, MemoryLayer]:
    """The memory layers of a model, wrapped or not, by module name in the order they run.

    Raises:
        ValueError: the model has none.
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, MemoryLayer)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no memory layer; attach one with add_memory(model, MemoryConfig(...))"
        )
    return found


def memory_tables(model: nn.Module) -> dict[str, MemoryTable]:
    """The tables of a model by the name of their module, e.g. ``memory.0``."""
    tables = {name: m for name, m in model.named_modules() if isinstance(m, MemoryTable)}
    if not tables:
        raise ValueError(
            f"{type(model).__name__} has no memory table; attach one with add_memory(model, MemoryConfig(...))"
        )
    return tables


class Reads:
    """What the memory layers read in the latest forward pass.

    Kept per layer and overwritten, not appended: activation checkpointing runs a layer again in the
    backward pass, and a read must count once.
    """

    def __init__(self, table_of_layer: dict[str, str]):
        self._table_of_layer = table_of_layer
        self._slots: dict[str, Tensor] = {}

    def store(self, layer: str, slots_THK: Tensor) -> None:
        """Keep one layer's slots, shape (tokens of the batch, H, K)."""
        self._slots[layer] = slots_THK.flatten(1)

    def slots(self, mask: Tensor) -> dict[str, Tensor]:
        """Slots read at the positions of ``mask``, per table.

        Args:
            mask: bool or int, shape (batch, sequence): the positions that count, padding zero.

        Returns:
            per table name, int64 (positions counted * layers of the table, H * K).

        Raises:
            ValueError: no forward pass ran, or the mask has another number of positions.
        """
        if not self._slots:
            raise ValueError("no reads recorded: run the model forward inside record_reads first")
        chosen: dict[str, list[Tensor]] = {}
        for layer, slots_TK in self._slots.items():
            if mask.numel() != len(slots_TK):
                raise ValueError(f"mask has {mask.numel()} positions, the forward pass had {len(slots_TK)}")
            chosen.setdefault(self._table_of_layer[layer], []).append(slots_TK[mask.reshape(-1).bool()])
        return {table: torch.cat(parts) for table, parts in chosen.items()}


@contextmanager
def record_reads(model: nn.Module) -> Iterator[Reads]:
    """Listen to the product keys of ``model`` while the context lasts; see ``Reads``."""
    name_of_table = {id(table): name for name, table in memory_tables(model).items()}
    layers = memory_layers(model)
    reads = Reads({name: name_of_table[id(layer.table)] for name, layer in layers.items()})

    def listener(name):
        def hook(_module: ProductKeys, _inputs, output):
            reads.store(name, output[1].detach())

        return hook

    handles = [layer.keys.register_forward_hook(listener(name)) for name, layer in layers.items()]
    try:
        yield reads
    finally:
        for handle in handles:
            handle.remove()
