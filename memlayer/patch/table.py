"""The changed rows of one table, and whether they fit a table of a model.

Shapes: N slots, R rows, V value width.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from memlayer.decoders.fingerprint import bits, differing
from memlayer.layers.memory import MemoryTable

PARTS = ("slots", "rows", "originals")
PROTECTED = ("protected_slots", "protected_documents")
# Numbers compared at a time, so that two tables are compared without a temporary of their size.
BLOCK = 2**22
SLOTS_NAMED = 5


@dataclass(eq=False)
class TablePatch:
    """Changed rows of one table.

    Attributes:
        slots: where the rows are, int64, shape (R,), ascending.
        rows: what is there with the patch, shape (R, V).
        originals: what was there before, shape (R, V), of the same dtype.
        num_slots: N of the table.
        product_keys: SHA-256 of the product keys of every layer that reads the table, by parameter name: with
            other keys a slot means something else.
        protected_slots: slots that the learning run protected from later writes, int64, shape (P,), ascending.
        protected_documents: by how many background documents it raised the document frequency of each, int64.
        lessons: of each lesson that the run told apart, by its id, the slots that it wrote, int64, ascending. A slot
            may be of several; of what nobody told apart there is no lesson.

    Raises:
        ValueError: the parts do not fit each other.
    """

    slots: Tensor
    rows: Tensor
    originals: Tensor
    num_slots: int
    product_keys: dict[str, str]
    protected_slots: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    protected_documents: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    lessons: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        slots, rows, originals = self.slots, self.rows, self.originals
        of_lessons = ((f"slots of lesson {lesson!r}", written) for lesson, written in self.lessons.items())
        for name, some in (("slots", slots), ("protected_slots", self.protected_slots), *of_lessons):
            if some.dtype != torch.int64 or some.dim() != 1 or not (some[1:] > some[:-1]).all():
                raise ValueError(f"{name} must be int64, ascending and distinct, are {some}")
            if len(some) and not 0 <= int(some[0]) <= int(some[-1]) < self.num_slots:
                raise ValueError(f"{name} {int(some[0])} to {int(some[-1])}, the table has {self.num_slots}")
        documents = self.protected_documents
        if documents.dtype != torch.int64 or documents.shape != self.protected_slots.shape or (documents < 1).any():
            raise ValueError(f"protected_documents must be int64 and positive, one a protected slot, are {documents}")
        for lesson, written in self.lessons.items():
            if not torch.isin(written, slots).all():
                raise ValueError(f"lesson {lesson!r} wrote slots that are not among the patch's")
        if rows.dim() != 2 or len(rows) != len(slots):
            raise ValueError(f"rows of shape {tuple(rows.shape)} for {len(slots)} slots")
        if (rows.shape, rows.dtype) != (originals.shape, originals.dtype):
            raise ValueError(
                f"rows are {tuple(rows.shape)} {rows.dtype}, originals {tuple(originals.shape)} {originals.dtype}"
            )

    @classmethod
    def of_changed(
        cls, slots: Tensor, rows: Tensor, originals: Tensor, lessons: dict[str, Tensor], **table
    ) -> "TablePatch":
        """Leave out the rows that are their originals to the bit: a step may select a row and not move it."""
        changed = (bits(rows) != bits(originals)).any(dim=1)
        parts = (part[changed] for part in (slots, rows, originals))
        return cls(*parts, lessons=within(lessons, slots[changed]), **table)

    @classmethod
    def between(cls, before_NV: Tensor, after_NV: Tensor, product_keys: dict[str, str]) -> "TablePatch":
        """The rows in which two tables of one shape and dtype differ, compared block by block."""
        step = max(1, BLOCK // max(1, before_NV.shape[1]))
        slots = []
        for first in range(0, len(before_NV), step):
            before, after = before_NV[first : first + step], after_NV[first : first + step]
            differ = (bits(before) != bits(after.to(before.device))).any(dim=1)
            slots.append(first + differ.nonzero()[:, 0].cpu())
        slots_R = torch.cat(slots)
        rows, originals = (table[slots_R.to(table.device)].cpu() for table in (after_NV, before_NV))
        return cls(slots_R, rows, originals, len(before_NV), product_keys)

    @property
    def num_bytes(self) -> int:
        """Of slots, rows and originals together."""
        return sum(getattr(self, part).nbytes for part in PARTS)

    def to(self, dtype: torch.dtype) -> "TablePatch":
        """The same patch with rows and originals rounded to ``dtype``."""
        if dtype == self.rows.dtype:
            return self
        return replace(self, rows=self.rows.to(dtype), originals=self.originals.to(dtype))

    def check_finite(self, name: str) -> None:
        """Refuse rows that hold nan or infinity with a ValueError."""
        wrong_R = ~self.rows.isfinite().all(dim=1)
        if wrong_R.any():
            raise ValueError(
                f"{int(wrong_R.sum())} of {len(wrong_R)} rows for table {name!r} hold nan or inf, "
                f"{named(self.slots[wrong_R])}: the learning run diverged, or {self.rows.dtype} does not hold them"
            )

    def check(self, name: str, table: MemoryTable, product_keys: dict[str, str], expected: str) -> None:
        """Refuse a table that does not hold the ``expected`` part, "originals" or "rows", to the bit.

        Raises:
            ValueError: the shape, the dtype, the product keys of the layers that read it, or the rows differ.
        """
        self.check_shape(name, table)
        self.check_keys(product_keys)
        self.check_rows(name, table, expected)

    def check_shape(self, name: str, table: MemoryTable) -> None:
        """Refuse a table of another shape or dtype with a ValueError."""
        weight = table.weight
        shape = table.num_embeddings, table.embedding_dim
        if (self.num_slots, self.rows.shape[1]) != shape:
            raise ValueError(
                f"the patch changes {self.num_slots} slots of width {self.rows.shape[1]}, table {name!r} is {shape}"
            )
        if weight.dtype != self.rows.dtype:
            raise ValueError(f"the patch is in {self.rows.dtype}, table {name!r} in {weight.dtype}")

    def check_keys(self, product_keys: dict[str, str]) -> None:
        """Refuse other product keys than the patch was made for with a ValueError."""
        if other := differing(self.product_keys, product_keys):
            raise ValueError(
                f"the patch was made for other product keys at {', '.join(other)}: "
                "the patch belongs to another model or state"
            )

    def check_rows(self, name: str, table: MemoryTable, expected: str) -> None:
        """Refuse a table that does not hold the "originals" or the "rows" to the bit with a ValueError."""
        differ_R = ~self.held(table, expected)
        if differ_R.any():
            raise ValueError(
                f"{int(differ_R.sum())} of {len(differ_R)} rows of table {name!r} are not the patch's {expected}, "
                f"{named(self.slots[differ_R])}: the patch belongs to another model or state"
            )

    def held(self, table: MemoryTable, part: str) -> Tensor:
        """Which of the "originals" or of the "rows" the table holds to the bit, bool, shape (R,)."""
        rows_RV = table.rows_at(self.slots)
        return (bits(rows_RV) == bits(getattr(self, part).to(rows_RV.device))).all(dim=1).cpu()

    def write(self, table: MemoryTable, part: str, where_R: Tensor | slice = slice(None)) -> None:
        """Copy the "rows" or the "originals" into a table of the same shape, all or those of a bool mask (R,)."""
        table.put_rows(self.slots[where_R], getattr(self, part)[where_R])


def within(lessons: dict[str, Tensor], slots: Tensor) -> dict[str, Tensor]:
    """The slots of each lesson that are among these; a lesson without any is left out."""
    kept = {lesson: written[torch.isin(written, slots)] for lesson, written in lessons.items()}
    return {lesson: written for lesson, written in kept.items() if len(written)}


def named(slots: Tensor) -> str:
    """The first few slots in words."""
    first = ", ".join(map(str, slots[:SLOTS_NAMED].tolist()))
    more = len(slots) - SLOTS_NAMED
    return f"at slot{'s' * (len(slots) > 1)} {first}" + (f" and {more} more" if more > 0 else "")
