"""Where a decoder keeps its feed-forward blocks, found by looking; memory put there and taken out again.

No table of model families: a decoder is a list of as many layers as its config says, each with one block under
a known name that takes hidden states and nothing else. What does not look like that is refused with what was
looked for, since a wrong guess would train the wrong thing without a word.
"""

import inspect
from itertools import chain

import torch
from torch import Tensor, nn

from memlayer.decoders.controls import make
from memlayer.decoders.shuffled_address import ShuffledMemory
from memlayer.layers.config import MemoryConfig
from memlayer.layers.memory import FeedForwardWithMemory, MemoryTables

# What Hugging Face decoders call their feed-forward block; the first of these that every layer has is taken.
FFN_NAMES = ("mlp", "feed_forward", "ffn")
LEAK = 0.05  # of the largest output: half precision rounds less than that


def decoder_layers(model: nn.Module) -> tuple[nn.ModuleList, str]:
    """The layers of a decoder and the name of their feed-forward block.

    Raises:
        ValueError: no such layers, more than one list of them, an encoder beside the decoder, or blocks that take more
            than hidden states.
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
    ((where, layers),) = found.items()
    name = _ffn_name(layers)
    for index, layer in enumerate(layers):
        _check_takes_hidden_states_only(getattr(layer, name), f"{kind}.{where}.{index}.{name}")
    return layers, name


def tables_owner(model: nn.Module) -> nn.Module:
    """The module that holds the layers, and the tables beside them: the base model, or the text model inside it.

    Whoever takes the base model alone, without its head, then has the tables too.
    """
    layers, _ = decoder_layers(model)
    return next(module for module in model.modules() if any(child is layers for child in module.children()))


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


@torch.no_grad()
def check_blocks(model: nn.Module, config: MemoryConfig) -> None:
    """Run a batch of two through each block that gets memory, since a signature does not say what a block does.

    Raises:
        ValueError: a block whose weights are not here, or that does not give hidden states for hidden states, each
            token for itself.
    """
    layers, ffn_name = decoder_layers(model)
    names = {id(module): name for name, module in model.named_modules()}
    for index in (i for i in config.layers if i < len(layers)):
        ffn = getattr(layers[index], ffn_name)
        where = f"{type(model).__name__}.{names[id(ffn)]}"
        if any(tensor.is_meta for tensor in chain(ffn.parameters(), ffn.buffers())):
            raise ValueError(
                f"the weights of {where} are on the meta device, offloaded or not yet loaded: attach memory to a model "
                "that was loaded without offloading"
            )
        _check_output(ffn, where, model, config.mode)


def _check_output(ffn: nn.Module, where: str, model: nn.Module, mode: str) -> None:
    width, generator = model.config.hidden_size, torch.Generator().manual_seed(0)
    hidden_BSD, other_BSD = torch.randn(2, 2, 3, width, generator=generator)
    other_BSD[1, 1] = hidden_BSD[1, 1]
    dtypes = (p.dtype for p in ffn.parameters() if p.is_floating_point() and p.itemsize > 1)  # float8 is quantised
    place = {"device": _device_of(ffn, model), "dtype": next(dtypes, model.dtype)}
    training = {module: module.training for module in ffn.modules()}
    ffn.eval()
    try:
        one, other = ffn(hidden_BSD.to(**place)), ffn(other_BSD.to(**place))
    except Exception as error:
        raise ValueError(f"{where} does not run on hidden states: {str(error).splitlines()[0]}") from error
    finally:
        for module, was in training.items():
            module.training = was
    if isinstance(one, tuple):
        if mode == "replace":
            raise ValueError(f"{where} returns a tuple: memory can stand beside it (mode 'add'), not in its place")
        one, other = one[0], other[0]
    if not isinstance(one, Tensor) or one.shape != hidden_BSD.shape:
        found = tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__
        raise ValueError(f"{where} gives {found} for hidden states of shape {tuple(hidden_BSD.shape)}")
    if (one[1, 1] - other[1, 1]).abs().max() > LEAK * one.abs().max():
        raise ValueError(f"what {where} gives for a token depends on the other tokens of the batch")


def insert_memory(model: nn.Module, config: MemoryConfig) -> dict[int, nn.Module]:
    """Put memory layers, or a control, into the layers named, and tables beside the list of layers, as ``memory``.

    Returns:
        the feed-forward blocks that were replaced, by layer; none with mode "add".

    Raises:
        ValueError: the model is not a decoder that memory fits, a layer does not exist, or there is another "memory".
    """
    layers, ffn_name = decoder_layers(model)
    missing = [i for i in config.layers if not 0 <= i < len(layers)]
    if missing:
        raise ValueError(f"memory layers {list(config.layers)} asked for, the model has layers 0 to {len(layers) - 1}")
    owner = tables_owner(model)
    if hasattr(owner, "memory"):
        raise ValueError(f"{type(owner).__name__} has a memory of its own: there is no place for tables")
    width, dtype = model.config.hidden_size, getattr(torch, config.dtype)
    ffns = {index: getattr(layers[index], ffn_name) for index in config.layers}
    tables, memories = make(width, config)
    blocks = {}  # all are made before one is put in: a refusal leaves the model as it was
    for (index, ffn), memory in zip(ffns.items(), memories, strict=True):
        memory.to(_device_of(ffn, model), dtype).train(ffn.training)
        blocks[index] = memory if config.mode == "replace" else FeedForwardWithMemory(ffn, memory)
        blocks[index].training = ffn.training
    owner.memory = MemoryTables(tables).to(_device_of(ffn, model), dtype).train(model.training)
    for index, memory in zip(ffns, memories, strict=True):
        setattr(layers[index], ffn_name, blocks[index])
        if isinstance(memory, ShuffledMemory):
            memory.keys.listen_to(layers[index])
    return ffns if config.mode == "replace" else {}


def _device_of(ffn: nn.Module, model: nn.Module) -> torch.device:
    """Where the weights of a block are; those of a quantised one may be buffers."""
    return next(chain(ffn.parameters(), ffn.buffers(), model.parameters())).device


def extract_memory(
    model: nn.Module, config: MemoryConfig, replaced: dict[int, nn.Module], dtype: torch.dtype | None = None
) -> None:
    """Undo ``insert_memory``; blocks that were replaced come back where the memory layer is.

    Args:
        replaced: what ``insert_memory`` returned.
        dtype: the model's, if it was converted since: then the blocks are as well.

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
            originals[index] = replaced[index].to(block.out.weight.device, dtype).train(block.training)
        else:
            raise ValueError(
                f"the feed-forward block that memory replaced in layer {index} was not saved with the model: "
                "load the base model instead"
            )
    for index, ffn in originals.items():
        for module in getattr(layers[index], ffn_name).modules():
            if isinstance(module, ShuffledMemory):
                module.keys.detach()
        setattr(layers[index], ffn_name, ffn)
    del tables_owner(model).memory
