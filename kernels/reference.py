"""The definition of correct: both operations in plain torch, differentiated by autograd.

Slow on purpose. The search builds all n * n sums and the lookup builds every row it reads, so use small
shapes. Same signatures as ops.py, whose every path is tested against this file.

Shapes: T tokens, H heads, n half-keys, N slots, K slots read, Q key width of a half, V value width, R rows.
"""

import torch
from torch import Tensor


def product_key_topk(queries_TH2Q: Tensor, half_keys_H2nQ: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of n * n slots; slot i * n + j scores half score i of the first half plus j of the second.

    Half scores are float32 (float64 for float64 inputs) and are added in float64, where no two of them
    round into a tie, so that the order is that of the exact sums. Equal sums go to the lower slot.

    Args:
        queries_TH2Q: two query halves per head.
        half_keys_H2nQ: half-keys of each head and half.
        k: slots per token and head, 1 <= k <= n.

    Returns:
        scores_THK: float32 (float64 for float64 inputs), in descending order.
        slots_THK: int64.
    """
    dtype = torch.promote_types(queries_TH2Q.dtype, torch.float32)
    halves_H2Tn = queries_TH2Q.to(dtype).permute(1, 2, 0, 3) @ half_keys_H2nQ.to(dtype).transpose(-1, -2)
    first_HTn, second_HTn = halves_H2Tn.double().unbind(1)
    sums_THN = (first_HTn.unsqueeze(-1) + second_HTn.unsqueeze(-2)).flatten(-2).transpose(0, 1)
    scores_THN, slots_THN = sums_THN.sort(dim=-1, descending=True, stable=True)
    return scores_THN[..., :k].to(dtype), slots_THN[..., :k]


def memory_lookup(
    values_NV: Tensor,
    slots_TK: Tensor,
    weights_TK: Tensor,
    rows_RV: Tensor | None = None,
    row_of_slot_N: Tensor | None = None,
) -> Tensor:
    """Weighted sum of value rows: reads[t] = sum over k of weights[t, k] * values[slots[t, k]].

    With rows_RV and row_of_slot_N the numbers are the same, but the gradient of a read of slot s goes to
    rows[row_of_slot[s]], or nowhere if that is negative; values get none.

    Returns:
        reads_TV: in the dtype of the values; sums are taken in float32 or better.
    """
    dtype = torch.promote_types(values_NV.dtype, torch.float32)
    rows_TKV = values_NV.to(dtype)[slots_TK]  # converted first, so that gradients are summed in this dtype too
    if rows_RV is not None:
        # Slots mapped to -1 take the row of zeros at the end, whose gradient goes nowhere.
        padded_RV = torch.cat([rows_RV.to(dtype), rows_RV.new_zeros(1, rows_RV.shape[1], dtype=dtype)])
        chosen_TKV = padded_RV[row_of_slot_N[slots_TK].long()]
        # A term that is zero in value and the identity in gradient: only where the gradient goes is changed.
        rows_TKV = rows_TKV.detach() + (chosen_TKV - chosen_TKV.detach())
    return (weights_TK.to(dtype).unsqueeze(-1) * rows_TKV).sum(1).to(values_NV.dtype)
