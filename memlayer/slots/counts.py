"""Background counts: how often, and in how many documents, ordinary text reads each slot.

Counted once per checkpoint and saved beside it. What a document was is part of the file, because
the inverse document frequency means nothing without it; and so is with which product keys was counted,
because with other keys a slot means something else.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

COUNTS_FILE = "background_counts.safetensors"  # beside the weights of a checkpoint
TOLD = "counts"  # key of the file's metadata
COUNT_AGAIN = "count again with memlayer.jobs.count.count, or run the pretraining or the retrofit again"


@dataclass
class SlotCounts:
    """Reads of each slot of one table over background documents.

    Attributes:
        reads_N: reads of each slot, int64.
        document_frequency_N: in how many documents a slot was read at least once, int64.
        num_documents: B.
        document: what a document was, in words.
        product_keys: SHA-256 of the product keys that they were counted with, by parameter name, see
            ``decoders.fingerprint``; None where nobody said.
    """

    reads_N: Tensor
    document_frequency_N: Tensor
    num_documents: int
    document: str
    product_keys: dict[str, str] | None = None

    @classmethod
    def empty(cls, num_slots: int, document: str, product_keys: dict[str, str] | None = None) -> "SlotCounts":
        """Counts of nothing yet."""
        zeros = torch.zeros(num_slots, dtype=torch.int64)
        return cls(zeros, zeros.clone(), 0, document, product_keys)

    def check_keys(self, table: str, product_keys: Mapping[str, str]) -> None:
        """Refuse a model with other product keys than were counted with.

        Raises:
            ValueError: they differ, and it is known which were counted with.
        """
        ours = product_keys if self.product_keys is None else self.product_keys
        if other := sorted(name for name in ours.keys() | product_keys if ours.get(name) != product_keys.get(name)):
            raise ValueError(
                f"background counts of table {table!r} were counted with other product keys at {', '.join(other)}: "
                f"they belong to another model or state; {COUNT_AGAIN}"
            )

    @property
    def num_slots(self) -> int:
        """N."""
        return len(self.reads_N)

    @property
    def reads_a_document(self) -> float:
        """How often a document reads a slot that it reads at all, on average."""
        return float(self.reads_N.sum() / self.document_frequency_N.sum().clamp(min=1))

    def to(self, device: torch.device) -> "SlotCounts":
        """The same counts on ``device``."""
        return replace(self, reads_N=self.reads_N.to(device), document_frequency_N=self.document_frequency_N.to(device))

    def with_frequency(self, document_frequency_N: Tensor) -> "SlotCounts":
        """The same counts with other document frequencies."""
        return replace(self, document_frequency_N=document_frequency_N)

    def raised(self, slots_P: Tensor, documents_P: Tensor) -> "SlotCounts":
        """Counts in which these slots were read by so many more background documents, or fewer if negative; exactly.

        Raises:
            ValueError: a document frequency would leave 0 to B, so these are not the counts that were meant.
        """
        document_frequency_N = self.document_frequency_N.clone()
        document_frequency_N[slots_P] += documents_P
        changed_P = document_frequency_N[slots_P]
        outside = int(((changed_P < 0) | (changed_P > self.num_documents)).sum())
        if outside:
            raise ValueError(
                f"the document frequency of {outside} slots would leave 0 to {self.num_documents}: "
                "these are not the background counts that the patch was made with"
            )
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


def save_counts(counts: Mapping[str, SlotCounts], path: str | Path) -> None:
    """Write the counts of every table to one safetensors file.

    Raises:
        ValueError: counts do not say with which product keys they were counted; nothing is written then.
    """
    tensors, told = {}, {}
    for table, c in counts.items():
        if c.product_keys is None:
            raise ValueError(
                f"counts of table {table!r} do not say with which product keys they were counted: "
                "set their product_keys to memlayer.decoders.fingerprint.product_key_fingerprints(model)[table]"
            )
        tensors[f"{table}.reads"] = c.reads_N
        tensors[f"{table}.document_frequency"] = c.document_frequency_N
        told[table] = {
            "num_documents": c.num_documents,
            "document": c.document,
            "product_keys": c.product_keys,
        }
    # One key: safetensors writes several in any order, and the same counts would not be the same bytes.
    save_file(tensors, path, metadata={TOLD: json.dumps(told, sort_keys=True)})


def load_counts(
    path: str | Path, num_slots: Mapping[str, int], product_keys: Mapping[str, Mapping[str, str]] | None = None
) -> dict[str, SlotCounts]:
    """Read counts for the tables of a model.

    Args:
        path: a file that ``save_counts`` wrote.
        num_slots: slots of each table the caller has.
        product_keys: ``product_key_fingerprints`` of the caller's model; without, only the finetuner compares.

    Raises:
        ValueError: the file is damaged, lacks a table, counts another number of slots, or was counted with other
            product keys or before counts said with which.
        FileNotFoundError: there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no background counts at {path}; jobs pretrain and retrofit write them beside the model, and "
            "memlayer.jobs.count.count counts alone"
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
    except SafetensorError as error:
        raise ValueError(
            f"background counts {path} are damaged ({error}): {COUNT_AGAIN}; a Git LFS pointer needs git lfs pull"
        ) from error
    counts = {}
    for table, expected in num_slots.items():
        if f"{table}.reads" not in tensors:
            raise ValueError(f"{path} has no counts of table {table!r}")
        reads_N = tensors[f"{table}.reads"]
        if len(reads_N) != expected:
            raise ValueError(f"{path} counts {len(reads_N)} slots of {table!r}, the model has {expected}")
        if TOLD not in metadata:
            raise ValueError(f"{path} does not say with which product keys was counted: {COUNT_AGAIN}")
        told = json.loads(metadata[TOLD])[table]
        counts[table] = SlotCounts(reads_N, tensors[f"{table}.document_frequency"], **told)
        if product_keys is not None:
            counts[table].check_keys(table, product_keys[table])
    return counts
