"""The two operations of memlayer_kernels.ops in plain torch, for exported code: no package of ours, no Triton.

Same numbers up to the order of sums, and the same slots but where scores are equal. Trades speed for having nothing
to install: meant for running a model and modest training, not for pretraining or for learning facts.

Shapes: T tokens, H heads, n half-keys, N slots, K slots read, Q width of half a key, V value width, R rows.
"""

import torch
from torch import Tensor

BLOCK_NUMBERS = 1 << 24  # rows gathered at a time: 64 MB in float32


def product_key_topk(queries_TH2Q: Tensor, half_keys_H2nQ: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of n * n slots by summed half scores: scores (T, H, K) float32, best first, and slots int64."""
    dtype = torch.promote_types(queries_TH2Q.dtype, torch.float32)
    halves_TH2n = torch.einsum("thcq,hcnq->thcn", queries_TH2Q.to(dtype), half_keys_H2nQ.to(dtype))
    best_TH2K, index_TH2K = halves_TH2n.topk(k, dim=-1)
    first_THK, second_THK = best_TH2K.double().unbind(2)
    sums_THKK = first_THK.unsqueeze(-1) + second_THK.unsqueeze(-2)
    scores_THK, pair_THK = sums_THKK.flatten(-2).topk(k, dim=-1)
    first_THK, second_THK = index_TH2K.unbind(2)
    i_THK, j_THK = first_THK.gather(-1, pair_THK // k), second_THK.gather(-1, pair_THK % k)
    return scores_THK.to(dtype), i_THK * half_keys_H2nQ.shape[2] + j_THK


def memory_lookup(
    values_NV: Tensor,
    slots_TK: Tensor,
    weights_TK: Tensor,
    rows_RV: Tensor | None = None,
    row_of_slot_N: Tensor | None = None,
    *,
    sparse_grad: bool = False,
) -> Tensor:
    """Weighted sums of value rows (T, V) in the dtype of the values; their gradient is dense, whatever is asked for.

    Raises:
        ValueError: ``rows_RV`` is given, which only the kernels of memlayer can give a gradient to.
    """
    if rows_RV is not None:
        raise ValueError("exported code cannot train chosen rows: install memlayer")
    dtype = torch.promote_types(values_NV.dtype, torch.float32)
    step = max(1, BLOCK_NUMBERS // max(1, slots_TK.shape[1] * values_NV.shape[1]))
    blocks = [
        (weights_BK.to(dtype).unsqueeze(1) @ values_NV[slots_BK].to(dtype)).squeeze(1)
        for slots_BK, weights_BK in zip(slots_TK.split(step), weights_TK.split(step), strict=True)
    ]
    return torch.cat(blocks).to(values_NV.dtype)
