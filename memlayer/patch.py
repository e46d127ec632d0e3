"""A memory patch: the rows that a learning run changed, and what they were before.

Rows are stored as values, not as differences, and applying or reverting copies them, so both are exact
to the bit in any dtype. A patch refuses a model whose rows are not the ones it expects.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from memlayer.attach import memory_tables

CONFIG_FILE, ROWS_FILE = "memory_patch_config.json", "memory_patch.safetensors"
FORMAT = ("MEMORY_PATCH", 1)  # type and version of the format


@dataclass
class TablePatch:
    """Changed rows of one table: slots (R,) ascending int64, rows and originals (R, V)."""

    slots: Tensor
    rows: Tensor
    originals: Tensor

    @classmethod
    def of_changed(cls, slots: Tensor, rows: Tensor, originals: Tensor) -> "TablePatch":
        """Leave out the rows that are their originals to the bit: a step may select a row and not move it."""
        changed = (_bits(rows) != _bits(originals)).any(dim=1)
        return cls(slots[changed], rows[changed], originals[changed])


@dataclass
class MemoryPatch:
    """The rows a learning run changed, per table name, with where they come from."""

    tables: dict[str, TablePatch]
    provenance: dict = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Rows changed over all tables."""
        return sum(len(t.slots) for t in self.tables.values())

    def apply(self, model: nn.Module) -> None:
        """Write the rows into ``model``.

        Raises:
            ValueError: the model lacks a table, or its rows are not the originals; nothing is written then.
        """
        self._write(model, "originals", "rows")

    def revert(self, model: nn.Module) -> None:
        """Write the originals back.

        Raises:
            ValueError: the model lacks a table, or its rows are not the patch's; nothing is written then.
        """
        self._write(model, "rows", "originals")

    @torch.no_grad()
    def _write(self, model: nn.Module, expected: str, written: str) -> None:
        tables = memory_tables(model)
        for name, patch in self.tables.items():
            if name not in tables:
                raise ValueError(f"the patch changes table {name!r}, the model has {sorted(tables)}")
            weight = tables[name].weight
            if patch.rows.shape[1:] != weight.shape[1:] or (
                len(patch.slots) and int(patch.slots[-1]) >= len(weight)
            ):
                raise ValueError(
                    f"the patch has rows of width {patch.rows.shape[1]} up to slot {patch.slots[-1:].tolist()}, "
                    f"table {name!r} is {tuple(weight.shape)}"
                )
            found, wanted = weight[patch.slots], getattr(patch, expected).to(weight.device)
            if found.dtype != wanted.dtype:
                raise ValueError(f"the patch is in {wanted.dtype}, table {name!r} in {found.dtype}")
            differ = patch.slots[(_bits(found) != _bits(wanted)).any(dim=1).to(patch.slots.device)]
            if len(differ):
                raise ValueError(
                    f"{len(differ)} of {len(patch.slots)} rows of table {name!r} are not the patch's {expected}, "
                    f"first at slot {int(differ[0])}: the patch belongs to another model or state"
                )
        for name, patch in self.tables.items():
            weight = tables[name].weight
            weight.index_copy_(0, patch.slots.to(weight.device), getattr(patch, written).to(weight.device))

    def save(self, folder: str | Path) -> None:
        """Write the patch as ``memory_patch.safetensors`` and ``memory_patch_config.json``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{name}.{part}": getattr(patch, part).contiguous()
            for name, patch in self.tables.items()
            for part in ("slots", "rows", "originals")
        }
        save_file(tensors, folder / ROWS_FILE, metadata={"format": "pt"})
        config = {
            "patch_type": FORMAT[0],
            "format_version": FORMAT[1],
            "sha256": hashlib.sha256((folder / ROWS_FILE).read_bytes()).hexdigest(),
            "tables": {
                name: {"num_rows": len(p.slots), "width": p.rows.shape[1], "dtype": str(p.rows.dtype)}
                for name, p in self.tables.items()
            },
            "provenance": self.provenance,
        }
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "MemoryPatch":
        """Read a patch.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the config is not a memory patch's, or the rows are not the ones it was saved with.
        """
        folder = Path(folder)
        for name in (CONFIG_FILE, ROWS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"no memory patch in {folder}: {name} is missing")
        config = _read_config(folder / CONFIG_FILE)
        found = hashlib.sha256((folder / ROWS_FILE).read_bytes()).hexdigest()
        if found != config["sha256"]:
            raise ValueError(f"{folder / ROWS_FILE} has SHA-256 {found}, its config says {config['sha256']}")
        tensors = load_file(folder / ROWS_FILE)
        tables = {
            name: TablePatch(*(tensors[f"{name}.{part}"] for part in ("slots", "rows", "originals")))
            for name in config["tables"]
        }
        return cls(tables, config["provenance"])


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    found = (config.get("patch_type"), config.get("format_version")) if isinstance(config, dict) else config
    if found != FORMAT:
        raise ValueError(f"{path} says {found}, a memory patch says {FORMAT}")
    return config


def _bits(rows: Tensor) -> Tensor:
    """The rows as integers, so that NaN equals itself and 0.0 does not equal -0.0."""
    return rows.contiguous().view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    )


def state_fingerprint(model: nn.Module) -> str:
    """SHA-256 over every tensor of the model's state dict, names included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
