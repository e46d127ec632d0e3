"""One table while a sparse memory finetuner learns into it: this step's rows, every step's originals, state per slot.

Rows are trained in float32 whatever the table's dtype, and rounded once when they are written. Of a coarser table the
float32 rows are kept as well: steps that are smaller than its numbers' spacing add up.

Shapes: N slots, U distinct slots read, R rows of a step, W slots written.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from memlayer.decoders.fingerprint import fingerprint
from memlayer.layers.memory import MemoryTable
from memlayer.layers.ranks import num_ranks
from memlayer.methods.slot_steps import SlotSteps, check_optimizer, group_of
from memlayer.methods.slot_store import SlotStore
from memlayer.patch import TablePatch
from memlayer.slots.counts import SlotCounts
from memlayer.slots.selection import at_random, kl, step_shares, tf_idf, top_slots

# Columns of the store; the last two: how many lessons wrote a slot, and whether the one that is taught is among them.
SLOTS, ORIGINALS, ROWS, WRITERS, MINE = "slots", "originals", "rows", "writers", "mine"


@dataclass(frozen=True)
class Selection:
    """How many slots one choice was made among.

    Attributes:
        read: distinct slots that the batch read.
        zero_idf: how many of them have no score above 0, since background text reads them as much.
        selected: how many may change.
    """

    read: int
    zero_idf: int
    selected: int


@dataclass(frozen=True)
class Capacity:
    """How full one table is.

    Attributes:
        slots: N.
        live: slots that the background reads.
        written: slots that were written since the finetuner was made.
        shared: written slots that several lessons wrote.
        free: slots that neither the background reads nor anybody wrote.
        lessons: how many lessons wrote.
    """

    slots: int
    live: int
    written: int
    shared: int
    free: int
    lessons: int

    @property
    def lessons_left(self) -> int | None:
        """For about how many more lessons there are free slots, if they need as many each; None before the first."""
        return self.free * self.lessons // self.written if self.written else None

    def __str__(self):
        left = "" if self.lessons_left is None else f", enough for about {self.lessons_left:,} more lessons like these"
        return (
            f"{self.written:,} of {self.slots:,} slots are written, {self.shared:,} of them by several lessons; "
            f"background text reads {self.live:,}; {self.free:,} are free{left}"
        )


class OpenTable:
    """One table while it is being learned into: the rows of this step and the originals of all steps.

    ``table.row_of_slot`` holds a slot's row while it is selected, else a negative number: -1, or for a slot that was
    stepped before -2 less its place in the store.
    """

    def __init__(
        self,
        name: str,
        table: MemoryTable,
        background: SlotCounts,
        num_rows: int,
        protect: int,
        max_norm: float | None,
        damping: float,
    ):
        self.name, self.table, self._protect, self._max_norm, self._damping = name, table, protect, max_norm, damping
        weight = table.weight
        self.background = background.to(weight.device)
        self._mean_reads, self._a_document = float(background.reads_N.sum()) / len(weight), background.reads_a_document
        # DistributedDataParallel expects sparse gradients of every parameter of a sparse embedding, rows included.
        self._was_sparse, table.sparse = table.sparse, False
        dtype = torch.promote_types(weight.dtype, torch.float32)
        table.rows = nn.Parameter(torch.zeros(num_rows, table.embedding_dim, dtype=dtype, device=weight.device))
        table.rows.register_hook(self._refuse_leftovers)
        table.row_of_slot = torch.full((len(weight),), -1, dtype=torch.int32, device=weight.device)
        self.slots_R = self._at_R = torch.empty(0, dtype=torch.int64, device=weight.device)
        self.selection: Selection | None = None
        self._store = SlotStore()
        self._steps = SlotSteps(self._store)
        self._lesson, self._slots_of_lesson = "", {}
        self._warned = self._has_gradient = False

    @property
    def rows(self) -> nn.Parameter:
        return self.table.rows

    @torch.no_grad()
    def choose(self, slots: Tensor, select: str, idf_power: float) -> None:
        """Make the top slots of these reads, int32 and sorted here in place, the rows of this step.

        Args:
            select: how they are ranked, see ``SparseMemoryFinetuner``.
        """
        slots_U, reads_U = _over_ranks(*_count_reads(slots))
        protected_U = self._protected(slots_U)
        if select == "random":
            scores_U = at_random(slots_U)
        elif select == "tf_idf":
            scores_U = tf_idf(slots_U, reads_U, self.background, idf_power, protected_U)
        else:
            scores_U = kl(slots_U, reads_U, self.background, protected_U, documents=select == "kl_documents")
        self.choose_by(slots_U, scores_U)

    @torch.no_grad()
    def choose_by_gradient(self, slots_U: Tensor, norms_U: Tensor, idf_power: float) -> None:
        """Make those slots the rows of this step whose gradient is longest, and that background text reads little."""
        self.choose_by(slots_U, tf_idf(slots_U, norms_U, self.background, idf_power, self._protected(slots_U)))

    def choose_by(self, slots_U: Tensor, scores_U: Tensor) -> None:
        """Make the top slots of these scores the rows of this step."""
        self.drop()
        self.slots_R = top_slots(slots_U, scores_U, len(self.rows))
        count = len(self.slots_R)
        self.selection = Selection(len(slots_U), int((scores_U <= 0).sum()), count)
        self._at_R = -2 - self.table.row_of_slot[self.slots_R].long()
        rows_RV = self.table.rows_at(self.slots_R).to(self.rows.dtype)
        if ROWS in self._store:
            stepped_R = self._at_R >= 0
            rows_RV[stepped_R] = self._store.get(ROWS, self._at_R[stepped_R])
        self.rows[:count] = rows_RV
        self.table.row_of_slot[self.slots_R] = torch.arange(count, dtype=torch.int32, device=slots_U.device)

    def _protected(self, slots_U: Tensor) -> Tensor | int:
        """As read by how many more background documents each slot counts, for the lessons that wrote it but this."""
        if not self._protect or not self._store.num_slots:
            return 0
        at_U = -2 - self.table.row_of_slot[slots_U].long()
        others_U, there_U = torch.zeros_like(at_U), at_U >= 0
        writers, mine = (self._store.get(name, at_U[there_U]) for name in (WRITERS, MINE))
        others_U[there_U] = writers - mine.long()
        return self._protect * others_U

    def begin(self, lesson: str) -> None:
        """Write for this lesson from now on."""
        if lesson != self._lesson and self._store.num_slots:
            self._store.column(MINE).zero_()
            slots = self._slots_of_lesson.get(lesson, self.slots_R[:0])
            self._store.put(MINE, -2 - self.table.row_of_slot[slots].long(), torch.ones_like(slots, dtype=torch.bool))
        self._lesson = lesson

    def warn_of_few(self) -> None:
        """Say once that a step had fewer slots to choose among than it may change, unless damping chooses for it."""
        found = self.selection
        if self._warned or (found.read > len(self.rows) and found.selected == len(self.rows)):
            return
        if self._damping and not found.zero_idf:
            return
        self._warned = True
        every = "every slot read is selected" if not found.zero_idf else f"{found.selected} are selected"
        of_zero = f", of which {found.zero_idf} score 0 as the background reads them" if found.zero_idf else ""
        warnings.warn(
            f"a step may change {len(self.rows)} slots of table {self.name!r} and its batch reads only "
            f"{found.read}{of_zero}: {every}",
            stacklevel=5,
        )

    def drop(self) -> None:
        """Choose nothing."""
        self.table.row_of_slot[self.slots_R] = (-2 - self._at_R).int()
        self.slots_R, self._at_R, self._has_gradient = self.slots_R[:0], self._at_R[:0], False

    def _refuse_leftovers(self, _grad: Tensor) -> None:
        """Rows mean other slots in every step, so a gradient of the step before would move the wrong ones."""
        if not self._has_gradient and self.rows.grad is not None and self.rows.grad.any():
            raise ValueError("the rows still hold the gradient of an earlier step: call optimizer.zero_grad() after it")
        self._has_gradient = True

    def check_optimizer(self, optimizer: Optimizer) -> None:
        check_optimizer(optimizer, self.rows)

    @torch.no_grad()
    def step(self, optimizer: Optimizer) -> None:
        """Step the rows of this choice and write them into the table, keeping what was there before the first step."""
        weight, count = self.table.weight, len(self.slots_R)
        self._admit()
        rows_RV = self.rows.detach()[:count]
        if self.rows.grad is not None and count:
            before_RV = rows_RV.clone() if self._damping else rows_RV
            self._steps.step(optimizer, group_of(optimizer, self.rows), rows_RV, self.rows.grad[:count], self._at_R)
            if self._damping:
                self._damp(before_RV, rows_RV)
            self._shorten(rows_RV)
        if weight.dtype != self.rows.dtype:
            self._store.put(ROWS, self._at_R, rows_RV)
        self.table.put_rows(self.slots_R, rows_RV.to(weight.dtype))
        self.drop()

    def slope(self) -> float:
        """By how much the loss falls a unit of rate, in a straight line along SGD's first step on this table."""
        squares_R = self.rows.grad[: len(self.slots_R)].double().square().sum(1)
        if self._damping:
            squares_R *= step_shares(self.background.reads_N[self.slots_R], self._mean_reads, self._damping)
        return float(squares_R.sum())

    def _admit(self) -> None:
        new_R = self._at_R < 0
        first = self._store.num_slots
        self._store.admit(int(new_R.sum()))
        at_F = torch.arange(first, self._store.num_slots, device=new_R.device)
        self._at_R[new_R] = at_F
        self._store.put(SLOTS, at_F, self.slots_R[new_R])
        self._store.put(ORIGINALS, at_F, self.table.rows_at(self.slots_R[new_R]))
        for name, dtype in ((WRITERS, torch.int64), (MINE, torch.bool)):
            self._store.put(name, at_F, torch.zeros_like(at_F, dtype=dtype))
        first_R = ~self._store.get(MINE, self._at_R)
        at_F, slots_F = self._at_R[first_R], self.slots_R[first_R]
        self._store.put(WRITERS, at_F, self._store.get(WRITERS, at_F) + 1)
        self._store.put(MINE, at_F, torch.ones_like(at_F, dtype=torch.bool))
        mine = self._slots_of_lesson.get(self._lesson, slots_F[:0])
        self._slots_of_lesson[self._lesson] = torch.cat([mine, slots_F]).sort().values

    def _damp(self, before_RV: Tensor, rows_RV: Tensor) -> None:
        """Take rows back, along their step, by how much background text and the lessons of others read them."""
        others_R = self._store.get(WRITERS, self._at_R) - 1  # this lesson is among them since the rows were admitted
        reads_R = self.background.reads_N[self.slots_R] + self._protect * self._a_document * others_R
        shares_R = step_shares(reads_R, self._mean_reads, self._damping)
        rows_RV.copy_(before_RV.lerp(rows_RV, shares_R.to(rows_RV.dtype)[:, None]))

    def _shorten(self, rows_RV: Tensor) -> None:
        """Take rows back, along their change, to within the bound on its norm."""
        if self._max_norm is None:
            return
        originals_RV = self._store.get(ORIGINALS, self._at_R).to(rows_RV.dtype)
        change_RV = rows_RV - originals_RV
        far_R = torch.linalg.vector_norm(change_RV, dim=1) > self._max_norm
        rows_RV[far_R] = originals_RV[far_R] + torch.renorm(change_RV[far_R], 2, 0, self._max_norm)

    def capacity(self) -> Capacity:
        live_N = self.background.reads_N > 0
        live, slots, lessons = int(live_N.sum()), len(self.table.weight), len(self._slots_of_lesson)
        if not self._store.num_slots:
            return Capacity(slots, live, 0, 0, slots - live, lessons)
        slots_W, writers_W = self._store.column(SLOTS), self._store.column(WRITERS)
        free = slots - live - int((~live_N[slots_W]).sum())
        return Capacity(slots, live, len(slots_W), int((writers_W > 1).sum()), free, lessons)

    def patch(self, product_keys: dict[str, str]) -> TablePatch:
        """What was changed; rows that were selected and did not move are left out."""
        return TablePatch.of_changed(**vars(self._written(product_keys)[0]))

    def _written(self, product_keys: dict[str, str]) -> tuple[TablePatch, Tensor]:
        """Every row that was ever stepped, whether it moved or not, and its place in the store."""
        weight = self.table.weight.detach()
        slots_W = at_W = torch.empty(0, dtype=torch.int64, device=weight.device)
        originals = weight.new_empty(0, self.table.embedding_dim)
        if self._store.num_slots:
            slots_W, at_W = self._store.column(SLOTS).sort()
            originals = self._store.get(ORIGINALS, at_W)
        parts = (slots_W, self.table.rows_at(slots_W), originals), self._protected_by_patch(slots_W, at_W)
        changed, protected = ([part.cpu() for part in each] for each in parts)
        lessons = {name: slots.cpu() for name, slots in self._slots_of_lesson.items() if name}
        return TablePatch(*changed, len(weight), product_keys, *protected, lessons), at_W

    def _protected_by_patch(self, slots_W: Tensor, at_W: Tensor) -> tuple[Tensor, Tensor]:
        """What a later run is to keep away from: slots, and by how many documents their frequency rises."""
        if not self._protect or not len(slots_W):
            return slots_W[:0], slots_W[:0]
        seen_W = self.background.document_frequency_N[slots_W]
        more_W = self._protect * self._store.get(WRITERS, at_W)
        raised_W = (seen_W + more_W).clamp(max=self.background.num_documents) - seen_W
        return slots_W[raised_W > 0], raised_W[raised_W > 0]

    def state_dict(self, product_keys: dict[str, str]) -> dict:
        written, at_W = self._written(product_keys)
        columns = {name: self._store.get(name, at_W).cpu() for name in self._store if name not in (SLOTS, ORIGINALS)}
        return {
            **vars(written),
            "lessons": {name: slots.cpu() for name, slots in self._slots_of_lesson.items()},
            "lesson": self._lesson,
            "columns": columns,
            "numbers": dict(self._steps.numbers),
            "background": self._told_background(),
        }

    def _told_background(self) -> dict:
        """The background that the finetuner was made with, in a few words."""
        frequency = fingerprint({"document_frequency": self.background.document_frequency_N})
        reads = fingerprint({"reads": self.background.reads_N})
        return {"num_documents": self.background.num_documents, "document_frequency": frequency, "reads": reads}

    def check_state_dict(self, state: Mapping, product_keys: dict[str, str]) -> None:
        _rows_of(state).check(self.name, self.table, product_keys, "originals")
        for key, ours in self._told_background().items():
            if (theirs := state["background"][key]) != ours:
                raise ValueError(f"the background of table {self.name!r} had {key} {theirs}, here it has {ours}")

    @torch.no_grad()
    def load_state_dict(self, state: Mapping) -> None:
        written, device = _rows_of(state), self.table.weight.device
        written.write(self.table, "rows")
        self._store, slots_W = SlotStore(), written.slots.to(device)
        self._steps = SlotSteps(self._store)
        self._steps.numbers = dict(state["numbers"])
        self._store.admit(len(slots_W))
        at_W = torch.arange(len(slots_W), device=device)
        columns = {SLOTS: slots_W, ORIGINALS: written.originals, **state["columns"]}
        for name, column in columns.items():
            self._store.put(name, at_W, column.to(device))
        self.table.row_of_slot[slots_W] = (-2 - at_W).int()
        self._slots_of_lesson = {name: slots.to(device) for name, slots in state["lessons"].items()}
        self._lesson = state["lesson"]

    def close(self) -> None:
        self.table.rows, self.table.row_of_slot = None, None
        self.table.sparse = self._was_sparse


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
    if (ranks := num_ranks()) == 1:
        return slots_U, reads_U
    gathered: list = [None] * ranks
    torch.distributed.all_gather_object(gathered, (slots_U.cpu(), reads_U.cpu()))
    slots = torch.cat([s for s, _ in gathered]).to(slots_U.device)
    reads = torch.cat([r for _, r in gathered]).to(reads_U.device)
    distinct_U, position = slots.unique(return_inverse=True)
    return distinct_U, torch.zeros_like(distinct_U).index_add_(0, position, reads)
