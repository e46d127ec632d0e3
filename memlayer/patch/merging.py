"""One patch out of several that were made for the same base model.

A slot that only one patch changes keeps that patch's row to the bit. Where patches give a slot different rows, a
policy decides; left out are weights for the patches and policies that draw at random.

Shapes: P patches, U distinct slots, C of them in conflict, V value width.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from memlayer.decoders.fingerprint import bits, differing
from memlayer.patch.base_model import Base
from memlayer.patch.memory_patch import MemoryPatch
from memlayer.patch.table import BLOCK, TablePatch, named

POLICIES = ("error", "last", "mean", "ties")


def merge(patches: Sequence[MemoryPatch], on_conflict: str = "error", density: float = 0.2) -> MemoryPatch:
    """Merge patches of one base into a patch of that base; the patches stay as they are.

    Args:
        on_conflict: what becomes of a slot for which the patches have different rows.
            "error": refuse. "last": the row of the last patch. "mean": the mean of the rows, in float32 and rounded
            once. "ties": of each patch's change of the row, the largest numbers are kept; the sign of their sum is
            elected for each number; the changes that have it are averaged and added to the original
            (arXiv:2306.01708, with scale 1, each row by itself).
        density: "ties" alone: the share of a row's numbers that is kept, 0 < density <= 1; 0.2 is the paper's.

    Raises:
        ValueError: no patch; an unknown policy or density; patches of different tables, product keys or originals;
            different rows of a slot with "error".
    """
    if not patches:
        raise ValueError("no patch to merge")
    if on_conflict not in POLICIES:
        raise ValueError(f"on_conflict is {on_conflict!r}, must be one of {', '.join(POLICIES)}")
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}, must be above 0 and at most 1")
    _check_siblings(patches)
    names = sorted({name for patch in patches for name in patch.tables})
    tables = {
        name: _merge_table(name, [p.tables[name] for p in patches if name in p.tables], on_conflict, density)
        for name in names
    }
    how = {"on_conflict": on_conflict} | ({"density": density} if on_conflict == "ties" else {})
    parents = [{"fingerprint": patch.fingerprint, "provenance": patch.provenance} for patch in patches]
    provenance = {**shared_provenance(patches), "merge": how, "parents": parents}
    return MemoryPatch(tables, provenance, base_without(patches))


def shared_provenance(patches: Sequence[MemoryPatch]) -> dict:
    """The base that all patches name, as far as they agree."""
    base = {key: patches[0].provenance.get(key) for key in ("base_model", "checkpoint")}
    return {key: b for key, b in base.items() if b and all(p.provenance.get(key) == b for p in patches)}


def base_without(patches: Sequence[MemoryPatch], applied: Sequence[MemoryPatch] = ()) -> Base | None:
    """The base of all patches, but for the ones that were ``applied`` to it; None where no patch knows its base.

    Raises:
        ValueError: they are of different bases.
    """
    bases = [patch.base for patch in patches if patch.base]
    if not all(base.same_weights(bases[0]) for base in bases):
        raise ValueError("the patches were made for models with different weights outside the memory")
    done = {mark for patch in applied for mark in patch.marks}
    had = dict.fromkeys(mark for base in bases for mark in base.patches if mark not in done)
    return replace(bases[0], patches=list(had)) if bases else None


def _check_siblings(patches: Sequence[MemoryPatch]) -> None:
    for above in (patch for patch in patches if patch.base):
        if any(below is not above and set(below.marks) & set(above.base.patches) for below in patches):
            raise ValueError("one of the patches was made on top of another: squash them instead, in their order")


def _merge_table(name: str, parts: list[TablePatch], on_conflict: str, density: float) -> TablePatch:
    for part in parts[1:]:
        check_same_table(name, parts[0], part)
    slots_U = torch.cat([part.slots for part in parts]).unique()
    originals_UV, unlike_U = _overlay(slots_U, parts, "originals")
    if unlike_U.any():
        raise ValueError(
            f"the patches have different originals of {int(unlike_U.sum())} rows of table {name!r}, "
            f"{named(slots_U[unlike_U])}: they were not made for the same base"
        )
    rows_UV, unlike_U = _overlay(slots_U, parts, "rows")
    if unlike_U.any() and on_conflict == "error":
        raise ValueError(
            f"the patches have different rows for {int(unlike_U.sum())} slots of table {name!r}, "
            f"{named(slots_U[unlike_U])}"
        )
    if on_conflict in ("mean", "ties"):
        combine = partial(_ties, density=density) if on_conflict == "ties" else _mean
        for some in unlike_U.nonzero()[:, 0].split(max(1, BLOCK // rows_UV.shape[1] // len(parts))):
            rows_PCV, has_PC = _rows_at(slots_U[some], parts)
            rows_UV[some] = combine(rows_PCV, has_PC, _wide(originals_UV[some])).to(rows_UV.dtype)
    first = parts[0]
    return TablePatch.of_changed(
        slots_U,
        rows_UV,
        originals_UV,
        num_slots=first.num_slots,
        product_keys=first.product_keys,
        lessons=lessons_of(parts),
        **protection(parts, "amax"),
    )


def protection(parts: list[TablePatch], of_several: str) -> dict[str, Tensor]:
    """Every slot that a part protects; "amax" keeps the strongest of siblings, "sum" adds up a chain."""
    slots_P, at = torch.cat([part.protected_slots for part in parts]).unique(return_inverse=True)
    documents = torch.cat([part.protected_documents for part in parts])
    documents_P = torch.zeros_like(slots_P).scatter_reduce_(0, at, documents, of_several)
    return {"protected_slots": slots_P, "protected_documents": documents_P}


def lessons_of(parts: list[TablePatch]) -> dict[str, Tensor]:
    """The slots that each lesson wrote in any of the parts."""
    written: dict[str, list[Tensor]] = {}
    for part in parts:
        for lesson, slots in part.lessons.items():
            written.setdefault(lesson, []).append(slots)
    return {lesson: torch.cat(slots).unique() for lesson, slots in written.items()}


def check_same_table(name: str, one: TablePatch, other: TablePatch) -> None:
    """Refuse patches of tables of different sizes, dtypes or product keys with a ValueError."""
    sizes = [(part.num_slots, part.rows.shape[1], part.rows.dtype) for part in (one, other)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"table {name!r} has slots, width and dtype {sizes[0]} in one patch, {sizes[1]} in another")
    if unlike := differing(one.product_keys, other.product_keys):
        raise ValueError(f"the patches were made for different product keys at {', '.join(unlike)}")


def _overlay(slots_U: Tensor, parts: list[TablePatch], which: str) -> tuple[Tensor, Tensor]:
    """Rows (U, V), the last part's where several have one, and the slots (U,) for which they are not all the same."""
    first = getattr(parts[0], which)
    rows_UV = first.new_zeros(len(slots_U), first.shape[1])
    seen_U, unlike_U = torch.zeros(2, len(slots_U), dtype=torch.bool)
    for part in parts:
        at, rows = torch.searchsorted(slots_U, part.slots), getattr(part, which)
        unlike_U[at] |= seen_U[at] & (bits(rows_UV[at]) != bits(rows)).any(dim=1)
        seen_U[at], rows_UV[at] = True, rows
    return rows_UV, unlike_U


