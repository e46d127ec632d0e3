"""One patch out of several that were made for the same base model.

A slot that only one patch changes keeps that patch's row to the bit. Where patches give a slot different rows, a
policy decides; left out are weights for the patches and policies that draw at random.

Shapes: P patches that change a slot, U distinct slots, V value width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from memlayer.patch.fingerprint import bits, differing
from memlayer.patch.memory_patch import MemoryPatch
from memlayer.patch.table import TablePatch, named

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
    names = sorted({name for patch in patches for name in patch.tables})
    tables = {
        name: _merge_table(name, [p.tables[name] for p in patches if name in p.tables], on_conflict, density)
        for name in names
    }
    how = {"on_conflict": on_conflict} | ({"density": density} if on_conflict == "ties" else {})
    parents = [{"fingerprint": patch.fingerprint, "provenance": patch.provenance} for patch in patches]
    base = {key: patches[0].provenance.get(key) for key in ("base_model", "checkpoint")}
    shared = {key: b for key, b in base.items() if b and all(p.provenance.get(key) == b for p in patches)}
    return MemoryPatch(tables, {**shared, "merge": how, "parents": parents})


def _merge_table(name: str, parts: list[TablePatch], on_conflict: str, density: float) -> TablePatch:
    for part in parts[1:]:
        _check_same_table(name, parts[0], part)
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
        combine = _mean if on_conflict == "mean" else _ties(density)
        for i in unlike_U.nonzero()[:, 0].tolist():
            rows_PV = torch.cat([part.rows[part.slots == slots_U[i]] for part in parts])
            rows_UV[i] = combine(_wide(rows_PV), _wide(originals_UV[i])).to(rows_UV.dtype)
    first = parts[0]
    return TablePatch.of_changed(
        slots_U, rows_UV, originals_UV, num_slots=first.num_slots, product_keys=first.product_keys
    )


def _check_same_table(name: str, one: TablePatch, other: TablePatch) -> None:
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


def _mean(rows_PV: Tensor, _original_V: Tensor) -> Tensor:
    return rows_PV.mean(dim=0)


def _ties(density: float) -> Callable[[Tensor, Tensor], Tensor]:
    # Here, because peft takes seconds to import and nothing else in this package needs it.
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, magnitude_based_pruning

    def combine(rows_PV: Tensor, original_V: Tensor) -> Tensor:
        changes_PV = torch.stack([magnitude_based_pruning(row_V - original_V, density) for row_V in rows_PV])
        return original_V + disjoint_merge(changes_PV, calculate_majority_sign_mask(changes_PV))

    return combine
