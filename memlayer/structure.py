"""Where a decoder keeps its feed-forward blocks, found by looking; memory put there and taken out again.

No table of model families: a decoder is a list of as many layers as its config says, each with one block under
a known name that takes hidden states and nothing else. What does not look like that is refused with what was
looked for, since a wrong guess would train the wrong thing without a word.
"""

import inspect

from torch import nn

from memlayer.memory import FeedForwardWithMemory, MemoryLayer, MemoryTable, MemoryTables
from memlayer.memory_config import MemoryConfig

# What Hugging Face decoders call their feed-forward block; the first of these that every layer has is taken.
FFN_NAMES = ("mlp", "feed_forward", "ffn")


def decoder_layers(model: nn.Module) -> tuple[nn.ModuleList, str]:
    """The layers of a decoder and the name of their feed-forward block.

    Raises:
        ValueError: no such layers, more than one list of them, an encoder beside the decoder, a model without a
            language modelling head, or blocks that take more than hidden states.
    """
    kind, config = type(model).__name__, getattr(model, "config", None)
    num_layers = getattr(config, "num_hidden_layers", None)
    looked_for = f"a list of {num_layers} layers (config.num_hidden_layers) with a block named {' or '.join(FFN_NAMES)}"
    if config is not None and num_layers is None:
        raise ValueError(f"no place for memory in {kind}: its {type(config).__name__} has no num_hidden_layers")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} has an encoder: memory is attached to decoders only")
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and _ffn_name(module)
    }
    if len(found) != 1:
        where = f"found {', '.join(found)}" if found else "found none"
        raise ValueError(f"no place for memory in {kind}: looked for {looked_for}, {where}")
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise ValueError(f"{kind} has no language modelling head: attach memory to a causal language model")
    ((where, layers),) = found.items()
    name = _ffn_name(layers)
    _check_takes_hidden_states_only(getattr(layers[0], name), f"{kind}.{where}.0.{name}")
    return layers, name


def _ffn_name(layers: nn.ModuleList) -> str | None:
    for name in FFN_NAMES:
        if len(layers) and all(isinstance(getattr(layer, name, None), nn.Module) for layer in layers):
            return name
    return None


def _check_takes_hidden_states_only(ffn: nn.Module, where: str) -> None:
    parameters = inspect.signature(ffn.forward).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(needed) != 1:
        raise ValueError(f"{where} takes {', '.join(needed)}: memory stands in for blocks that take hidden states only")


def insert_memory(model: nn.Module, config: MemoryConfig) -> dict[int, nn.Module]:
    """Put memory layers into the layers named, and their tables on the model as ``model.memory``.

    Returns:
        the feed-forward blocks that were replaced, by layer; none with mode "add".

    Raises:
        ValueError: the model is not a decoder that memory fits, or a layer does not exist or is named twice.
    """
    layers, ffn_name = decoder_layers(model)
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
    replaced = {}
    for position, index in enumerate(config.layers):
        table = tables[0 if config.share else position]
        memory = MemoryLayer(width, table, config.num_keys, config.num_heads, config.top_k, config.key_width)
        ffn = getattr(layers[index], ffn_name)
        block = memory if config.mode == "replace" else FeedForwardWithMemory(ffn, memory)
        reference = next(ffn.parameters())
        setattr(layers[index], ffn_name, block.to(reference.device, reference.dtype).train(ffn.training))
        if config.mode == "replace":
            replaced[index] = ffn
    model.memory = MemoryTables(tables).to(reference.device, reference.dtype).train(model.training)
    return replaced


def extract_memory(model: nn.Module, config: MemoryConfig, replaced: dict[int, nn.Module]) -> None:
    """Undo ``insert_memory``; blocks that were replaced come back where and in the dtype the memory layer is.

    Raises:
        ValueError: a replaced block is not at hand; the model is left as it was.
    """
    layers, ffn_name = decoder_layers(model)
    originals = {}
    for index in config.layers:
        block = getattr(layers[index], ffn_name)
        if isinstance(block, FeedForwardWithMemory):
            originals[index] = block.ffn
        elif index in replaced:
            reference = block.out.weight
            originals[index] = replaced[index].to(reference.device, reference.dtype).train(block.training)
        else:
            raise ValueError(
                f"the feed-forward block that memory replaced in layer {index} was not saved with the model: "
                "load the base model instead"
            )
    for index, ffn in originals.items():
        setattr(layers[index], ffn_name, ffn)
    del model.memory
