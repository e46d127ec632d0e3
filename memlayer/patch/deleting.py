"""A patch without some of its lessons: what was taught is taken back, and the other lessons stay.

Rows that only the deleted lessons wrote become what they were before, to the bit. A row that another lesson wrote too
holds both, and no rule tells them apart: it stays as it is, and whose rows these are is said.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from memlayer.patch.memory_patch import MemoryPatch
from memlayer.patch.table import PARTS, PROTECTED, TablePatch, within

NAMED = 5  # other lessons in a sentence


@dataclass(frozen=True)
class Deleted:
    """What became of a patch.

    Attributes:
        patch: without the lessons.
        removed: rows that are not in it any more.
        shared: per other lesson, how many rows of the deleted ones it wrote too; those stay.
        rows_shared: how many rows these are.
    """

    patch: MemoryPatch
    removed: int
    shared: dict[str, int]
    rows_shared: int

    def __str__(self):
        text = f"{self.removed:,} rows are as they were before, to the bit"
        if not self.rows_shared:
            return f"{text}; no other lesson wrote into them"
        most_first = sorted(self.shared.items(), key=lambda item: (-item[1], item[0]))
        others = ", ".join(f"{lesson!r} ({rows:,})" for lesson, rows in most_first[:NAMED])
        more = len(most_first) - NAMED
        also = f" and {more} more lessons" if more > 0 else ""
        return (
            f"{text}; {self.rows_shared:,} rows stay, since other lessons wrote into them too: {others}{also}. "
            "Something of what is deleted may still be in those: ask the model"
        )


def delete_lessons(patch: MemoryPatch, lessons: Iterable[str]) -> Deleted:
    """Take lessons out of a patch; the patch itself stays as it is.

    Raises:
        ValueError: no lesson is named, or one that the patch does not tell apart.
    """
    gone = dict.fromkeys(lessons)
    told = {lesson for table in patch.tables.values() for lesson in table.lessons}
    if not gone:
        raise ValueError("no lesson to delete is named")
    if unknown := [lesson for lesson in gone if lesson not in told]:
        some = ", ".join(map(repr, sorted(told)[:NAMED])) or "none"
        raise ValueError(f"the patch has no lesson {unknown[0]!r}; it tells apart {len(told)}, first of all {some}")
    tables, shared, removed, rows_shared = {}, Counter(), 0, 0
    for name, table in patch.tables.items():
        tables[name], others, number = _without(table, gone)
        removed += len(table.slots) - len(tables[name].slots)
        rows_shared += number
        shared.update(others)
    provenance = {**patch.provenance, "deleted": [*patch.provenance.get("deleted", []), *gone]}
    return Deleted(MemoryPatch(tables, provenance, patch.base), removed, dict(shared), rows_shared)


def _without(table: TablePatch, gone: Iterable[str]) -> tuple[TablePatch, dict[str, int], int]:
    """The table's patch without them, and of their rows how many each other lesson wrote, and how many any did."""
    none = table.slots[:0]
    theirs = torch.cat([none, *(table.lessons[lesson] for lesson in gone if lesson in table.lessons)]).unique()
    others = {lesson: slots for lesson, slots in table.lessons.items() if lesson not in gone}
    own = theirs[~torch.isin(theirs, torch.cat([none, *others.values()]))]
    stays_R, stays_P = (~torch.isin(slots, own) for slots in (table.slots, table.protected_slots))
    parts = {part: getattr(table, part)[stays_R] for part in PARTS}
    parts |= {part: getattr(table, part)[stays_P] for part in PROTECTED}
    shared = {lesson: len(slots) for lesson, slots in within(others, theirs).items()}
    return replace(table, **parts, lessons=others), shared, len(theirs) - len(own)
