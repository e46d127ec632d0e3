"""A memory patch: the rows that a learning run changed, and what they were before.

Rows are stored as values, not as differences, and applying or reverting copies them, so both are exact
to the bit in any dtype. A patch refuses a model whose rows, product keys or other weights are not those of the model
that it was made for; how far it looks at the other weights is in ``memlayer.patch.base_model``.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from torch import nn

from memlayer.decoders.attach import refuse_split, unsharded_tables
from memlayer.decoders.fingerprint import differing, fingerprint, product_key_fingerprints
from memlayer.layers.memory import MemoryTable
from memlayer.patch import card, files
from memlayer.patch.base_model import Base, mark
from memlayer.patch.table import TablePatch, named
from memlayer.slots.counts import SlotCounts


@dataclass(eq=False)
class MemoryPatch(ModelHubMixin, library_name="memlayer"):
    """The rows a learning run changed.

    ``save_pretrained`` and ``push_to_hub`` are huggingface_hub's own.

    Attributes:
        tables: changed rows by table name.
        provenance: where they come from, anything that JSON can hold. The model card names the ``base_model``, a
            model on the Hub, or the ``checkpoint``, a folder.
        base: what is known of the model that the patch is made for, see ``memlayer.patch.base_model``.
    """

    tables: dict[str, TablePatch]
    provenance: dict = field(default_factory=dict)
    base: Base | None = None

    def __post_init__(self):
        # The mixin keeps constructor arguments to write them as config.json, which a patch does not have.
        self._hub_mixin_config = None

    @classmethod
    def between(cls, before: nn.Module, after: nn.Module, provenance: dict | None = None) -> "MemoryPatch":
        """The patch that takes the tables of one model to those of another.

        Numbers outside the tables are not looked at, but for the product keys.

        Raises:
            ValueError: the models' tables differ in name, shape or dtype, or their product keys differ.
        """
        for model in (before, after):
            refuse_split(model)
        tables, others = unsharded_tables(before), unsharded_tables(after)
        if tables.keys() != others.keys():
            raise ValueError(f"one model has tables {sorted(tables)}, the other {sorted(others)}")
        keys, other_keys = product_key_fingerprints(before), product_key_fingerprints(after)
        changed = {}
        for name, table in tables.items():
            if other := differing(keys[name], other_keys[name]):
                raise ValueError(f"the models have other product keys at {', '.join(other)}: slots mean other things")
            one, two = table.weight.detach(), others[name].weight.detach()
            if (one.shape, one.dtype) != (two.shape, two.dtype):
                raise ValueError(
                    f"table {name!r} is {tuple(one.shape)} {one.dtype} in one model, "
                    f"{tuple(two.shape)} {two.dtype} in the other"
                )
            changed[name] = TablePatch.between(one, two, keys[name])
        return cls(changed, provenance or {}, Base.of(before))

    @property
    def num_rows(self) -> int:
        """Rows changed over all tables."""
        return sum(len(t.slots) for t in self.tables.values())

    @property
    def fingerprint(self) -> str:
        """SHA-256 over slots, rows and originals of all tables."""
        return fingerprint(files.tensors_of(self.tables))

    @property
    def marks(self) -> list[str]:
        """Fingerprints of the patches that a model has once this one is applied to it; none where it has no row."""
        if not self.num_rows:
            return []
        return [part["fingerprint"] for part in card.parts_of(self.provenance, "squash")] or [self.fingerprint]

    def describe(self) -> str:
        """What the patch changes and where it comes from, a few lines for people."""
        return card.describe(self.tables, self.provenance, self.base)

    def apply(self, model: nn.Module, any_base: bool = False) -> None:
        """Write the rows into ``model``; into a copy of the patch's model in another dtype, rounded to that.

        Args:
            any_base: also where the model has other weights outside the memory than the patch's, or lacks a patch
                that the patch was made on top of.

        Raises:
            ValueError: the model lacks a table, has other product keys or other weights, its rows are not the
                originals, or the rows are not finite; nothing is written then.
        """
        tables = unsharded_tables(model)
        fitting = self._fitting(tables)
        for name, patch in fitting.items():
            patch.check_finite(name)
        self._check_model(model, tables, any_base)
        self._write(fitting, tables, "originals", "rows")
        mark(model, self.marks, had=True)

    def revert(self, model: nn.Module) -> None:
        """Write the originals back.

        Raises:
            ValueError: the model lacks a table, or its rows are not the patch's; nothing is written then.
        """
        tables = unsharded_tables(model)
        self._write(self._fitting(tables), tables, "rows", "originals")
        mark(model, self.marks, had=False)

    def _fitting(self, tables: Mapping[str, MemoryTable]) -> dict[str, TablePatch]:
        """The table patches in the dtypes of the model's tables, to which they fit in shape."""
        fitting = {}
        for name, patch in self.tables.items():
            if name not in tables:
                raise ValueError(f"the patch changes table {name!r}, the model has {sorted(tables)}")
            fitting[name] = patch.to(tables[name].weight.dtype)
            fitting[name].check_shape(name, tables[name])
        return fitting

    def _check_model(self, model: nn.Module, tables: Mapping[str, MemoryTable], any_base: bool) -> None:
        """Whether the rows mean in this model what they were made to mean."""
        check_base = self.base is not None and not any_base
        product_keys = product_key_fingerprints(model)
        for name, patch in self.tables.items():
            ours, theirs = patch.rows.dtype, tables[name].weight.dtype
            if ours == theirs:
                patch.check_keys(product_keys[name])
            elif not check_base:  # which compares the product keys as well, rounded
                raise ValueError(
                    f"the patch is in {ours}, table {name!r} in {theirs}: rows are rounded only for a copy of the "
                    "model that the patch was made for, and which that is is not known or not asked"
                )
        if check_base:
            self.base.check(model)

    @torch.no_grad()
    def _write(
        self, fitting: dict[str, TablePatch], tables: Mapping[str, MemoryTable], expected: str, written: str
    ) -> None:
        if not _held(fitting, tables, expected) and _held(fitting, tables, written):
            state = "applied already" if written == "rows" else "not applied"
            raise ValueError(f"the patch is {state}: the model holds its {written} at all {self.num_rows} slots")
        for name, patch in fitting.items():
            patch.check_rows(name, tables[name], expected)
        for name, patch in fitting.items():
            patch.write(tables[name], written)

    def protect(self, counts: Mapping[str, SlotCounts]) -> dict[str, SlotCounts]:
        """The background counts of a model that takes this patch: what the patch protects is protected in them.

        A learning run over the patched model then keeps away from these slots as the run that made the patch did.

        Raises:
            ValueError: these are not the counts that the patch was made with.
        """
        return self._protect(counts, 1)

    def unprotect(self, counts: Mapping[str, SlotCounts]) -> dict[str, SlotCounts]:
        """Undo ``protect`` to the last bit."""
        return self._protect(counts, -1)

    def _protect(self, counts: Mapping[str, SlotCounts], sign: int) -> dict[str, SlotCounts]:
        changed = dict(counts)
        for name, patch in self.tables.items():
            if len(patch.protected_slots):
                if name not in counts:
                    raise ValueError(f"the patch protects slots of table {name!r}, the counts have {sorted(counts)}")
                changed[name] = counts[name].raised(patch.protected_slots, sign * patch.protected_documents)
        return changed

    @property
    def protects(self) -> bool:
        """Whether the run that made the patch protected anything."""
        return any(len(patch.protected_slots) for patch in self.tables.values())

    def save(self, folder: str | Path) -> None:
        """Write the patch as ``memory_patch.safetensors``, ``memory_patch_config.json`` and a model card.

        Cut short at any moment, it leaves a patch that was in the folder before, or this one.

        Raises:
            ValueError: rows are not finite; nothing is written then.
        """
        for name, patch in self.tables.items():
            patch.check_finite(name)
        files.write(Path(folder), self.tables, self.provenance, self.base, str(self.generate_model_card()))

    @classmethod
    def load(cls, folder: str | Path) -> "MemoryPatch":
        """Read a patch.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the files are not a memory patch's, or not as they were written.
        """
        return cls(*files.read(Path(folder)))

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, *, revision: str | None = None, **download) -> "MemoryPatch":
        """Read a patch from a folder, or from the Hub by its name there.

        Args:
            download: ``token``, ``cache_dir``, ``force_download`` and whatever else ``snapshot_download`` takes.
        """
        folder = Path(name_or_folder)
        if not folder.is_dir():
            wanted = [files.CONFIG_FILE, files.ROWS_FILE]
            folder = snapshot_download(str(name_or_folder), revision=revision, allow_patterns=wanted, **download)
        return cls.load(folder)

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save(save_directory)

    def generate_model_card(self, *_args, **_kwargs) -> ModelCard:
        """The README.md that is saved with the patch."""
        return card.model_card(self.tables, self.provenance)


