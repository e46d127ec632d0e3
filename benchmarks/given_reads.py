"""A model of which only the lookup is left, its reads drawn beforehand: what a fact step is measured on.

Slots and scores are given, because the search that finds them, and the rest of a model, cost every way of stepping the
same. A slot's popularity is log-normal and shared with the background documents; a batch about one fact reads
by that popularity times a tilt of its own.

Shapes: T tokens, H heads, K slots read per head, N slots, V value width.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memlayer.layers.memory import MemoryLayer, MemoryTable
from memlayer.layers.product_keys import FindsSlots
from memlayer.slots.counts import SlotCounts

TABLE = "memory.0"
HEADS = 4
NUM_DOCUMENTS = 1000
# The busiest 1 % of slots then take a fifth of the background reads, and the same of those of a batch.
SKEW = 1.5


class GivenReads(FindsSlots):
    """Stands where product keys stand, and gives the same scores and slots (T, H, K) to whatever it is asked."""

    def __init__(self, scores_THK: Tensor, slots_THK: Tensor):
        super().__init__()
        for name, tensor in (("scores_THK", scores_THK), ("slots_THK", slots_THK)):
            self.register_buffer(name, tensor, persistent=False)  # so that it goes where the model goes

    def forward(self, _) -> tuple[Tensor, Tensor]:
        self.tell(self.slots_THK)
        return self.scores_THK, self.slots_THK


class BareLookup(MemoryLayer):
    """A memory layer without projections: softmax and lookup are all of it."""

    def __init__(self, table: MemoryTable, keys: nn.Module):
        nn.Module.__init__(self)
        self.keys, self._table = keys, [table]
        self.with_torch = False  # whether torch's own lookup reads the table, whose gradient is then dense

    def forward(self, hidden: Tensor) -> Tensor:
        scores_THK, slots_THK = self.keys(hidden)
        slots_TK, weights_TK = slots_THK.flatten(1), F.softmax(scores_THK, dim=-1).flatten(1)
        if self.with_torch:
            return F.embedding_bag(slots_TK, self.table.weight, mode="sum", per_sample_weights=weights_TK)
        return self.table(slots_TK, weights_TK)


class Reader(nn.Module):
    """The least that a finetuner takes for a causal model with memory.

    The loss is the product of reads and ``upstream_TV``, so that its gradient is ``upstream_TV`` and costs little.
    """

    def __init__(self, table: MemoryTable, keys: nn.Module, upstream_TV: Tensor):
        super().__init__()
        self.memory, self.layer = nn.ModuleList([table]), BareLookup(table, keys)
        self.register_buffer("upstream_TV", upstream_TV, persistent=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=torch.dot(self.layer(input_ids).flatten(), self.upstream_TV.flatten()))


def make_model(num_slots: int, width: int, tokens: int, reads: int) -> tuple[Reader, dict[str, SlotCounts]]:
    """A model whose reads are drawn, and the counts to expect of background documents as long as its batch."""
    popularity_N = (SKEW * torch.randn(num_slots)).exp().double()
    tilt_N = (SKEW * torch.randn(num_slots)).exp().double()
    shape = (tokens, HEADS, reads // HEADS)
    slots_THK = torch.multinomial(popularity_N * tilt_N, tokens * reads, replacement=True).view(shape)
    expected_N = popularity_N / popularity_N.sum() * tokens * reads
    seen_N = NUM_DOCUMENTS * (1 - (-expected_N).exp())
    counts = SlotCounts((NUM_DOCUMENTS * expected_N).long(), seen_N.long(), NUM_DOCUMENTS, "as many reads as a batch")
    keys = GivenReads(torch.randn(shape), slots_THK)
    return Reader(make_table(num_slots, width), keys, torch.randn(tokens, width)), {TABLE: counts}


@torch.no_grad()
def make_table(num_slots: int, width: int) -> MemoryTable:
    """A table that repeats itself after 4096 rows, because drawing a billion numbers takes longer than all else."""
    with torch.device("meta"):
        table = MemoryTable(num_slots, width)
    table = table.to_empty(device="cpu")
    block = torch.randn(min(4096, num_slots), width) * width**-0.5
    for rows in table.weight.split(len(block)):
        rows.copy_(block[: len(rows)])
    return table
