"""Background counts: how often, and in how many documents, ordinary text reads each slot.

Counted once per checkpoint and saved beside it. What a document was is part of the file, because
the inverse document frequency means nothing without it.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass
class SlotCounts:
    """Reads of each slot of one table over background documents.

    Attributes:
        reads_N: reads of each slot, int64.
        document_frequency_N: in how many documents a slot was read at least once, int64.
        num_documents: B.
        document: what a document was, in words.
    """

    reads_N: Tensor
    document_frequency_N: Tensor
    num_documents: int
    document: str

    @classmethod
    def empty(cls, num_slots: int, document: str) -> "SlotCounts":
        """Counts of nothing yet."""
        zeros = torch.zeros(num_slots, dtype=torch.int64)
        return cls(zeros, zeros.clone(), 0, document)

    @property
    def num_slots(self) -> int:
        """N."""
        return len(self.reads_N)

    def to(self, device: torch.device) -> "SlotCounts":
        """The same counts on ``device``."""
        return replace(
            self, reads_N=self.reads_N.to(device), document_frequency_N=self.document_frequency_N.to(device)
        )

    def with_frequency(self, document_frequency_N: Tensor) -> "SlotCounts":
        """The same counts with other document frequencies."""
        return replace(self, document_frequency_N=document_frequency_N)

    def with_documents(self, slots_W: Tensor, documents: int) -> "SlotCounts":
        """Counts as if ``documents`` of the background's documents, more than before, had read these slots too.

        The number of documents stays, so no slot's document frequency exceeds it.
        """
        document_frequency_N = self.document_frequency_N.clone()
        more_W = document_frequency_N[slots_W] + documents
        document_frequency_N[slots_W] = more_W.clamp(max=self.num_documents)
        return self.with_frequency(document_frequency_N)

    def update(self, slots_TK: Tensor, document_T: Tensor) -> None:
        """Add whole documents: the slots each position read and the document it belongs to.

        Args:
            slots_TK: slots read, int64; padding already excluded.
            document_T: which document a position is part of, int64 from 0; with several layers on one
                table, the positions come once per layer and ``document_T`` repeats.

        Raises:
            ValueError: a slot lies outside the table, or the positions do not match.
        """
        if bool(len(slots_TK)) != bool(len(document_T)) or len(slots_TK) % max(1, len(document_T)):
            raise ValueError(f"slots of {len(slots_TK)} positions, documents of {len(document_T)}")
        if not slots_TK.numel():
            return
        lowest, highest = int(slots_TK.min()), int(slots_TK.max())
        if lowest < 0 or highest >= self.num_slots:
            raise ValueError(f"slots {lowest} to {highest} read, the table has {self.num_slots}")
        slots_TK, document_T = slots_TK.cpu(), document_T.cpu()
        document_T = document_T.repeat(len(slots_TK) // len(document_T))
        self.reads_N += torch.bincount(slots_TK.reshape(-1), minlength=self.num_slots)
        pairs = (document_T[:, None] * self.num_slots + slots_TK).unique()
        self.document_frequency_N += torch.bincount(pairs % self.num_slots, minlength=self.num_slots)
        self.num_documents += len(document_T.unique())

    def summary(self) -> dict[str, float]:
        """Live slots and how uneven the reads are: the share that the busiest 1 % of slots take."""
        busiest = max(1, self.num_slots // 100)
        total = max(1, int(self.reads_N.sum()))
        return {
            "documents": self.num_documents,
            "live_slots": int((self.reads_N > 0).sum()),
            "num_slots": self.num_slots,
            "top_1_percent_share": float(self.reads_N.topk(busiest).values.sum()) / total,
        }


def save_counts(counts: dict[str, SlotCounts], path: str | Path) -> None:
    """Write the counts of every table to one safetensors file."""
    tensors, metadata = {}, {"format": "pt"}
    for table, c in counts.items():
        tensors[f"{table}.reads"] = c.reads_N
        tensors[f"{table}.document_frequency"] = c.document_frequency_N
        metadata[f"{table}.num_documents"] = str(c.num_documents)
        metadata[f"{table}.document"] = c.document
    save_file(tensors, path, metadata=metadata)


def load_counts(path: str | Path, num_slots: dict[str, int]) -> dict[str, SlotCounts]:
    """Read counts for the tables of a model.

    Args:
        path: a file that ``save_counts`` wrote.
        num_slots: slots of each table the caller has.

    Raises:
        ValueError: the file lacks a table or counts another number of slots.
        FileNotFoundError: there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no background counts at {path}; pretraining writes them")
    counts = {}
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
        for table, expected in num_slots.items():
            if f"{table}.reads" not in set(file.keys()):
                raise ValueError(f"{path} has no counts of table {table!r}")
            reads_N = file.get_tensor(f"{table}.reads")
            if len(reads_N) != expected:
                raise ValueError(f"{path} counts {len(reads_N)} slots of {table!r}, the model has {expected}")
            counts[table] = SlotCounts(
                reads_N,
                file.get_tensor(f"{table}.document_frequency"),
                int(metadata[f"{table}.num_documents"]),
                metadata[f"{table}.document"],
            )
    return counts
