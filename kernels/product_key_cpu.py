"""Search in torch: the exact k best of n * n product-key slots, from two score lists of n.

With both lists ranked from 1, the pairs (a, b) with a <= i and b <= j all score at least as much as
(i, j) and, at equal score, have lower slots. There are i * j of them, so only pairs with i * j <= k can be
among the k best: 119 candidates rather than 1,024 at k = 32.

float32 on CPUs is sorted by topk_cpu.py, a block of tokens that stays in the cache at a time. What a few tokens
need, float64, what product_key.py does not take on a GPU, and everything where numpy has no sort that is faster, goes
through torch.topk.

Shapes: T tokens, H heads, n half-keys, K slots read, Q key width of a half, C candidate pairs, B tokens of a
block, X = H * 2 halves, Y pairs of a token and a head.
"""

import torch
from torch import Tensor

from . import topk_cpu
from .topk_cpu import row_topk
from .vector_sorts import NONE

FEW_SCORES = 1 << 14  # half scores of a token or two; torch.topk finds the best of these before topk_cpu.py has begun
BLOCK_SCORES = 1 << 19  # half scores for each thread at a time: fewer cost more calls, more leave the cache


def search(queries_TH2Q: Tensor, half_keys_H2nQ: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores (float32, float64 for float64 inputs) and slots (int64) of the k best pairs, both (T, H, K)."""
    num_tokens, heads, _, _ = queries_TH2Q.shape
    num_scores = num_tokens * half_keys_H2nQ.shape[:3].numel()
    dtype = torch.promote_types(queries_TH2Q.dtype, torch.float32)
    queries_TH2Q, half_keys_H2nQ = queries_TH2Q.detach().to(dtype), half_keys_H2nQ.detach().to(dtype)
    sortable = dtype == torch.float32 and queries_TH2Q.is_cpu and topk_cpu.SORTS != NONE
    if sortable and num_scores > FEW_SCORES:
        return SortedSearch(num_tokens, half_keys_H2nQ, k).search(queries_TH2Q)
    halves_H2Tn = queries_TH2Q.permute(1, 2, 0, 3) @ half_keys_H2nQ.transpose(-1, -2)
    first_Yn, second_Yn = halves_H2Tn.permute(1, 2, 0, 3).flatten(1, 2)
    i_YK, j_YK = exact_topk(first_Yn, k), exact_topk(second_Yn, k)
    first_YK, second_YK = first_Yn.gather(1, i_YK), second_Yn.gather(1, j_YK)
    scores_YK, slots_YK = exact_pairs(first_YK, second_YK, i_YK * first_Yn.shape[1], j_YK)
    return scores_YK.view(num_tokens, heads, k), slots_YK.view(num_tokens, heads, k)


def exact_pairs(first_YK: Tensor, second_YK: Tensor, i_YK: Tensor, j_YK: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and slots of the k best pairs, both (Y, K), from the k best of both halves.

    Args:
        first_YK: half scores of the first half, descending.
        second_YK: those of the second.
        i_YK: n times the half-key that each is of, in the first half.
        j_YK: the half-key itself, in the second; the slot is the sum.
    """
    k = first_YK.shape[1]
    rank_i_C, rank_j_C = candidate_pairs(k, first_YK.device)
    # float64: two float32 scores add without rounding, so a rounding never makes a tie that is not one.
    sums_YC = first_YK[:, rank_i_C].double() + second_YK[:, rank_j_C].double()
    slots_YC = i_YK[:, rank_i_C] + j_YK[:, rank_j_C]
    pair_YK = exact_topk(sums_YC, k, slots_YC)
    return sums_YC.gather(1, pair_YK).to(first_YK.dtype), slots_YC.gather(1, pair_YK)


def exact_topk(scores_YC: Tensor, k: int, labels_YC: Tensor | None = None) -> Tensor:
    """Positions (Y, K) of the k best scores of each row, descending; equal ones in order of labels, or as they stand.

    torch.topk leaves the order of equal scores open. One more than k are taken: where two neighbours among
    them are equal the row is sorted in full, elsewhere topk's answer is the only one.
    """
    best_YB, position_YB = scores_YC.topk(min(k + 1, scores_YC.shape[1]))
    tied = (best_YB[:, 1:] == best_YB[:, :-1]).any(1).nonzero().flatten()
    if tied.numel():
        if labels_YC is None:
            labels_YC = torch.arange(scores_YC.shape[1], device=scores_YC.device).expand_as(scores_YC)
        by_label = labels_YC[tied].argsort(dim=1)
        order = scores_YC[tied].gather(1, by_label).sort(dim=1, descending=True, stable=True).indices
        position_YB[tied] = by_label.gather(1, order)[:, : position_YB.shape[1]]
    return position_YB[:, :k]


def candidate_pairs(k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ranks (from 0) of both halves of every pair that can be among the k best, each (C,)."""
    rank_k = torch.arange(1, k + 1)
    pairs_C2 = (rank_k[:, None] * rank_k[None, :] <= k).nonzero()
    first_C, second_C = pairs_C2.to(device).unbind(1)
    return first_C, second_C


class SortedSearch:
    """Searches by sorting, a block of tokens that stays in the cache at a time.

    Args:
        num_tokens: T, at least 1.
        half_keys_H2nQ: half-keys, float32.
        k: pairs to find.
    """

    def __init__(self, num_tokens: int, half_keys_H2nQ: Tensor, k: int) -> None:
        heads, _, n, _ = half_keys_H2nQ.shape
        self.width = min(num_tokens, max(1, BLOCK_SCORES * torch.get_num_threads() // (heads * 2 * n)))
        self.half_keys_H2nQ, self.k = half_keys_H2nQ, k
        self.rank_i_C, self.rank_j_C = candidate_pairs(k, torch.device("cpu"))
        self.halves_XBn = torch.empty(heads * 2, self.width, n)
        self.sums_YC = torch.empty(heads * self.width, len(self.rank_i_C))
        self.memory_M = torch.empty(max(self.halves_XBn.numel(), self.sums_YC.numel()), dtype=torch.int64)

    def search(self, queries_TH2Q: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and slots of the k best pairs, both (T, H, K)."""
        num_tokens, heads, _, _ = queries_TH2Q.shape
        scores_THK = queries_TH2Q.new_empty(num_tokens, heads, self.k)
        slots_THK = scores_THK.new_empty(scores_THK.shape, dtype=torch.int64)
        # All blocks have one width, so the last may repeat some tokens of the one before.
        for start in range(0, num_tokens, self.width):
            start = min(start, num_tokens - self.width)
            block = slice(start, start + self.width)
            scores_YK, slots_YK = self._search_block(queries_TH2Q[block])
            scores_THK[block] = scores_YK.view(-1, heads, self.k)
            slots_THK[block] = slots_YK.view(-1, heads, self.k)
        return scores_THK, slots_THK

    def _search_block(self, queries_BH2Q: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and slots of the k best pairs, both (B * H, K)."""
        heads, _, n, _ = self.half_keys_H2nQ.shape
        queries_XBQ, half_keys_XnQ = queries_BH2Q.flatten(1, 2).transpose(0, 1), self.half_keys_H2nQ.flatten(0, 1)
        torch.bmm(queries_XBQ, half_keys_XnQ.transpose(1, 2), out=self.halves_XBn)
        found = row_topk(self.halves_XBn.flatten(0, 1), self.k, self.memory_M)
        best_2YK, index_2YK = (t.view(heads, 2, -1, self.k).permute(1, 2, 0, 3).flatten(1, 2) for t in found)
        (first_YK, second_YK), (i_YK, j_YK) = best_2YK, index_2YK
        i_YK = i_YK * n
        torch.index_select(first_YK, 1, self.rank_i_C, out=self.sums_YC)
        self.sums_YC.add_(second_YK.index_select(1, self.rank_j_C))
        # Equal sums may have been unequal before they were rounded, so the one after the last counts too.
        num_found = min(self.k + 1, len(self.rank_i_C))
        scores_YB, pair_YB = row_topk(self.sums_YC, num_found, self.memory_M)
        scores_YK, pair_YK = scores_YB[:, : self.k], pair_YB[:, : self.k]
        rank_i_YK, rank_j_YK = (ranks_C.take(pair_YK) for ranks_C in (self.rank_i_C, self.rank_j_C))
        slots_YK = i_YK.gather(1, rank_i_YK) + j_YK.gather(1, rank_j_YK)
        tied = (scores_YB[:, 1:] == scores_YB[:, :-1]).any(1).nonzero().flatten()
        if tied.numel():
            halves = (numbers.index_select(0, tied) for numbers in (first_YK, second_YK, i_YK, j_YK))
            scores_YK[tied], slots_YK[tied] = exact_pairs(*halves)
        return scores_YK, slots_YK
