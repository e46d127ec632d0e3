"""What a run that moves single numbers changed: their places, what stands there now and what stood there before.

A memory patch (memlayer/patch) is the same for whole rows of a table; this is for numbers anywhere in a model, at
twelve bytes a number in float32 and eight in bfloat16. A delta goes on and off to the last bit, and only over the
numbers that it was made for.

Shapes: C numbers changed in one tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from memlayer.decoders.fingerprint import bits
from memlayer.files import reading, write_file

FORMAT = "memlayer sparse delta 1"


@dataclass(frozen=True)
class Changed:
    """The numbers of one tensor that changed.

    Attributes:
        indices: int32, shape (C,), ascending places in the tensor, flattened.
        values, originals: shape (C,), of the tensor's dtype: what stands there with the delta, and without.
    """

    indices: Tensor
    values: Tensor
    originals: Tensor


PARTS = tuple(field.name for field in fields(Changed))


@dataclass(frozen=True)
class SparseDelta:
    """Single numbers of a model's parameters that a run changed.

    Attributes:
        tensors: by the parameter's name in ``model.named_parameters()``.
    """

    tensors: Mapping[str, Changed]

    @classmethod
    def between(cls, parameters: Mapping[str, Tensor], indices: Mapping[str, Tensor], originals: Mapping[str, Tensor]):
        """What changed among the chosen numbers; those whose bits are what they were are left out.

        Args:
            parameters: contiguous tensors as they are now.
            indices: per tensor, int32, the places chosen, ascending.
            originals: per tensor, what stood there.
        """
        tensors = {}
        for name, index_C in indices.items():
            values_C = parameters[name].detach().view(-1)[index_C]
            moved_C = bits(values_C) != bits(originals[name])
            if moved_C.any():
                parts = (each[moved_C].cpu() for each in (index_C, values_C, originals[name]))
                tensors[name] = Changed(*parts)
        return cls(tensors)

    @property
    def num_numbers(self) -> int:
        """How many numbers it changes."""
        return sum(len(changed.indices) for changed in self.tensors.values())

    def apply(self, model: nn.Module) -> None:
        """Put the new numbers in.

        Raises:
            ValueError: the model lacks a tensor, or holds other numbers than the delta was made over; nothing is
                changed then.
        """
        self._exchange(model, "originals", "values")

    def revert(self, model: nn.Module) -> None:
        """Put the numbers back that stood there before, to the last bit.

        Raises:
            ValueError: the model holds other numbers than the delta's; nothing is changed then.
        """
        self._exchange(model, "values", "originals")

    @torch.no_grad()
    def _exchange(self, model: nn.Module, expected: str, wanted: str) -> None:
        parameters = dict(model.named_parameters())
        for name, changed in self.tensors.items():
            _check(name, parameters.get(name), changed, expected)
        for name, changed in self.tensors.items():
            flat = parameters[name].view(-1)
            flat[changed.indices.to(flat.device)] = getattr(changed, wanted).to(flat.device)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: ``NAME.indices``, ``NAME.values`` and ``NAME.originals`` of each tensor."""
        tensors = {f"{name}.{part}": getattr(each, part) for name, each in self.tensors.items() for part in PARTS}
        write_file(path, save(tensors, {"format": FORMAT}))

    @classmethod
    def load(cls, path: str | Path) -> "SparseDelta":
        """Read what ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or no delta.
        """
        with reading(path), safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            if found.get("format") != FORMAT:
                raise ValueError(f"{path} is no sparse delta: its format is {found.get('format')!r}, not {FORMAT!r}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a file is no mapping)
        names = sorted(key.removesuffix(".indices") for key in tensors if key.endswith(".indices"))
        return cls({name: Changed(*(tensors[f"{name}.{part}"] for part in PARTS)) for name in names})


def _check(name: str, parameter: Tensor | None, changed: Changed, expected: str) -> None:
    if parameter is None:
        raise ValueError(f"the delta changes {name}, which the model does not have")
    there = getattr(changed, expected)
    if parameter.dtype != there.dtype:
        raise ValueError(f"the delta's numbers of {name} are {there.dtype}, the model's are {parameter.dtype}")
    if int(changed.indices[-1]) >= parameter.numel():
        raise ValueError(
            f"the delta changes number {int(changed.indices[-1])} of {name}, the model's has {parameter.numel()}"
        )
    found = parameter.view(-1)[changed.indices.to(parameter.device)].cpu()
    if wrong := int((bits(found) != bits(there)).sum()):
        raise ValueError(f"{wrong} of {len(there)} numbers of {name} are not the delta's {expected}")
