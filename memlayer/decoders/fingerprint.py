"""What a model holds as SHA-256: equal only where every name, shape, dtype and bit is."""

import hashlib
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from memlayer.decoders.attach import memory_layers, memory_tables


def bits(rows: Tensor) -> Tensor:
    """The numbers as integers, so that NaN equals itself and 0.0 does not equal -0.0."""
    return rows.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()])


def _whole(_name: str, tensor: Tensor) -> Iterable[Tensor]:
    return (tensor,)


def fingerprint(tensors: Mapping[str, Tensor], numbers: Callable[[str, Tensor], Iterable[Tensor]] = _whole) -> str:
    """SHA-256 over names, dtypes, shapes and bytes; the order of the tensors does not matter.

    Args:
        numbers: from name and tensor to its numbers in order, in one part or in several.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        for part in numbers(name, tensor):
            digest.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def state_fingerprint(model: nn.Module) -> str:
    """SHA-256 over every tensor of the model's state dict."""
    return fingerprint(model.state_dict())


def product_key_fingerprints(model: nn.Module) -> dict[str, dict[str, str]]:
    """SHA-256 of each number that decides which slot a hidden state reads: query, norm and half-keys.

    Returns:
        per table name: parameter name -> SHA-256, over all layers that read the table.
    """
    name_of_table = {id(table): name for name, table in memory_tables(model).items()}
    found: dict[str, dict[str, str]] = {name: {} for name in name_of_table.values()}
    for layer_name, layer in memory_layers(model).items():
        parameters = layer.keys.state_dict(prefix=f"{layer_name}.keys.")
        found[name_of_table[id(layer.table)]] |= {name: fingerprint({name: p}) for name, p in parameters.items()}
    return found


def differing(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Names that only one of the two has, or that have another fingerprint in each."""
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
