"""Search in torch: the exact k best of n * n product-key slots, from two score lists of n.

With both lists ranked from 1, the pairs (a, b) with a <= i and b <= j all score at least as much as
(i, j) and, at equal score, have lower slots. There are i * j of them, so only pairs with i * j <= k can be
among the k best: 119 candidates rather than 1,024 at k = 32.

Many tokens go through the networks of topk_cpu.py, a block that stays in the cache at a time, and the few
of which a network is unsure through torch.topk. Few tokens (decoding) and float64 go only there, on any
device: what product_key.py does not take comes here.

Shapes: T tokens, H heads, n half-keys, K slots read, Q key width of a half, C candidate pairs, B tokens of a
block, Y pairs of a token and a head.
"""

import torch
from torch import Tensor

from .topk_cpu import ColumnTopK, column_topk, pick, places

BLOCK_SCORES = 1 << 18  # half scores a thread looks at at a time: fewer leave it idle, more leave its cache
FEW_TOKENS = 128  # take torch.topk as long as it takes to set the networks up


def search(queries_TH2Q: Tensor, half_keys_H2nQ: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores (float32, float64 for float64 inputs) and slots (int64) of the k best pairs, both (T, H, K)."""
    num_tokens, heads, _, _ = queries_TH2Q.shape
    dtype = torch.promote_types(queries_TH2Q.dtype, torch.float32)
    queries_TH2Q, half_keys_H2nQ = queries_TH2Q.detach().to(dtype), half_keys_H2nQ.detach().to(dtype)
    if num_tokens >= FEW_TOKENS and dtype == torch.float32 and queries_TH2Q.is_cpu:
        return BlockSearch(num_tokens, half_keys_H2nQ, k).search(queries_TH2Q)
    halves_H2Tn = queries_TH2Q.permute(1, 2, 0, 3) @ half_keys_H2nQ.transpose(-1, -2)
    scores_YK, slots_YK = search_lists(*halves_H2Tn.permute(1, 2, 0, 3).flatten(1, 2), k)
    return scores_YK.view(num_tokens, heads, k), slots_YK.view(num_tokens, heads, k)


def search_lists(first_Yn: Tensor, second_Yn: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and slots of the k best pairs of each two lists of half scores, both (Y, K), by torch.topk."""
    n = first_Yn.shape[1]
    rank_i_C, rank_j_C = candidate_pairs(k, first_Yn.device)
    i_YK, j_YK = exact_topk(first_Yn, k), exact_topk(second_Yn, k)
    # float64: two float32 scores add without rounding, so a rounding never makes a tie that is not one.
    first_YK, second_YK = first_Yn.gather(1, i_YK).double(), second_Yn.gather(1, j_YK).double()
    sums_YC = first_YK[:, rank_i_C] + second_YK[:, rank_j_C]
    slots_YC = i_YK[:, rank_i_C] * n + j_YK[:, rank_j_C]
    pair_YK = exact_topk(sums_YC, k, slots_YC)
    return sums_YC.gather(1, pair_YK).to(first_Yn.dtype), slots_YC.gather(1, pair_YK)


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


class BlockSearch:
    """Searches by networks, a block of tokens that stays in the cache at a time.

    Args:
        num_tokens: T.
        half_keys_H2nQ: half-keys, float32.
        k: pairs to find.
    """

    def __init__(self, num_tokens: int, half_keys_H2nQ: Tensor, k: int) -> None:
        heads, _, n, _ = half_keys_H2nQ.shape
        num_blocks = -(-num_tokens * heads * 2 * n // (BLOCK_SCORES * torch.get_num_threads()))
        # All blocks have one width, so the last may repeat some tokens of the one before.
        width = -(-num_tokens // num_blocks)
        self.half_keys_H2nQ, self.k = half_keys_H2nQ, k
        self.halves_n2HB = torch.empty(n, 2, heads, width)
        self.rank_i_C, self.rank_j_C = candidate_pairs(k, torch.device("cpu"))
        self.find_halves = column_topk(n, 2 * heads * width, k)
        self.find_pairs = ColumnTopK(len(self.rank_i_C), heads * width, k)
        self.slot_dtype = torch.int32 if n * n <= 2**31 else torch.int64

    def search(self, queries_TH2Q: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and slots of the k best pairs, both (T, H, K)."""
        num_tokens, heads, _, _ = queries_TH2Q.shape
        width = self.halves_n2HB.shape[-1]
        scores_THK = queries_TH2Q.new_empty(num_tokens, heads, self.k)
        slots_THK = scores_THK.new_empty(scores_THK.shape, dtype=torch.int64)
        unsure, lists = [], []
        for start in range(0, num_tokens, width):
            start = min(start, num_tokens - width)
            block = slice(start, start + width)
            self._multiply(queries_TH2Q[block])
            scores_THK[block], slots_THK[block], unsure_HB = self._search_block()
            token_Y, head_Y = unsure_HB.t().nonzero(as_tuple=True)
            unsure.append((token_Y + start, head_Y))
            lists.append(self.halves_n2HB[:, :, head_Y, token_Y])
        token_Y, head_Y = (torch.cat(numbers) for numbers in zip(*unsure))
        halves_2Yn = torch.cat(lists, 2).permute(1, 2, 0)
        scores_THK[token_Y, head_Y], slots_THK[token_Y, head_Y] = search_lists(*halves_2Yn, self.k)
        return scores_THK, slots_THK

    def _multiply(self, queries_BH2Q: Tensor) -> None:
        """Half scores of a block."""
        for half in range(2):
            halves_HnB = self.halves_n2HB[:, half].transpose(0, 1)
            torch.bmm(self.half_keys_H2nQ[:, half], queries_BH2Q[:, :, half].permute(1, 2, 0), out=halves_HnB)

    def _search_block(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scores and slots of the k best pairs, both (B, H, K), and which of them are unsure (H, B)."""
        index_K2HB, unsure_2HB = self.find_halves(self.halves_n2HB)
        sums_CHB = self._pairs(*pick(self.halves_n2HB, places(index_K2HB)).unbind(1))
        i_KHB, j_KHB = index_K2HB.to(self.slot_dtype).unbind(1)
        slots_CHB = self._pairs(i_KHB * len(self.halves_n2HB), j_KHB)
        pair_KHB, unsure_HB = self.find_pairs(sums_CHB)
        place_BHK = places(pair_KHB).permute(2, 1, 0).contiguous()
        return pick(sums_CHB, place_BHK), pick(slots_CHB, place_BHK), unsure_HB | unsure_2HB.any(0)

    def _pairs(self, first_KHB: Tensor, second_KHB: Tensor) -> Tensor:
        return first_KHB.index_select(0, self.rank_i_C).add_(second_KHB.index_select(0, self.rank_j_C))