def _held(fitting: Mapping[str, TablePatch], tables: Mapping[str, MemoryTable], part: str) -> bool:
    return all(bool(patch.held(tables[name], part).all()) for name, patch in fitting.items())


@contextmanager
def patches(model: nn.Module, in_order: Sequence[MemoryPatch], any_base: bool = False) -> Iterator[nn.Module]:
    """Apply patches one after the other, and take them back when the context ends, however it ends.

    A row that is changed inside the context stays as it was changed; every other row is taken back.

    Raises:
        ValueError: a patch does not fit what the ones before it made of the model; those are taken back. Or rows were
            changed inside; where the context ends by an error of its own, that one is raised and has this as a note.
    """
    tables, applied = unsharded_tables(model), []
    try:
        for patch in in_order:
            patch.apply(model, any_base)
            applied.append(patch)
        yield model
    except BaseException as error:
        if changed := _take_back(model, tables, applied):
            error.add_note(changed)
        raise
    if changed := _take_back(model, tables, applied):
        raise ValueError(changed)


@torch.no_grad()
def _take_back(model: nn.Module, tables: Mapping[str, MemoryTable], applied: Sequence[MemoryPatch]) -> str:
    """Revert the rows that are as the patches left them; a sentence about the others, empty where there are none."""
    changed: dict[str, set[int]] = {}
    for patch in reversed(applied):
        mark(model, patch.marks, had=False)
        for name, table_patch in patch.tables.items():
            table_patch = table_patch.to(tables[name].weight.dtype)
            held_R = table_patch.held(tables[name], "rows")
            table_patch.write(tables[name], "originals", held_R)
            if not held_R.all():
                changed.setdefault(name, set()).update(table_patch.slots[~held_R].tolist())
    rows = [f"{len(slots)} of table {name!r} {named(torch.tensor(sorted(slots)))}" for name, slots in changed.items()]
    return f"rows changed while the patches were applied, {'; '.join(rows)}: they stay as they are" if rows else ""
