"""Count background reads: which slots of a model's tables ordinary text reads, document by document."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from tqdm.auto import tqdm

from memlayer.decoders.attach import memory_tables, record_reads
from memlayer.decoders.fingerprint import product_key_fingerprints
from memlayer.layers.memory import MemoryTable
from memlayer.slots.counts import SlotCounts


def count(
    model: nn.Module, documents: Sequence, make_batch: Callable, words: str, per_batch: int
) -> dict[str, SlotCounts]:
    """Count which slots of each table the documents read; what is saved beside a checkpoint as background.

    Args:
        documents: each a list of sequences.
        make_batch: from a list of sequences to ``input_ids`` and ``attention_mask``.
        words: what a document is.
        per_batch: documents run at a time.

    Returns:
        by the name of the table; nothing of a control that has none.
    """
    if not any(isinstance(module, MemoryTable) for module in model.modules()):
        return {}
    keys, tables = product_key_fingerprints(model), memory_tables(model)
    counts = {name: SlotCounts.empty(t.num_embeddings, words, keys[name]) for name, t in tables.items()}
    model.eval()
    with (
        torch.no_grad(),
        record_reads(model) as reads,
        tqdm(total=len(documents), desc="counting background reads", unit="document") as bar,
    ):
        for first in range(0, len(documents), per_batch):
            some = documents[first : first + per_batch]
            batch = make_batch([sequence for document in some for sequence in document])
            mask = batch["attention_mask"].to(model.device)
            reads.run(model.base_model, input_ids=batch["input_ids"].to(model.device), attention_mask=mask)
            document_of_sequence = torch.repeat_interleave(torch.tensor([len(d) for d in some]))
            document_of_position = document_of_sequence[mask.cpu().nonzero()[:, 0]]
            for name, slots in reads.slots(mask).items():
                counts[name].update(slots, document_of_position)
            bar.update(len(some))
    return counts
