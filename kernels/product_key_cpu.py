"""Search in torch: the exact k best of n * n product-key slots, from two score lists of n.

With both lists ranked from 1, the pairs (a, b) with a <= i and b <= j all score at least as much as
(i, j) and, at equal score, have lower slots. There are i * j of them, so only pairs with i * j <= k can be
among the k best: 119 candidates rather than 1,024 at k = 32.

Many lists go through the networks of topk_cpu.py, and those of which a network is unsure through torch.topk.
Few lists (decoding) and float64 go only there, on any device: what product_key.py does not take comes here.

Shapes: T tokens, H heads, n half-keys, K slots read, Q key width of a half, C candidate pairs, G groups,
M members of the groups chosen, X = H * 2 * T lists of half scores, Y = H * T lists of pairs, B lists of a
block.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .cpu import empty_rows
from .topk_cpu import ColumnTopK

BLOCK = 512  # lists a thread puts through a network at once: 0.5 MB of 256 scores, three times over in its cache
FEW_LISTS = 256  # take torch.topk as long as it takes to set a network up
GROUP = 4  # half-keys of which at first only the best counts, where there are many
MANY_KEYS = 16  # half-keys for each one kept

Lists = slice | Tensor  # some of many lists


def search(queries_TH2Q: Tensor, half_keys_H2nQ: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores (float32, float64 for float64 inputs) and slots (int64) of the k best pairs, both (T, H, K)."""
    num_tokens, heads = queries_TH2Q.shape[:2]
    n = half_keys_H2nQ.shape[2]
    best_KX, index_KX = best_halves(half_scores(queries_TH2Q, half_keys_H2nQ).flatten(0, 2), k)
    first_KY, second_KY = _split_halves(best_KX, heads)
    i_KY, j_KY = _split_halves(index_KX, heads)
    results_YK = best_pairs(first_KY, second_KY, i_KY * n, j_KY)
    scores_THK, slots_THK = (x.view(heads, num_tokens, k).transpose(0, 1).contiguous() for x in results_YK)
    return scores_THK, slots_THK


def half_scores(queries_TH2Q: Tensor, half_keys_H2nQ: Tensor) -> Tensor:
    """Dot products of query halves with the half-keys of their head and half, (H, 2, T, n), float32 or 64."""
    dtype = torch.promote_types(queries_TH2Q.dtype, torch.float32)
    queries_H2TQ = queries_TH2Q.detach().to(dtype).permute(1, 2, 0, 3)
    half_keys_H2Qn = half_keys_H2nQ.detach().to(dtype).transpose(-1, -2)
    if not queries_H2TQ.is_cpu:
        return queries_H2TQ @ half_keys_H2Qn
    heads, _, num_tokens, _ = queries_H2TQ.shape
    n = half_keys_H2Qn.shape[-1]
    halves_H2Tn = empty_rows(heads * 2 * num_tokens, n, dtype).view(heads, 2, num_tokens, n)
    return torch.matmul(queries_H2TQ, half_keys_H2Qn, out=halves_H2Tn)


