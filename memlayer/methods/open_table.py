"""One table while a sparse memory finetuner learns into it: this step's rows, every step's originals, state per slot.

Shapes: N slots, U distinct slots read, R rows of a step, W slots written.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from memlayer.counts import SlotCounts
from memlayer.memory import MemoryTable
from memlayer.patch import TablePatch
from memlayer.selection import tf_idf, top_slots


class OpenTable:
    """One table while it is being learned into: the rows of this step and the originals of all steps."""

    def __init__(self, name: str, table: MemoryTable, background: SlotCounts, num_rows: int):
        self.name, self.table, self.background = name, table, background.to(table.weight.device)
        weight = table.weight
        # DistributedDataParallel expects sparse gradients of every parameter of a sparse embedding, rows included.
        self._was_sparse, table.sparse = table.sparse, False
        table.rows = nn.Parameter(
            torch.zeros(num_rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
        )
        table.row_of_slot = torch.full((len(weight),), -1, dtype=torch.int32, device=weight.device)
        self.slots_R = torch.empty(0, dtype=torch.int64, device=weight.device)
        self._unprotected: set[int] = set()
        self._originals: dict[int, Tensor] = {}
        self._moments: dict[str, dict[int, Tensor]] = {}
        self._warned = False

    @property
    def rows(self) -> nn.Parameter:
        return self.table.rows

    @torch.no_grad()
    def choose(self, slots: Tensor, idf_power: float) -> None:
        """Make the top slots of these reads, int32 and sorted here in place, the rows of this step."""
        slots_U, reads_U = _over_ranks(*_count_reads(slots))
        self.table.row_of_slot[self.slots_R] = -1
        self.slots_R = top_slots(slots_U, tf_idf(slots_U, reads_U, self.background, idf_power), len(self.rows))
        if len(slots_U) <= len(self.rows) and not self._warned:
            warnings.warn(
                f"a step may change {len(self.rows)} slots of table {self.name!r} and its batch reads only "
                f"{len(slots_U)}: every slot read is selected",
                stacklevel=4,
            )
            self._warned = True
        count = len(self.slots_R)
        self.rows[:count] = self.table.weight[self.slots_R]
        self.table.row_of_slot[self.slots_R] = torch.arange(
            count, dtype=torch.int32, device=self.slots_R.device
        )

    @torch.no_grad()
    def write(self) -> None:
        """Copy the stepped rows into the table, keeping the originals of slots never written before."""
        slots = self.slots_R.tolist()
        self._unprotected.update(slots)
        fresh = [i for i, slot in enumerate(slots) if slot not in self._originals]
        originals = self.table.weight[self.slots_R[fresh]]
        self._originals.update({slots[i]: row for i, row in zip(fresh, originals, strict=True)})
        self.table.weight.index_copy_(0, self.slots_R, self.rows[: len(slots)])
        self.table.row_of_slot[self.slots_R] = -1
        self.slots_R = self.slots_R[:0]

    def protect(self, documents: int) -> None:
        slots_W = _slots(sorted(self._unprotected)).to(self.table.weight.device)
        self.background = self.background.with_documents(slots_W, documents)
        self._unprotected.clear()

    def load_moments(self, state: dict) -> None:
        """Give the optimizer the moments of the selected slots; zero for a slot never selected."""
        for key, tensor in self._row_shaped(state):
            kept = self._moments.get(key, {})
            tensor.zero_()
            for row, slot in enumerate(self.slots_R.tolist()):
                if slot in kept:
                    tensor[row] = kept[slot]

    def save_moments(self, state: dict) -> None:
        """Keep the moments of the selected slots."""
        for key, tensor in self._row_shaped(state):
            kept = tensor[: len(self.slots_R)].clone()
            self._moments.setdefault(key, {}).update(zip(self.slots_R.tolist(), kept, strict=True))

    def _row_shaped(self, state: dict):
        return [(k, v) for k, v in state.items() if isinstance(v, Tensor) and v.shape == self.rows.shape]

    def patch(self, product_keys: dict[str, str]) -> TablePatch:
        return TablePatch.of_changed(**vars(self._written(product_keys)))

    def _written(self, product_keys: dict[str, str]) -> TablePatch:
        """Every row that was ever selected, whether it moved or not."""
        slots = sorted(self._originals)
        slots_W, weight = _slots(slots), self.table.weight.detach()
        originals = torch.stack([self._originals[s] for s in slots]) if slots else weight[:0]
        rows = weight[slots_W.to(weight.device)].cpu()
        return TablePatch(slots_W, rows, originals.cpu(), len(weight), product_keys)

    def state_dict(self, product_keys: dict[str, str]) -> dict:
        moments = {
            key: {"slots": _slots(kept), "rows": torch.stack(list(kept.values())).cpu()}
            for key, kept in self._moments.items()
        }
        return {
            **vars(self._written(product_keys)),
            "moments": moments,
            "unprotected": _slots(sorted(self._unprotected)),
            "document_frequency": self.background.document_frequency_N.cpu(),
        }

    def check_state_dict(self, state: Mapping, product_keys: dict[str, str]) -> None:
        _rows_of(state).check(self.name, self.table, product_keys, "originals")

    @torch.no_grad()
    def load_state_dict(self, state: Mapping) -> None:
        rows, device = _rows_of(state), self.table.weight.device
        rows.write(self.table, "rows")
        self._originals = dict(zip(rows.slots.tolist(), rows.originals.to(device), strict=True))
        self._moments = {
            key: dict(zip(kept["slots"].tolist(), kept["rows"].to(device), strict=True))
            for key, kept in state["moments"].items()
        }
        self._unprotected = set(state["unprotected"].tolist())
        self.background = replace(self.background, document_frequency_N=state["document_frequency"].to(device))

    def close(self) -> None:
        self.table.rows, self.table.row_of_slot = None, None
        self.table.sparse = self._was_sparse


def _slots(numbers: Iterable[int]) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.int64)


def _rows_of(state: Mapping) -> TablePatch:
    return TablePatch(**{field.name: state[field.name] for field in fields(TablePatch)})


def _count_reads(slots: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct slots, int64 ascending, and how often each was read; sorts ``slots`` on CPUs."""
    if slots.is_cpu:
        slots.numpy().sort()  # torch's sort makes indices too, and takes five times the time and memory
    else:
        slots = slots.sort().values
    slots_U, reads_U = torch.unique_consecutive(slots, return_counts=True)
    return slots_U.long(), reads_U


def _over_ranks(slots_U: Tensor, reads_U: Tensor) -> tuple[Tensor, Tensor]:
    """The reads of all ranks together; a step's choice must be the same on each."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return slots_U, reads_U
    gathered: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, (slots_U.cpu(), reads_U.cpu()))
    slots = torch.cat([s for s, _ in gathered]).to(slots_U.device)
    reads = torch.cat([r for _, r in gathered]).to(reads_U.device)
    distinct_U, position = slots.unique(return_inverse=True)
    return distinct_U, torch.zeros_like(distinct_U).index_add_(0, position, reads)
