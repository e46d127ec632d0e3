"""Put memory layers into a Hugging Face decoder, take them out, and listen to what they read."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from types import UnionType

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from memlayer.decoders.classes import (
    TAG,
    MemoryDecoder,
    classes_with_memory,
    with_memory_section,
    without_memory_section,
)
from memlayer.decoders.dense_control import DenseBlock
from memlayer.decoders.structure import check_blocks, decoder_layers, extract_memory, insert_memory
from memlayer.layers.config import MemoryConfig
from memlayer.layers.memory import FeedForwardWithMemory, MemoryLayer, MemoryTable


def add_memory(model: PreTrainedModel, config: MemoryConfig) -> PreTrainedModel:
    """Attach memory layers to ``model`` in place and return it.

    The tables are registered once, as ``memory`` of the base model (``model.model.memory``), and memory has a dtype of
    its own (``config.dtype``). The model becomes one of the class with memory of its family (``classes.py``) with a
    config that has a memory section, so that what ``save_pretrained`` writes says how to rebuild itself.
    With mode "add" no logit changes until something is learned, see ``MemoryConfig.start``.

    Args:
        model: a causal language model that AutoModelForCausalLM can make; where its layers are is found by looking.
        config: which layers, how many slots, and how they are read.

    Raises:
        ValueError: the model is no such decoder, a block cannot have memory beside it or in its place, a layer does
            not exist, or memory is attached already; the model is then left as it was.
    """
    if isinstance(model, MemoryDecoder):
        raise ValueError(f"memory is attached already, at layers {model.config.memory['layers']}")
    decoder_layers(model)  # first, since it says best what is wrong
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise ValueError(
            f"{type(model).__name__} has no language modelling head: attach memory to a causal language model"
        )
    class_with_memory = classes_with_memory(type(model.config)).causal_lm
    if type(model) is not class_with_memory.decoder_class:
        raise ValueError(
            f"AutoModelForCausalLM makes {class_with_memory.decoder_class.__name__} of {type(model.config).__name__}, "
            f"the model is a {type(model).__name__}: with memory it could be saved, but not loaded"
        )
    check_blocks(model, config)
    config_with_memory = with_memory_section(model.config, asdict(config))
    model.replaced_ffns = insert_memory(model, config)
    model.attached_dtype = model.dtype
    _give_config(model, config_with_memory)
    model.__class__ = class_with_memory
    model.add_model_tags(TAG)
    return model


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """Make a value of size 1, read by one head, as loud as the block beside it, so that one rate suits every model.

    A memory layer adds ``out(read * silu(gate(x)))``. How large the gate and the block are differs from model to model,
    and from layer to layer. This scales each ``out`` by the root mean square of the block's output over the gate's,
    on text of the kind that the model reads. While the values are zero no logit changes.

    Args:
        model: a model with memory beside blocks (mode "add") whose values are still zero.
        batches: inputs of its forward pass, without padding.

    Returns:
        the factor of each memory layer.

    Raises:
        ValueError: memory stands in a block's place, or something is in the table already.
    """
    layers = _found(model, FeedForwardWithMemory, "memory beside a block")
    if any(bool(table.weight.any()) for table in memory_tables(model).values()):
        raise ValueError("the memory holds something already: another scale would change what it says")
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in layers}
    with ExitStack() as stack:
        for name, layer in layers.items():
            hear = partial(_hear_squares, layer.memory, sums[name])
            stack.callback(layer.ffn.register_forward_hook(hear).remove)
        for batch in batches:
            model(**batch)
    factors = {name: float((block / gate).sqrt()) for name, (block, gate) in sums.items()}
    for name, layer in layers.items():
        layer.memory.out.weight *= factors[name]
    return factors


def _hear_squares(memory: MemoryLayer, sums: Tensor, _ffn: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
    """Add up the mean squares of a block's output and of the gate beside it."""
    output = output[0] if isinstance(output, tuple) else output
    gate = F.silu(memory.gate(inputs[0].to(memory.gate.weight.dtype)))
    sums += torch.stack([output.double().square().mean(), gate.double().square().mean()]).cpu()


def remove_memory(model: PreTrainedModel) -> PreTrainedModel:
    """Undo ``add_memory`` in place and return the model: its class, its config and its blocks, bit for bit.

    Raises:
        ValueError: the model has no memory, a finetuner is attached to it, or it was loaded with feed-forward blocks
            replaced, which are then not at hand.
    """
    if not isinstance(model, MemoryDecoder):
        raise ValueError(f"{type(model).__name__} has no memory to remove")
    if any(isinstance(table, MemoryTable) and table.rows is not None for table in model.modules()):
        raise ValueError("a finetuner is attached to the memory: detach it before removing the memory")
    converted = model.dtype if model.dtype != model.attached_dtype else None
    extract_memory(model, MemoryConfig.from_dict(model.config.memory), model.replaced_ffns, converted)
    model.model_tags = [tag for tag in model.model_tags if tag != TAG] or None
    model.__class__ = model.decoder_class
    _give_config(model, without_memory_section(model.config))
    del model.replaced_ffns, model.attached_dtype
    return model


def _give_config(model: nn.Module, config: PreTrainedConfig) -> None:
    """Replace the config of a model and of its blocks put aside, not in it: others may be built from the same."""
    replaced = model.config
    aside = (module for ffn in model.replaced_ffns.values() for module in ffn.modules())
    for module in (*model.modules(), *aside):
        if getattr(module, "config", None) is replaced:
            module.config = config


def memory_layers(model: nn.Module) -> dict[str, MemoryLayer]:
    """The memory layers of a model, wrapped or not, by ``plain_name`` in the order they run.

    Raises:
        ValueError: the model has none.
    """
    return {plain_name(name): layer for name, layer in _found(model, MemoryLayer, "memory layer").items()}


