"""Ridge over rows: by how much the memory's read should change is learned, and the rows follow by least squares.

With one memory layer, addresses do not depend on values and a read is linear in the rows. So a lesson is learned in two
steps. Gradients move one free vector a position, which is added to what the memory reads there, while every number of
the model stays as it is; all wordings of a lesson at once. When all lessons have had their steps, the rows that come
nearest to these reads, for little, are solved for (``row_equations``).

What is free is the read, before gate and output projection, and not the layer's output. The map from a read to the
output has the gate in it and differs from position to position: over outputs every row number would be tied to every
other, and the equations would be as large as rows times width; over reads one small matrix serves all columns.

Changes are wanted of the untouched model, never of one with other lessons' rows. That is what makes the outcome
independent of the order, a lesson deletable to the bit and another one addable without teaching any again. It also
means that a lesson does not see what the others' rows do to its positions; the equations do.

Rows are taken as ``sparse_memory`` ranks them, of the reads at the positions whose reads change, each lesson by itself:
what other lessons wrote is not kept from it, for that would bring an order in.

Left out: several processes; several memory layers, where an earlier one's rows move what a later one reads.

Shapes: P positions of a lesson, K slots read at one, V value width, R rows, T positions of a batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memlayer.data.qa import MASKS
from memlayer.decoders.attach import in_backward, memory_layers, unsharded_tables
from memlayer.decoders.fingerprint import product_key_fingerprints
from memlayer.layers.memory import MemoryTable
from memlayer.methods.ngram_regulariser import sequence_key
from memlayer.methods.open_table import Capacity
from memlayer.methods.prepared import Prepared
from memlayer.methods.row_equations import LessonEquations, RowEquations, fingerprint_of
from memlayer.patch import MemoryPatch
from memlayer.slots.counts import SlotCounts
from memlayer.slots.selection import tf_idf, top_slots

POSITIONS = {"answer": "answer_mask", "subject": "subject_mask", "all": "attention_mask"}
Batch = Mapping[str, Tensor]


@dataclass
class _Lesson:
    """One lesson while it is learned.

    Attributes:
        places: of each of its sequences, by its key, the first and the last of its positions.
        wanted: by how much each position's read should change, float32 (P, V).
        slots_PK, weights_PK: what the positions read; None until the first pass over some, with slots below 0 at those
            that no pass went over yet.
    """

    places: dict[bytes, tuple[int, int]]
    wanted: nn.Parameter
    slots_PK: Tensor | None = None
    weights_PK: Tensor | None = None

    @property
    def read_P(self) -> Tensor:
        """Which positions a pass went over."""
        return self.slots_PK[:, 0] >= 0


class RidgeFinetuner:
    """Learns by how much reads should change, and solves for the rows.

    In any training loop::

        finetuner = RidgeFinetuner(model, background, batches)
        optimizer = finetuner.watch(torch.optim.Adam(finetuner.parameters(), lr=1.0))
        for batch in batches * 10:
            finetuner.loss(batch).backward()
            optimizer.step()
        patch = finetuner.detach()

    Args:
        model: a causal language model with one memory layer; every parameter of it is frozen until ``detach``.
        background: counts of its table.
        lessons: the batch of each lesson, of which only the masks and the token ids are looked at.
        num_rows: how many slots a lesson may bring.
        idf_power: as of ``SparseMemoryFinetuner``.
        positions: whose reads change: those that predict the "answer"; those that name the lesson's "subject", from
            where attention carries the change to the answer; or "all".
        ridge: what a row's change costs, beside a position's miss.
        background_tokens: so many tokens of ordinary text count as positions whose reads should not change.

    Raises:
        ValueError: several memory layers, no lesson, counts that do not fit, a batch without the mask, or a setting
            outside its range; the model is left as it was.
    """

    last_selection: Mapping = {}

    def __init__(
        self,
        model: nn.Module,
        background: Mapping[str, SlotCounts],
        lessons: Sequence[Batch],
        num_rows: int = 100,
        idf_power: float = 8.0,
        positions: str = "subject",
        ridge: float = 0.01,
        background_tokens: float = 0.0,
    ):
        if positions not in POSITIONS:
            raise ValueError(f"positions is {positions!r}, must be {' or '.join(map(repr, POSITIONS))}")
        if not ridge > 0 or background_tokens < 0:
            raise ValueError(f"ridge={ridge}, background_tokens={background_tokens}: ridge > 0, the other at least 0")
        self.model, self._mask = model, POSITIONS[positions]
        self._name, self._table, self._uniform = _only_table(model)
        if self._name not in (background or {}):
            raise ValueError(f"no background counts of table {self._name!r}; there are {sorted(background or {})}")
        if background[self._name].num_slots != (num_slots := self._table.num_embeddings):
            counted = background[self._name].num_slots
            raise ValueError(f"background counts of table {self._name!r} have {counted} slots, it has {num_slots}")
        background[self._name].check_keys(self._name, product_key_fingerprints(model)[self._name])
        if not 1 <= num_rows <= num_slots:
            raise ValueError(f"num_rows is {num_rows}, must be between 1 and the table's {num_slots} slots")
        if not len(lessons):
            raise ValueError("there are no lessons: the reads that may change are made of their batches")
        self._background = background[self._name].to(torch.device("cpu"))
        self._settings = {"num_rows": num_rows, "idf_power": float(idf_power), "positions": positions}
        self._settings |= {"ridge": float(ridge), "background_tokens": float(background_tokens)}
        self._lessons = [self._lesson(batch, number) for number, batch in enumerate(lessons)]
        self._trainable = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
        self._hook = self._table.register_forward_hook(self._change)
        self._id: str | None = None
        self._number_of: dict[str, int] = {}
        self._placed: list[tuple[Tensor, _Lesson, int, int]] = []  # where in the batch, whose positions, which
        self._placed_id, self._inside = "", False

    def _lesson(self, batch: Batch, number: int) -> _Lesson:
        places, count = {}, 0
        for key, at_P in self._sequences(batch):
            if key not in places:
                places[key] = count, count + len(at_P)
                count += len(at_P)
        if not count:
            raise ValueError(f"lesson {number} has no position that counts: look at the {self._mask} of its batch")
        weight = self._table.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return _Lesson(places, nn.Parameter(torch.zeros(count, weight.shape[1], dtype=dtype, device=weight.device)))

    def _sequences(self, batch: Batch) -> Iterator[tuple[bytes, Tensor]]:
        """The key of each sequence of a batch, and where its positions lie among all of the batch's."""
        if self._mask not in batch:
            raise ValueError(f"the batch has no {self._mask!r}, only {sorted(batch)}")
        ids_BL, there_BL, counts_BL = (batch[key].cpu() for key in ("input_ids", "attention_mask", self._mask))
        for row, (ids_L, there_L, counts_L) in enumerate(zip(ids_BL, there_BL.bool(), counts_BL.bool(), strict=True)):
            yield sequence_key(ids_L[there_L]), row * len(ids_L) + counts_L.nonzero()[:, 0]

    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer steps: of each lesson, the changes of its positions' reads."""
        return [lesson.wanted for lesson in self._lessons]

    def watch(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Let every step forget its gradients: one lesson's step moves no other lesson's reads, whatever the loop."""

        def forget(_optimizer, _args, _kwargs):
            for wanted in self.parameters():
                wanted.grad = None

        optimizer.register_step_post_hook(forget)
        return optimizer

    def loss(self, batch: Batch) -> Tensor:
        """Forward pass on a batch, with the changes that its reads have so far."""
        with self.selecting(batch):
            return self.model(**{key: value for key, value in batch.items() if key not in MASKS}).loss

    def select(self, micro_batches: Sequence[Batch]) -> None:
        """Nothing: which reads may change does not depend on the step."""

    @contextmanager
    def selecting(self, batch: Batch):
        """A context around a forward pass on ``batch``, whose reads it changes; without gradients it changes nothing.

        Raises:
            ValueError: the batch is not of the lesson that is taught.
        """
        if not torch.is_grad_enabled():
            yield
            return
        found = list(self._sequences(batch))
        self._placed_id, number = self._number([key for key, _ in found])
        lesson = self._lessons[number]
        device = self._table.weight.device
        self._placed = [(at_P.to(device), lesson, *lesson.places[key]) for key, at_P in found if len(at_P)]
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    @contextmanager
    def alongside(self):
        """A context around a forward pass beside the batch's: the untouched model's, as no row has moved."""
        yield

    def begin(self, lesson: str) -> None:
        """Teach this lesson from now on."""
        self._id = lesson

    def _number(self, keys: Sequence[bytes]) -> tuple[str, int]:
        """Which lesson a batch is of, and its number: the one begun, the first with these sequences that is no other's.

        Where none was begun, a lesson is called by its number.
        """
        if self._id in self._number_of:
            candidates = [self._number_of[self._id]]
        else:
            taken = set(self._number_of.values()) if self._id is not None else ()
            candidates = [number for number in range(len(self._lessons)) if number not in taken]
        for number in candidates:
            if all(key in self._lessons[number].places for key in keys):
                id = str(number) if self._id is None else self._id
                self._number_of[id] = number
                return id, number
        raise ValueError(f"the batch is none of lesson {self._id!r}: the finetuner was made with other lessons")

    def _change(self, _table: MemoryTable, inputs: tuple[Tensor, Tensor], read_TV: Tensor) -> Tensor | None:
        """Add to a read what it should change by; in a backward pass as in the forward pass that it runs again."""
        if not self._placed or not (self._inside or in_backward()):
            return None
        if not in_backward():
            self._keep_reads(*inputs)
        at_T = torch.cat([at_P for at_P, *_ in self._placed])
        wanted_TV = torch.cat([lesson.wanted[first:last] for _, lesson, first, last in self._placed])
        return read_TV.index_add(0, at_T, wanted_TV.to(read_TV.dtype))

    def _keep_reads(self, slots_TK: Tensor, weights_TK: Tensor) -> None:
        """What the positions read, the first time: it is the same every time, as no address depends on a value."""
        for at_P, lesson, first, last in self._placed:
            if lesson.slots_PK is None:
                shape = len(lesson.wanted), slots_TK.shape[1]
                lesson.slots_PK, lesson.weights_PK = torch.full(shape, -1, dtype=torch.int32), torch.zeros(shape)
            if not lesson.read_P[first]:
                lesson.slots_PK[first:last] = slots_TK[at_P].int().cpu()
                lesson.weights_PK[first:last] = weights_TK.detach()[at_P].float().cpu()
                if lesson.read_P.all():
                    self._rows(self._placed_id, lesson)  # refuses before any step what it would refuse at the end

    @torch.no_grad()
    def equations(self) -> RowEquations:
        """The lessons taught so far.

        Raises:
            ValueError: of a lesson no slot has a score above 0, so that it would change nothing.
        """
        parts = {id: self._part(id, self._lessons[number]) for id, number in self._number_of.items()}
        product_keys = product_key_fingerprints(self.model)[self._name]
        return RowEquations(
            self._name, self._table.num_embeddings, product_keys, self._settings["ridge"], dict(sorted(parts.items()))
        )

    def _part(self, id: str, lesson: _Lesson) -> LessonEquations:
        rows_R, read_P = self._rows(id, lesson), lesson.read_P
        return LessonEquations(
            lesson.slots_PK[read_P],
            lesson.weights_PK[read_P],
            lesson.wanted.detach().float().cpu()[read_P],
            rows_R,
            self._heard(rows_R),
            fingerprint_of(self._table.weight, rows_R),
        )

    def _rows(self, id: str, lesson: _Lesson) -> Tensor:
        """The slots that a lesson brings, int64, ascending."""
        slots_U, reads_U = lesson.slots_PK[lesson.read_P].long().unique(return_counts=True)
        scores_U = tf_idf(slots_U, reads_U, self._background, self._settings["idf_power"])
        rows_R = top_slots(slots_U, scores_U, self._settings["num_rows"])
        if not len(rows_R):
            raise ValueError(
                f"no slot is selected for lesson {id!r}: all {len(slots_U)} that its positions read are read by each "
                f"of the {self._background.num_documents} background documents: set idf_power to 0"
            )
        return rows_R

    def _heard(self, rows_R: Tensor) -> Tensor:
        """What ordinary text hears of rows: reads a token times the square of a weight, for so many tokens.

        Counts do not tell weights: every read is taken as one of equal weights.
        """
        reads = self._background.reads_N
        tokens = max(1.0, float(reads.sum()) * self._uniform / self._heads)
        return self._settings["background_tokens"] * reads[rows_R].double() / tokens * self._uniform**2

    @property
    def _heads(self) -> int:
        return next(iter(memory_layers(self.model).values())).keys.num_heads

    def capacity(self) -> dict[str, Capacity]:
        """How full the table is; of rows that are not solved for yet, but that are known to be."""
        rows = [self._rows(id, self._lessons[number]) for id, number in self._number_of.items()]
        written_W, writers_W = torch.cat([torch.empty(0, dtype=torch.int64), *rows]).unique(return_counts=True)
        live_N = self._background.reads_N > 0
        slots, live = len(live_N), int(live_N.sum())
        free = slots - live - int((~live_N[written_W]).sum())
        return {
            self._name: Capacity(slots, live, len(written_W), int((writers_W > 1).sum()), free, len(rows)),
        }

    def detach(self) -> MemoryPatch:
        """Solve for the rows, write them, and give the model back as an ordinary one; returns what was changed."""
        patch = self.patch()
        self._hook.remove()
        patch.apply(self.model, any_base=True)  # it is the patch's own
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        return patch

    def patch(self) -> MemoryPatch:
        """The rows of the lessons taught so far, over the untouched model."""
        return self.equations().patch(self.model)

    def state_dict(self) -> dict[str, dict]:
        """What later steps depend on, beside the model and the optimizer's own state; for ``torch.save``."""
        lessons = {
            id: {
                "wanted": self._lessons[number].wanted.detach().cpu(),
                "slots": self._lessons[number].slots_PK,
                "weights": self._lessons[number].weights_PK,
                "number": number,
            }
            for id, number in self._number_of.items()
        }
        product_keys = product_key_fingerprints(self.model)[self._name]
        return {"settings": dict(self._settings), "lessons": lessons, "product_keys": product_keys}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping]) -> None:
        """Go on where the finetuner that gave ``state`` was, with the same lessons and settings.

        Raises:
            ValueError: the state is of other settings, lessons or product keys; nothing is changed then.
        """
        for key, ours in self._settings.items():
            if (theirs := state["settings"].get(key)) != ours:
                raise ValueError(f"the state is of a finetuner with {key} {theirs!r}, this one has {ours!r}")
        if state["product_keys"] != product_key_fingerprints(self.model)[self._name]:
            raise ValueError("the state does not go with this model: it has other product keys")
        for id, kept in state["lessons"].items():
            ours = self._lessons[kept["number"]].wanted.shape if kept["number"] < len(self._lessons) else None
            if kept["wanted"].shape != ours:
                raise ValueError(f"lesson {id!r} has other positions than in the state: {ours}, {kept['wanted'].shape}")
        for id, kept in state["lessons"].items():
            lesson = self._lessons[kept["number"]]
            lesson.wanted.copy_(kept["wanted"])
            lesson.slots_PK, lesson.weights_PK = kept["slots"], kept["weights"]
            self._number_of[id] = kept["number"]


