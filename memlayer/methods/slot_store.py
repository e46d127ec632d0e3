"""Numbers kept for the slots that were ever stepped: columns that grow, an entry a slot, in the order of first steps.

Costs what was written and not what the table holds; where a slot's entry is, OpenTable knows.

Shapes: R slots of a step, W slots admitted.
"""

from torch import Tensor


class SlotStore:
    """Columns of one entry a slot; what was never put is zero."""

    def __init__(self):
        self.num_slots = 0
        self._columns: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def __iter__(self):
        return iter(self._columns)

    def admit(self, count: int) -> None:
        """Make room for so many more slots, after those that are there."""
        self.num_slots += count

    def column(self, name: str) -> Tensor:
        """The column (W, ...), which may be written to."""
        column = self._columns[name]
        if len(column) < self.num_slots:
            grown = column.new_zeros(max(self.num_slots, 2 * len(column)), *column.shape[1:])
            grown[: len(column)] = column
            self._columns[name] = column = grown
        return column[: self.num_slots]

    def get(self, name: str, at_R: Tensor) -> Tensor:
        """Entries at these places."""
        return self.column(name)[at_R]

    def put(self, name: str, at_R: Tensor, entries_R: Tensor) -> None:
        """Write entries at these places; the first ones of a column say its shape, dtype and device."""
        if name not in self:
            self._columns[name] = entries_R.new_zeros(self.num_slots, *entries_R.shape[1:])
        self.column(name)[at_R] = entries_R
