"""Search: the exact k best of n * n product-key slots, from two score lists of n.

With both lists ranked from 1, the pairs (a, b) with a <= i and b <= j all score at least as much as
(i, j) and, at equal score, have lower slots. There are i * j of them, so only pairs with i * j <= k can be
among the k best: 119 candidates rather than 1,024 at k = 32. Runs on any device torch does; it is
differentiated in ops.py.

Shapes: T tokens, H heads, n half-keys, K slots read, Q key width of a half, C candidate pairs.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def search(queries_TH2Q: Tensor, half_keys_H2nQ: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores (float32, float64 for float64 inputs) and slots (int64) of the k best pairs, both (T, H, K)."""
    n = half_keys_H2nQ.shape[2]
    halves_H2Tn = half_scores(queries_TH2Q, half_keys_H2nQ)
    index_n = torch.arange(n, device=halves_H2Tn.device)
    best_H2TK, index_H2TK = topk_low_ties(halves_H2Tn, k, lambda tied: index_n.expand(int(tied.sum()), n))
    # float64: two float32 scores add without rounding, so a rounding never makes a tie that is not one.
    first_HTK, second_HTK = best_H2TK.double().unbind(1)
    i_HTK, j_HTK = index_H2TK.unbind(1)
    rank_i_C, rank_j_C = candidate_pairs(k, best_H2TK.device)

    def slots_of(tied_HT: Tensor) -> Tensor:
        return i_HTK[tied_HT][:, rank_i_C] * n + j_HTK[tied_HT][:, rank_j_C]

    scores_HTK, pair_HTK = topk_low_ties(pair_sums(first_HTK, second_HTK), k, slots_of)
    slots_HTK = i_HTK.gather(-1, rank_i_C[pair_HTK]) * n + j_HTK.gather(-1, rank_j_C[pair_HTK])
    scores_THK = scores_HTK.transpose(0, 1).to(halves_H2Tn.dtype).contiguous()
    return scores_THK, slots_HTK.transpose(0, 1).contiguous()


def half_scores(queries_TH2Q: Tensor, half_keys_H2nQ: Tensor) -> Tensor:
    """Dot products of query halves with the half-keys of their head and half, (H, 2, T, n), float32 or 64."""
    dtype = torch.promote_types(queries_TH2Q.dtype, torch.float32)
    queries_H2TQ = queries_TH2Q.to(dtype).permute(1, 2, 0, 3)
    return queries_H2TQ @ half_keys_H2nQ.to(dtype).transpose(-1, -2)


def candidate_pairs(k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ranks (from 0) of both halves of every pair that can be among the k best, each (C,)."""
    rank_k = torch.arange(1, k + 1)
    pairs_C2 = (rank_k[:, None] * rank_k[None, :] <= k).nonzero()
    first_C, second_C = pairs_C2.to(device).unbind(1)
    return first_C, second_C


def pair_sums(first_XK: Tensor, second_XK: Tensor) -> Tensor:
    """Sums of the candidate pairs, in the order of candidate_pairs, (..., C)."""
    k = first_XK.shape[-1]
    # The partners of rank i are ranks 0 .. k // (i + 1) - 1: slices, which add several times faster
    # than an index.
    sums = [first_XK[..., i : i + 1] + second_XK[..., : k // (i + 1)] for i in range(k)]
    return torch.cat(sums, dim=-1)


def topk_low_ties(scores_XC: Tensor, k: int, labels_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The k best scores of each row, descending, with their positions; equal scores in order of labels.

    torch.topk leaves the order of equal scores open. One more than k are taken: where two neighbours
    among them are equal the row is sorted again in full, elsewhere topk's answer is the only one. Ties
    are rare, so this costs little more than topk; where every row is tied it costs two sorts.

    Args:
        scores_XC: rows of scores, any number of leading dimensions.
        k: scores to keep, at most C.
        labels_of: the distinct labels (Y, C) of the rows that a mask over the leading dimensions picks.
    """
    best_XB, position_XB = _topk(scores_XC, min(k + 1, scores_XC.shape[-1]))
    tied_X = (best_XB[..., 1:] == best_XB[..., :-1]).any(-1)
    if tied_X.any():
        by_label_YC = labels_of(tied_X).argsort(dim=-1)
        sorted_YC = scores_XC[tied_X].gather(-1, by_label_YC).sort(dim=-1, descending=True, stable=True)
        # The values are right already: only which of the equal ones comes first was open.
        position_XB[tied_X] = by_label_YC.gather(-1, sorted_YC.indices)[:, : position_XB.shape[-1]]
    return best_XB[..., :k], position_XB[..., :k]


def _topk(scores_XC: Tensor, k: int, group: int = 8) -> tuple[Tensor, Tensor]:
    """torch.topk of the last dimension; on CPUs only the k groups with the best maxima are looked into.

    The k best scores lie in those groups, or equal ones do, so the values are exact. 17,600 rows of 512 at
    k = 17 take 43 ms instead of 73 ms on one core.
    """
    num_groups = scores_XC.shape[-1] // group
    if not scores_XC.is_cpu or scores_XC.shape[-1] % group or num_groups < 2 * k:
        return scores_XC.topk(k)
    # Group g holds positions g, g + G, g + 2 G, ...: maxima over the outer dimension vectorise.
    grouped_XSG = scores_XC.unflatten(-1, (group, num_groups))
    winner_XK = grouped_XSG.amax(-2).topk(k, sorted=False).indices
    inside_XSK = grouped_XSG.gather(-1, winner_XK.unsqueeze(-2).expand(*winner_XK.shape[:-1], group, k))
    best_XK, place_XK = inside_XSK.flatten(-2).topk(k)
    return best_XK, winner_XK.gather(-1, place_XK % k) + (place_XK // k) * num_groups