def _only_table(model: nn.Module) -> tuple[str, MemoryTable, float]:
    """The table of a model with one memory layer, its name, and the weight of each slot where all weigh the same."""
    layers = memory_layers(model)
    if len(layers) > 1:
        raise ValueError(
            f"ridge over rows takes one memory layer, the model has {len(layers)}, {', '.join(layers)}: rows that an "
            "earlier one reads move what a later one reads"
        )
    ((name, table),) = unsharded_tables(model).items()
    if table.rows is not None:
        raise ValueError(f"table {name!r} has a finetuner already; detach it first")
    (layer,) = layers.values()
    return name, table, 1 / layer.keys.top_k


OPTIMIZERS = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}


def prepare(model: nn.Module, background: Mapping[str, SlotCounts], settings, lessons=()) -> Prepared:
    """Learn by how much the lessons' reads should change; the rows come at the end.

    Raises:
        ValueError: as of ``RidgeFinetuner``, or several processes.
    """
    at_once = torch.distributed.is_available() and torch.distributed.is_initialized()
    if at_once and (processes := torch.distributed.get_world_size()) > 1:
        raise ValueError(f"learn.method=ridge takes one process, there are {processes}")
    told = {name: getattr(settings, name) for name in ("num_rows", "idf_power", "positions", "ridge")}
    finetuner = RidgeFinetuner(model, background, lessons, background_tokens=settings.background_tokens, **told)
    optimizer = finetuner.watch(OPTIMIZERS[settings.optimizer](finetuner.parameters(), lr=settings.learning_rate))
    equations: list[RowEquations] = []

    def finish() -> MemoryPatch:
        equations.append(finetuner.equations())
        return finetuner.detach()

    return Prepared(model, optimizer, finish, finetuner, beside=lambda folder: equations[-1].save(folder))
