"""Rank memory slots by how much a batch reads them relative to background text, and say how far each may step.

Both are pure functions of counts, so a rule can be checked by hand. Choosing which rows may train is all this
module does; making only those rows move is methods/sparse_memory.py. Only slots that the batch read are ever
looked at: no pass over the table.

Shapes: N slots, U distinct slots read in the batch.
"""

import torch
from torch import Tensor

from memlayer.slots.counts import SlotCounts


def tf_idf(
    slots_U: Tensor,
    reads_U: Tensor,
    background: SlotCounts,
    idf_power: float = 1.0,
    protected_U: Tensor | int = 0,
) -> Tensor:
    """Term frequency in the batch times a power of the inverse document frequency in the background.

    Source: arXiv:2510.15103, section 4, whose rule is ``idf_power=1``; 0 is its ablation, term frequency alone. A
    higher power keeps away from slots that background text reads at all: addresses do not depend on values, so
    text that reads no written slot keeps its logits to the last bit.

    Args:
        slots_U: distinct slots the batch read, int64.
        reads_U: reads of each, int64; padding already excluded.
        background: counts over background documents of the same table.
        idf_power: at least 0.
        protected_U: by how many more background documents each slot counts as read, up to all of them.

    Returns:
        scores_U: float64, at least zero; with a positive power, zero where every background document reads the slot.

    Raises:
        ValueError: ``idf_power`` is negative.
    """
    if not idf_power >= 0:
        raise ValueError(f"idf_power is {idf_power}, must be at least 0")
    frequency_U = reads_U.double() / reads_U.sum().clamp(min=1)
    seen_U = (background.document_frequency_N[slots_U] + protected_U).clamp(max=background.num_documents).double()
    return frequency_U * torch.log((background.num_documents + 1) / (seen_U + 1)) ** idf_power


def kl(
    slots_U: Tensor, reads_U: Tensor, background: SlotCounts, protected_U: Tensor | int = 0, documents: bool = False
) -> Tensor:
    """Each slot's part of the divergence of the batch's reads from the background's: p log(p / q).

    Source: arXiv:2604.05248, whose q is the share of the background's reads. Ours: one read is added to every slot, so
    that q is never 0; ``documents`` takes the share of document frequencies, on which a few long documents weigh less.

    Args:
        slots_U, reads_U, background, protected_U: as of ``tf_idf``; a protected slot counts as read as often more as a
            document reads a slot on average.

    Returns:
        scores_U: float64, below zero where the background reads the slot more than the batch does.
    """
    counts_N = background.document_frequency_N if documents else background.reads_N
    a_document = 1.0 if documents else background.reads_a_document
    p_U = reads_U.double() / reads_U.sum().clamp(min=1)
    q_U = (counts_N[slots_U] + protected_U * a_document + 1).double() / (counts_N.sum() + len(counts_N))
    return p_U * torch.log(p_U / q_U)


def step_shares(reads_U: Tensor, mean_reads: float, damping: float) -> Tensor:
    """What share of its step each slot takes: 1 / (1 + damping * its background reads / those of the mean slot).

    Ranking says which slots move; this says how far, so that a slot that ordinary text reads now and then need not be
    left out. Source: after MEMIT (arXiv:2210.07229, section 4.2), whose covariance of background keys weighs a change
    by what ordinary text hears of it; here the diagonal of that over slots, from counts, on each step.

    Args:
        reads_U: how often the background reads each slot.
        mean_reads: the same of the mean slot of the table, above 0.
        damping: at least 0; with 1 the mean slot takes half a step.

    Returns:
        shares_U: float64, above 0 and at most 1, which is the share of a slot that no background text reads.
    """
    return 1 / (1 + damping * reads_U.double() / mean_reads)


def at_random(slots_U: Tensor) -> Tensor:
    """A control: as many rows, and any of those read. The same reads get the same scores."""
    generator = torch.Generator().manual_seed(int(slots_U.sum()))
    return torch.rand(len(slots_U), dtype=torch.float64, generator=generator).to(slots_U.device)


def read_by_each(slots_PK: Tensor, sequence_P: Tensor) -> Tensor:
    """The slots read, each as often as there are sequences that read it.

    Args:
        slots_PK, sequence_P: as of ``read_by_all``.

    Returns:
        slots_M: dtype of ``slots_PK``, repeated.
    """
    span = int(slots_PK.max()) + 1 if slots_PK.numel() else 1
    return ((sequence_P[:, None] * span + slots_PK).flatten().unique() % span).to(slots_PK.dtype)


def read_by_all(slots_PK: Tensor, sequence_P: Tensor, num_sequences: int) -> Tensor:
    """The slots that every sequence reads, each as often as the one that reads it least.

    A lesson in several wordings is then written where all of them look, and not where one looks often.

    Args:
        slots_PK: slots read at each of P positions.
        sequence_P: of which sequence each position is, 0 to ``num_sequences`` - 1.

    Returns:
        slots_M: dtype of ``slots_PK``, ascending, repeated.
    """
    span = int(slots_PK.max()) + 1 if slots_PK.numel() else 1
    pairs_U, reads_U = (sequence_P[:, None] * span + slots_PK).flatten().unique(return_counts=True)
    slots_V, place_U, sequences_V = (pairs_U % span).unique(return_inverse=True, return_counts=True)
    least_V = reads_U.new_zeros(len(slots_V)).scatter_reduce(0, place_U, reads_U, "amin", include_self=False)
    return slots_V.repeat_interleave(least_V.where(sequences_V == num_sequences, 0)).to(slots_PK.dtype)


def top_slots(slots_U: Tensor, scores_U: Tensor, num_rows: int) -> Tensor:
    """The ``num_rows`` slots of highest score, ties to the lower slot; slots of score zero never.

    Returns:
        slots_R: int64, ascending, R at most ``num_rows``.

    Raises:
        ValueError: ``num_rows`` is not positive.
    """
    if num_rows < 1:
        raise ValueError(f"num_rows is {num_rows}, must be at least 1")
    if len(slots_U) > num_rows:
        # Sorting everything that was read would take longer than the backward pass; ties with the last one stay in.
        in_reach_U = scores_U >= scores_U.topk(num_rows).values[-1]
        slots_U, scores_U = slots_U[in_reach_U], scores_U[in_reach_U]
    order_U = torch.argsort(slots_U)
    slots_U, scores_U = slots_U[order_U], scores_U[order_U]
    best = torch.argsort(scores_U, descending=True, stable=True)[:num_rows]
    return slots_U[best[scores_U[best] > 0]].sort().values