def best_halves(halves_Xn: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each list, descending, and their indices, both (K, X); equal ones in order of indices."""
    num_lists, n = halves_Xn.shape
    find = None
    if _worth_a_network(halves_Xn, num_lists):
        in_groups = n >= MANY_KEYS * k and n % GROUP == 0
        find = (_best_in_groups if in_groups else ColumnTopK)(n, _block_width(num_lists), k)

    def scores_of(lists: Lists) -> Tensor:
        return halves_Xn[lists].t().contiguous()

    def sort(lists: Lists) -> Tensor:
        return exact_topk(halves_Xn[lists], k).t()

    best_KX = halves_Xn.new_empty(k, num_lists)
    index_KX = torch.empty(k, num_lists, dtype=torch.int64, device=halves_Xn.device)
    for lists, scores_nB, index_KB in _each_block(find, scores_of, sort, num_lists):
        index_KX[:, lists] = index_KB
        best_KX[:, lists] = scores_nB.gather(0, index_KB)
    return best_KX, index_KX


def best_pairs(first_KY: Tensor, second_KY: Tensor, slot_i_KY: Tensor, j_KY: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and slots of the k best pairs of each two lists, descending, both (Y, K); equal sums in order of slots.

    Args:
        first_KY: the best scores of the first half, descending; second_KY of the second.
        slot_i_KY: first slot of the first half-keys; j_KY what the second ones add to it.
    """
    k, num_lists = first_KY.shape
    rank_i_C, rank_j_C = candidate_pairs(k, first_KY.device)
    find = None
    if _worth_a_network(first_KY, num_lists):
        find = ColumnTopK(len(rank_i_C), _block_width(num_lists), k)

    def pairs(first_KY: Tensor, second_KY: Tensor, lists: Lists) -> Tensor:
        return first_KY[:, lists].index_select(0, rank_i_C).add_(second_KY[:, lists].index_select(0, rank_j_C))

    def sums_of(lists: Lists) -> Tensor:
        return pairs(first_KY, second_KY, lists)

    def sort(lists: Lists) -> Tensor:
        # float64: two float32 scores add without rounding, so a rounding never makes a tie that is not one.
        sums_CB = pairs(first_KY.double(), second_KY.double(), lists)
        return exact_topk(sums_CB.t(), k, pairs(slot_i_KY, j_KY, lists).t()).t()

    scores_YK = first_KY.new_empty(num_lists, k)
    slots_YK = j_KY.new_empty(num_lists, k)
    for lists, sums_CB, pair_KB in _each_block(find, sums_of, sort, num_lists):
        scores_YK[lists] = sums_CB.gather(0, pair_KB).t()
        slots_YK[lists] = pairs(slot_i_KY, j_KY, lists).gather(0, pair_KB).t()
    return scores_YK, slots_YK


def candidate_pairs(k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ranks (from 0) of both halves of every pair that can be among the k best, each (C,)."""
    rank_k = torch.arange(1, k + 1)
    pairs_C2 = (rank_k[:, None] * rank_k[None, :] <= k).nonzero()
    first_C, second_C = pairs_C2.to(device).unbind(1)
    return first_C, second_C


def exact_topk(scores_XC: Tensor, k: int, labels_XC: Tensor | None = None) -> Tensor:
    """Positions (X, K) of the k best scores of each row, descending; equal ones in order of labels, or as they stand.

    torch.topk leaves the order of equal scores open. One more than k are taken: where two neighbours among
    them are equal the row is sorted in full, elsewhere topk's answer is the only one.
    """
    best_XB, position_XB = scores_XC.topk(min(k + 1, scores_XC.shape[1]))
    tied_X = (best_XB[:, 1:] == best_XB[:, :-1]).any(1).nonzero().flatten()
    if tied_X.numel():
        scores_YC = scores_XC[tied_X]
        labels_YC = torch.arange(scores_XC.shape[1], device=scores_XC.device).expand_as(scores_YC)
        by_label_YC = (labels_YC if labels_XC is None else labels_XC[tied_X]).argsort(dim=1)
        order_YC = scores_YC.gather(1, by_label_YC).sort(dim=1, descending=True, stable=True).indices
        position_XB[tied_X] = by_label_YC.gather(1, order_YC)[:, : position_XB.shape[1]]
    return position_XB[:, :k]


def _worth_a_network(scores: Tensor, num_lists: int) -> bool:
    return num_lists >= FEW_LISTS and scores.dtype == torch.float32 and scores.is_cpu


def _block_width(num_lists: int) -> int:
    return min(num_lists, BLOCK * torch.get_num_threads())


def _each_block(
    find: Callable[[Tensor], tuple[Tensor, Tensor]] | None,
    scores_of: Callable[[Lists], Tensor],
    sort: Callable[[Lists], Tensor],
    num_lists: int,
) -> Iterator[tuple[Lists, Tensor, Tensor]]:
    """Lists, their scores (C, B) and the positions (K, B) of the best: block by block, then those that were unsure.

    Args:
        find: positions in a block of scores and which lists are unsure, as ColumnTopK; None to use sort for all.
        scores_of: scores of some lists.
        sort: positions of some lists, exactly.
        num_lists: of which there are blocks; all have one width, so the last may repeat some of the one before.
    """
    if find is None:
        yield slice(None), scores_of(slice(None)), sort(slice(None))
        return
    width = _block_width(num_lists)
    unsure_X = torch.empty(num_lists, dtype=torch.bool)
    for start in range(0, num_lists, width):
        start = min(start, num_lists - width)
        lists = slice(start, start + width)
        scores_CB = scores_of(lists)
        position_KB, unsure_X[lists] = find(scores_CB)
        yield lists, scores_CB, position_KB
    unsure_Y = unsure_X.nonzero().flatten()
    if unsure_Y.numel():
        yield unsure_Y, scores_of(unsure_Y), sort(unsure_Y)


def _best_in_groups(n: int, width: int, k: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """As ColumnTopK, looking only into the k groups of neighbours with the best maxima, where the k best lie."""
    find_groups = ColumnTopK(n // GROUP, width, k)
    find_members = ColumnTopK(k * GROUP, width, k)
    place_G1 = torch.arange(GROUP).unsqueeze(1)

    def find(scores_nB: Tensor) -> tuple[Tensor, Tensor]:
        group_KB, unsure_B = find_groups(scores_nB.unflatten(0, (-1, GROUP)).amax(1))
        index_MB = (group_KB.unsqueeze(1) * GROUP + place_G1).flatten(0, 1)
        member_KB, also_unsure_B = find_members(scores_nB.gather(0, index_MB))
        return index_MB.gather(0, member_KB), unsure_B | also_unsure_B

    return find


def _split_halves(both_KX: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """(K, H * 2 * T) -> twice (K, H * T), the first halves and the second."""
    k, num_lists = both_KX.shape
    first_KHT, second_KHT = both_KX.view(k, heads, 2, num_lists // (2 * heads)).unbind(2)
    return first_KHT.flatten(1), second_KHT.flatten(1)
