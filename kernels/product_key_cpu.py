"""Search in torch: the exact k best of n * n product-key slots, from two score lists of n.

With both lists ranked from 1, the pairs (a, b) with a <= i and b <= j all score at least as much as
(i, j) and, at equal score, have lower slots. There are i * j of them, so only pairs with i * j <= k can be
among the k best: 119 candidates rather than 1,024 at k = 32.

Many tokens go through the networks of topk_cpu.py, a block that stays in the cache at a time, and the few
of which a network is unsure through torch.topk. Few tokens (decoding) and float64 go only there, on any
device: what product_key.py does not take comes here.

Shapes: T tokens, H heads, n half-keys, K slots read, Q key width of a half, C candidate pairs, G groups,
M members of the groups chosen, B tokens of a block, Y pairs of a token and a head.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .cpu import empty_rows
from .topk_cpu import ColumnTopK

BLOCK = 1024  # tokens of one head a thread searches at a time: fewer leave it idle, more leave its cache
FEW_TOKENS = 128  # take torch.topk as long as it takes to set the networks up
GROUP = 4  # half-keys of which at first only the best counts, where there are many
MANY_KEYS = 16  # half-keys for each one kept

FindBest = Callable[[Tensor], tuple[Tensor, Tensor]]


def search(queries_TH2Q: Tensor, half_keys_H2nQ: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores (float32, float64 for float64 inputs) and slots (int64) of the k best pairs, both (T, H, K)."""
    halves_H2nT = half_scores(queries_TH2Q, half_keys_H2nQ)
    heads, _, n, num_tokens = halves_H2nT.shape
    if num_tokens < FEW_TOKENS or halves_H2nT.dtype != torch.float32 or not halves_H2nT.is_cpu:
        halves_2Yn = halves_H2nT.permute(1, 0, 3, 2).reshape(2, heads * num_tokens, n)
        scores_HTK, slots_HTK = (best.view(heads, num_tokens, k) for best in search_lists(*halves_2Yn, k))
    else:
        scores_HTK, slots_HTK, unsure_HT = _search_blocks(halves_H2nT, k)
        head_Y, token_Y = unsure_HT.nonzero(as_tuple=True)
        halves_2Yn = halves_H2nT[head_Y, :, :, token_Y].transpose(0, 1)
        scores_HTK[head_Y, token_Y], slots_HTK[head_Y, token_Y] = search_lists(*halves_2Yn, k)
    return scores_HTK.transpose(0, 1).contiguous(), slots_HTK.transpose(0, 1).contiguous()


def half_scores(queries_TH2Q: Tensor, half_keys_H2nQ: Tensor) -> Tensor:
    """Dot products of the half-keys of each head and half with query halves, (H, 2, n, T), float32 or 64."""
    dtype = torch.promote_types(queries_TH2Q.dtype, torch.float32)
    half_keys_H2nQ = half_keys_H2nQ.detach().to(dtype)
    queries_H2QT = queries_TH2Q.detach().to(dtype).permute(1, 2, 3, 0)
    if not half_keys_H2nQ.is_cpu:
        return half_keys_H2nQ @ queries_H2QT
    heads, _, n, _ = half_keys_H2nQ.shape
    num_tokens = queries_TH2Q.shape[0]
    halves_H2nT = empty_rows(heads * 2 * n, num_tokens, dtype).view(heads, 2, n, num_tokens)
    return torch.matmul(half_keys_H2nQ, queries_H2QT, out=halves_H2nT)


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


def _search_blocks(halves_H2nT: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and slots of the k best pairs, both (H, T, K), by networks; and which of them are unsure (H, T)."""
    heads, _, n, num_tokens = halves_H2nT.shape
    num_blocks = -(-num_tokens // (BLOCK * torch.get_num_threads()))
    width = -(-num_tokens // num_blocks)
    rank_i_C, rank_j_C = candidate_pairs(k, halves_H2nT.device)
    find_halves = _best_halves(n, width, k)
    find_pairs = ColumnTopK(len(rank_i_C), width, k)

    def pairs(first_KB: Tensor, second_KB: Tensor) -> Tensor:
        return first_KB.index_select(0, rank_i_C).add_(second_KB.index_select(0, rank_j_C))

    scores_HTK = halves_H2nT.new_empty(heads, num_tokens, k)
    slots_HTK = scores_HTK.new_empty(scores_HTK.shape, dtype=torch.int64)
    unsure_HT = scores_HTK.new_empty(heads, num_tokens, dtype=torch.bool)
    for head in range(heads):
        for start in range(0, num_tokens, width):
            # All blocks have one width, so the last may repeat some tokens of the one before.
            tokens = slice(min(start, num_tokens - width), min(start + width, num_tokens))
            first_nB, second_nB = halves_H2nT[head, :, :, tokens]
            (i_KB, unsure_i_B), (j_KB, unsure_j_B) = find_halves(first_nB), find_halves(second_nB)
            sums_CB = pairs(first_nB.gather(0, i_KB), second_nB.gather(0, j_KB))
            pair_KB, unsure_B = find_pairs(sums_CB)
            scores_HTK[head, tokens] = sums_CB.gather(0, pair_KB).t()
            slots_HTK[head, tokens] = pairs(i_KB * n, j_KB).gather(0, pair_KB).t()
            unsure_HT[head, tokens] = unsure_B | unsure_i_B | unsure_j_B
    return scores_HTK, slots_HTK, unsure_HT


def _best_halves(n: int, width: int, k: int) -> FindBest:
    """A network over n half scores; where k are few of them, over the groups of neighbours with the k best maxima."""
    if n < MANY_KEYS * k or n % GROUP:
        return ColumnTopK(n, width, k)
    find_groups = ColumnTopK(n // GROUP, width, k)
    find_members = ColumnTopK(k * GROUP, width, k)
    place_G1 = torch.arange(GROUP).unsqueeze(1)

    def find(scores_nB: Tensor) -> tuple[Tensor, Tensor]:
        group_KB, unsure_B = find_groups(scores_nB.unflatten(0, (-1, GROUP)).amax(1))
        index_MB = (group_KB.unsqueeze(1) * GROUP + place_G1).flatten(0, 1)
        member_KB, also_unsure_B = find_members(scores_nB.gather(0, index_MB))
        return index_MB.gather(0, member_KB), unsure_B | also_unsure_B

    return find