def _wide(rows: Tensor) -> Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _rows_at(slots_C: Tensor, parts: list[TablePatch]) -> tuple[Tensor, Tensor]:
    """Each patch's rows (P, C, V) at these slots, zero where it has none, and which it has, bool (P, C)."""
    parts = [part for part in parts if len(part.slots)]
    at_PC = torch.stack([torch.searchsorted(part.slots, slots_C).clamp_(max=len(part.slots) - 1) for part in parts])
    has_PC = torch.stack([part.slots[at_C] == slots_C for part, at_C in zip(parts, at_PC, strict=True)])
    rows_PCV = torch.stack([_wide(part.rows[at_C]) for part, at_C in zip(parts, at_PC, strict=True)])
    return rows_PCV.masked_fill_(~has_PC[..., None], 0.0), has_PC


def _mean(rows_PCV: Tensor, has_PC: Tensor, _originals_CV: Tensor) -> Tensor:
    return rows_PCV.sum(dim=0) / has_PC.sum(dim=0)[:, None]


def _ties(rows_PCV: Tensor, has_PC: Tensor, originals_CV: Tensor, density: float) -> Tensor:
    changes_PCV = (rows_PCV - originals_CV).masked_fill_(~has_PC[..., None], 0.0)
    largest = changes_PCV.abs().topk(int(density * changes_PCV.shape[-1]), dim=-1).indices
    trimmed_PCV = torch.zeros_like(changes_PCV).scatter_(-1, largest, changes_PCV.gather(-1, largest))
    elected_CV = torch.where(trimmed_PCV.sum(dim=0) >= 0, 1.0, -1.0)
    agrees_PCV = trimmed_PCV.sign() == elected_CV
    return originals_CV + (trimmed_PCV * agrees_PCV).sum(dim=0) / agrees_PCV.sum(dim=0).clamp(min=1)
