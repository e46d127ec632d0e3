"""One patch out of a chain: yesterday's, today's that was made on top of it, and so on."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from memlayer.decoders.fingerprint import bits
from memlayer.patch.memory_patch import MemoryPatch
from memlayer.patch.merging import base_without, check_same_table, lessons_of, protection, shared_provenance
from memlayer.patch.table import TablePatch, named, within


def squash(patches: Sequence[MemoryPatch]) -> MemoryPatch:
    """One patch that does what the patches do one after the other; they stay as they are.

    Raises:
        ValueError: no patch; patches of different tables, product keys or bases; or a patch whose originals are not
            what the ones before it wrote.
    """
    if not patches:
        raise ValueError("no patch to squash")
    for number, patch in enumerate(patches, start=1):
        for later, above in enumerate(patches[number:], start=number + 1):
            if patch.base and set(above.marks) & set(patch.base.patches):
                raise ValueError(f"patch {number} was made on top of patch {later}: name the oldest first")
    names = sorted({name for patch in patches for name in patch.tables})
    tables = {}
    for name in names:
        whole = None
        for number, patch in enumerate(patches, start=1):
            if name in patch.tables:
                whole = patch.tables[name] if whole is None else _on_top(name, whole, patch.tables[name], number)
        tables[name] = whole
    parts = [{"fingerprint": patch.fingerprint, "provenance": patch.provenance} for patch in patches]
    provenance = {**shared_provenance(patches), "squash": parts}
    return MemoryPatch(tables, provenance, base_without(patches, patches))


def _on_top(name: str, below: TablePatch, above: TablePatch, number: int) -> TablePatch:
    check_same_table(name, below, above)
    slots_U = torch.cat([below.slots, above.slots]).unique()
    at_below, at_above = (torch.searchsorted(slots_U, part.slots) for part in (below, above))
    rows_UV = below.rows.new_zeros(len(slots_U), below.rows.shape[1])
    rows_UV[at_above] = above.originals
    rows_UV[at_below] = below.rows
    differ_R = (bits(rows_UV[at_above]) != bits(above.originals)).any(dim=1)
    if differ_R.any():
        raise ValueError(
            f"patch {number} was not made on top of the ones before it: {int(differ_R.sum())} of its originals of "
            f"table {name!r} are not their rows, {named(above.slots[differ_R])}"
        )
    originals_UV = torch.zeros_like(rows_UV)
    originals_UV[at_above], originals_UV[at_below] = above.originals, below.originals
    rows_UV[at_above] = above.rows
    changed = (bits(rows_UV) != bits(originals_UV)).any(dim=1)
    parts = {"slots": slots_U[changed], "rows": rows_UV[changed], "originals": originals_UV[changed]}
    lessons = within(lessons_of([below, above]), parts["slots"])
    return replace(below, **parts, lessons=lessons, **protection([below, above], "sum"))
