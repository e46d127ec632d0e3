"""Rows of one memory layer as the answer to a least squares problem, from which a lesson can be left out exactly.

A memory layer's read is linear in the rows: at a position that reads slot s with weight w_s, rows that change by d_s
change the read by sum_s w_s d_s. Where it is known by how much each position's read should change, the rows are those
that minimise

    sum over positions |sum_s w_s d_s - wanted|^2  +  sum over rows (ridge + background_s) |d_s|^2

over the rows of all lessons. ``background_s`` is what ordinary text would hear of row s, the expected square of its
reads, from counts: slots that are read together are taken as unrelated, so it is a diagonal.

Of each lesson is kept what its positions read, what they want and which rows it brought: the factors of its part of the
normal equations, and smaller than that part. Lessons are sorted before they are added up, so the rows depend on which
lessons there are and on no order, to the bit; a lesson left out leaves the rows that a run without it would have.

Solved in the positions rather than the rows (W'(WW' + I)^-1 with W scaled by the damping is (W'W + I)^-1 W'), of which
there are fewer: with T positions a matrix of T x T float64, which 10,000 take 0.8 GB for.

Left out: a background term with the reads of kept text, which would count slots that are read together as such.

Source: ours. Two steps, targets by gradient and then weights by regularised least squares, are MEMIT's
(arXiv:2210.07229), there for dense matrices whose inputs all facts share.

Shapes: P positions of a lesson, T of all lessons, K slots read at a position, V value width, R rows, B rows of a block.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from memlayer.decoders.attach import unsharded_tables
from memlayer.decoders.fingerprint import differing, fingerprint, product_key_fingerprints
from memlayer.files import reading
from memlayer.methods.terms import unheard
from memlayer.patch import Base, MemoryPatch
from memlayer.patch.table import TablePatch

FILE = "equations.safetensors"
TOLD = "equations"  # key of the file's metadata
BLOCK = 2048  # rows at a time: a block of reads is T x 2048 float64


@dataclass(frozen=True, eq=False)
class LessonEquations:
    """One lesson's part.

    Attributes:
        slots_PK: what its positions read, int32.
        weights_PK: with which weights, float32.
        wanted_PV: by how much the read of each should change, float32.
        rows_R: the slots that may change for it, int64, ascending.
        background_R: what ordinary text hears of each, float64, at least 0.
        originals: SHA-256 of what the table holds there in the model that the changes are wanted of.
    """

    slots_PK: Tensor
    weights_PK: Tensor
    wanted_PV: Tensor
    rows_R: Tensor
    background_R: Tensor
    originals: str


TENSORS = tuple(part.name for part in fields(LessonEquations) if part.name != "originals")


def fingerprint_of(weight: Tensor, rows_R: Tensor) -> str:
    """SHA-256 of these rows of a table."""
    return fingerprint({"rows": weight.detach()[rows_R.to(weight.device)]})


@dataclass(frozen=True, eq=False)
class RowEquations:
    """The lessons' parts, and the table that they are about.

    Attributes:
        table: its name in the model.
        num_slots: of the table.
        product_keys: as of ``TablePatch``.
        ridge: above 0; how much a row's change costs.
        lessons: by id.
    """

    table: str
    num_slots: int
    product_keys: dict[str, str]
    ridge: float
    lessons: Mapping[str, LessonEquations] = field(default_factory=dict)
    _solution: list[Tensor] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self):
        if not self.ridge > 0:
            raise ValueError(f"ridge is {self.ridge}, must be above 0: without it rows are not determined")

    def without(self, lessons: Iterable[str]) -> "RowEquations":
        """The same without some lessons; what is solved then is what was solved if they had never been taught.

        Raises:
            ValueError: one of them is not there.
        """
        gone = list(lessons)
        if unknown := [lesson for lesson in gone if lesson not in self.lessons]:
            raise ValueError(f"there is no lesson {unknown[0]!r} among the {len(self.lessons)} of the equations")
        return replace(self, lessons={name: part for name, part in self.lessons.items() if name not in gone})

    def joined(self, other: "RowEquations") -> "RowEquations":
        """The lessons of both, as one run over the same model would have taught them.

        Raises:
            ValueError: they are of other tables or settings, or have a lesson in common.
        """
        for name in ("table", "num_slots", "product_keys", "ridge"):
            if (ours := getattr(self, name)) != (theirs := getattr(other, name)):
                raise ValueError(f"equations with {name} {ours!r} and with {theirs!r} cannot be joined")
        if common := sorted(self.lessons.keys() & other.lessons):
            raise ValueError(f"both equations have lesson {common[0]!r}: leave it out of one")
        return replace(self, lessons={**self.lessons, **other.lessons})

    def solve(self, progress: Callable[[float], object] = unheard) -> tuple[Tensor, Tensor]:
        """The slots that change, int64 (R,), ascending, and by how much, float64 (R, V); kept for the next call.

        Args:
            progress: called with each share of the work that is done.

        Raises:
            ValueError: there is no lesson.
        """
        if not self._solution:
            self._solution.extend(self._solve(progress))
        rows_R, change_RV = self._solution
        return rows_R, change_RV

    def _solve(self, progress: Callable[[float], object]) -> tuple[Tensor, Tensor]:
        if not self.lessons:
            raise ValueError("there is no lesson in the equations")
        parts = [self.lessons[name] for name in sorted(self.lessons)]
        slots_TK, weights_TK, wanted_TV = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("slots_PK", "weights_PK", "wanted_PV")
        )
        rows_R = torch.cat([part.rows_R for part in parts]).unique()
        damping_R = torch.empty(len(rows_R), dtype=torch.float64)
        for part in parts:  # a slot's background is that of the slot, whichever lesson brought it
            damping_R[torch.searchsorted(rows_R, part.rows_R.contiguous())] = self.ridge + part.background_R
        blocks = list(zip(rows_R.split(BLOCK), damping_R.split(BLOCK), strict=True))
        gram_TT = torch.eye(len(wanted_TV), dtype=torch.float64)
        for slots_B, damping_B in blocks:
            reads_TB = dense_reads(slots_TK, weights_TK, slots_B)
            gram_TT += (reads_TB / damping_B) @ reads_TB.T
            progress(0.5 / len(blocks))
        solved_TV = torch.cholesky_solve(wanted_TV.double(), torch.linalg.cholesky(gram_TT))
        changes = []
        for slots_B, damping_B in blocks:
            reads_TB = dense_reads(slots_TK, weights_TK, slots_B)
            changes.append(reads_TB.T @ solved_TV / damping_B[:, None])
            progress(0.5 / len(blocks))
        return rows_R, torch.cat(changes)

    def missed(self) -> dict[str, float]:
        """Of each lesson, what share of the length of its wanted changes the solution leaves; 0 where it wants none."""
        rows_R, change_RV = self.solve()
        missed = {}
        for name, part in self.lessons.items():
            at_PK, weights_PK = _found(part.slots_PK, part.weights_PK, rows_R)
            wanted_PV = part.wanted_PV.double()
            left_PV = wanted_PV - (weights_PK[..., None] * change_RV[at_PK]).sum(1)
            missed[name] = float(left_PV.norm() / wanted_PV.norm()) if wanted_PV.any() else 0.0
        return missed

    def patch(self, model: nn.Module) -> MemoryPatch:
        """The rows over an untouched model as a patch; the model stays as it is.

        Raises:
            ValueError: the model has no such table, or other product keys, or patches in its rows already.
        """
        tables = unsharded_tables(model)
        if self.table not in tables or len(tables[self.table].weight) != self.num_slots:
            found = {name: len(table.weight) for name, table in tables.items()}
            raise ValueError(
                f"the equations are of {self.num_slots} slots of table {self.table!r}, the model has {found}"
            )
        if other := differing(self.product_keys, product_key_fingerprints(model)[self.table]):
            raise ValueError(f"the equations were made with other product keys at {', '.join(other)}")
        weight = tables[self.table].weight.detach()
        for name, part in self.lessons.items():
            if fingerprint_of(weight, part.rows_R) != part.originals:
                raise ValueError(
                    f"table {self.table!r} does not hold at the rows of lesson {name!r} what it held when that was "
                    "taught: take patches off the model first"
                )
        rows_R, rows, originals = torch.empty(0, dtype=torch.int64), weight[:0].cpu(), weight[:0].cpu()
        if self.lessons:
            rows_R, change_RV = self.solve()
            originals = weight[rows_R.to(weight.device)].cpu()
            rows = (originals.double() + change_RV).to(originals.dtype)  # rounded once
        lessons = {name: part.rows_R for name, part in sorted(self.lessons.items())}
        table = {"num_slots": self.num_slots, "product_keys": self.product_keys}
        changed = TablePatch.of_changed(rows_R, rows, originals, lessons, **table)
        return MemoryPatch({self.table: changed}, base=Base.of(model))

    def save(self, folder: Path) -> None:
        """Write them as ``equations.safetensors`` into a folder that is there."""
        names = sorted(self.lessons)
        tensors = {
            f"{n}.{part}": getattr(self.lessons[id], part).contiguous()
            for n, id in enumerate(names)
            for part in TENSORS
        }
        told = {key: getattr(self, key) for key in ("table", "num_slots", "product_keys", "ridge")}
        told |= {"lessons": {name: self.lessons[name].originals for name in names}}
        save_file(tensors, folder / FILE, metadata={TOLD: json.dumps(told)})

    @classmethod
    def load(cls, folder: str | Path) -> "RowEquations":
        """What ``save`` wrote into a folder.

        Raises:
            FileNotFoundError: nothing did.
            ValueError: the file is damaged, or another one.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(f"no {FILE} in {folder}: a learning run with learn.method=ridge writes it")
        with reading(path), safe_open(str(path), framework="pt") as file:
            if TOLD not in (metadata := file.metadata() or {}):
                raise ValueError(f"{path} holds no equations of rows")
            told = json.loads(metadata[TOLD])
            lessons = {}
            for n, (name, originals) in enumerate(told.pop("lessons").items()):
                tensors = {part: file.get_tensor(f"{n}.{part}") for part in TENSORS}
                lessons[name] = LessonEquations(**tensors, originals=originals)
        return cls(**told, lessons=lessons)


def dense_reads(slots_TK: Tensor, weights_TK: Tensor, slots_B: Tensor) -> Tensor:
    """How much each position reads of each of these slots, ascending: float64 (T, B); heads that read one add up."""
    at_TK, of_these_TK = _found(slots_TK, weights_TK, slots_B)
    return torch.zeros(len(slots_TK), len(slots_B), dtype=torch.float64).scatter_add_(1, at_TK, of_these_TK)


def _found(slots_TK: Tensor, weights_TK: Tensor, slots_B: Tensor) -> tuple[Tensor, Tensor]:
    """Where among these slots, ascending, each read's is; and its weight, 0 where it is of none of them."""
    at_TK = torch.searchsorted(slots_B, slots_TK.long().contiguous()).clamp(max=len(slots_B) - 1)
    return at_TK, weights_TK.double().where(slots_B[at_TK] == slots_TK, 0)