def memory_tables(model: nn.Module) -> dict[str, MemoryTable]:
    """The tables of a model, wrapped or not, by ``plain_name``, e.g. ``model.memory.0``.

    Raises:
        ValueError: the model has none.
    """
    return {plain_name(name): table for name, table in _found(model, MemoryTable, "memory table").items()}


def unsharded_tables(model: nn.Module) -> dict[str, MemoryTable]:
    """``memory_tables`` of a model of which this process holds every row.

    Raises:
        ValueError: the model has none, or FSDP has sharded it.
    """
    refuse_sharded(model)
    return memory_tables(model)


def refuse_sharded(model: nn.Module) -> None:
    """Refuse a model that FSDP has sharded: row numbers in a shard are not slots.

    Raises:
        ValueError: it is such a model.
    """
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh"):  # a DTensor
            raise ValueError(
                f"{plain_name(name)} is sharded over {parameter.device_mesh.size()} processes by FSDP: rows are chosen "
                "and patches made only where each process holds the whole model, as DistributedDataParallel does"
            )


def refuse_split(model: nn.Module) -> None:
    """Refuse a model of whose tables this process holds some columns.

    Raises:
        ValueError: it is such a model.
    """
    for name, table in memory_tables(model).items():
        if table.columns is not None:
            raise ValueError(
                f"table {name!r} is shared by {table.columns.ranks.size} processes by columns, and this takes a whole "
                "one: call memlayer.decoders.split.join_tables first"
            )


def plain_name(name: str) -> str:
    """A module's name without what DistributedDataParallel, torch.compile and PEFT put before it."""
    return name.replace("_orig_mod.", "").removeprefix("module.").removeprefix("base_model.model.")


def _found(model: nn.Module, kind: type[nn.Module] | UnionType, words: str) -> dict[str, nn.Module]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no {words}; attach one with add_memory(model, MemoryConfig(...))")
    return found


def memory_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that memory brought: tables, product keys, gates and outputs, by name in the state dict.

    Of a control, those that it brought in the memory's place.
    """
    layers = _found(model, MemoryLayer | DenseBlock, "memory layer")
    modules = layers | {name: module for name, module in model.named_modules() if isinstance(module, MemoryTable)}
    return {f"{name}.{inner}": p for name, m in modules.items() for inner, p in m.named_parameters()}


class _AllHeard(Exception):
    """The last memory layer of a forward pass was heard: what comes after it reads nothing."""


class Reads:
    """What the memory layers read in the forward passes since the last question, or before it if none followed."""

    def __init__(self, table_of_layer: dict[str, str]):
        self._table_of_layer = table_of_layer
        self._slots: dict[str, list[Tensor]] = {}
        self._asked = False
        self._last: int | None = None  # how many reads a forward pass has that may end with the last of them

    def store(self, layer: str, slots_THK: Tensor) -> None:
        """Keep one layer's slots of one forward pass, shape (tokens of the batch, H, K)."""
        if self._asked:
            self._slots, self._asked = {}, False
        self._slots.setdefault(layer, []).append(slots_THK.flatten(1))
        if self._last is not None and sum(map(len, self._slots.values())) == self._last:
            raise _AllHeard

    def run(self, model: nn.Module, **inputs) -> None:
        """A forward pass of ``model`` for its reads alone, for many batches: all but the first end with the last read.

        The first runs to its end, to count the reads: a decoder may go through a layer several times.
        """
        with suppress(_AllHeard):
            model(**inputs)
        if self._last is None:
            self._last = sum(map(len, self._slots.values()))

    @property
    def passes(self) -> int:
        """How many forward passes ran."""
        return max(map(len, self._slots.values()), default=0)

    def slots(self, mask: Tensor) -> dict[str, Tensor]:
        """Slots read at the positions of ``mask``, per table.

        Args:
            mask: bool or int, shape (batch, sequence): the positions that count, padding zero. After several forward
                passes, the positions of all one after the other.

        Returns:
            per table name, int64 (positions counted * layers of the table, H * K).

        Raises:
            ValueError: no forward pass ran, or the mask has another number of positions.
        """
        if not self._slots:
            raise ValueError("no reads recorded: run the model forward inside record_reads first")
        chosen: dict[str, list[Tensor]] = {}
        for layer, parts in self._slots.items():
            slots_TK = parts[0] if len(parts) == 1 else torch.cat(parts)
            if mask.numel() != len(slots_TK):
                several = f"the {len(parts)} forward passes since the last question"
                passes = "the forward pass" if len(parts) == 1 else several
                raise ValueError(f"mask has {mask.numel()} positions, {passes} had {len(slots_TK)}")
            chosen.setdefault(self._table_of_layer[layer], []).append(slots_TK[mask.reshape(-1).bool()])
        self._asked = True
        return {table: torch.cat(parts) for table, parts in chosen.items()}


def in_backward() -> bool:
    """Whether a backward pass runs: what activation checkpointing runs again in it has been heard before."""
    return torch._C._current_graph_task_id() != -1


@contextmanager
def record_reads(model: nn.Module) -> Iterator[Reads]:
    """Listen to the product keys of ``model`` while the context lasts; see ``Reads``."""
    name_of_table = {id(table): name for name, table in memory_tables(model).items()}
    layers = memory_layers(model)
    reads = Reads({name: name_of_table[id(layer.table)] for name, layer in layers.items()})

    def listener(name):
        def hear(slots_THK: Tensor) -> None:
            if not in_backward():
                reads.store(name, slots_THK)

        return hear

    with ExitStack() as listening:
        for name, layer in layers.items():
            listening.enter_context(layer.keys.heard_by(listener(name)))
        yield reads
