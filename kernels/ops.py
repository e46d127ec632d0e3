"""Product-key search and memory lookup: check, then hand over to the registered operations of library.py.

    product_key_topk   queries and half-keys -> the k best slots and their scores
    memory_lookup      values, slots and weights -> weighted sums of value rows
    lookup_over_the_bus  the same by a GPU of values in pinned memory of the host

Backward allocates in proportion to the reads, and to a table only when a dense gradient of one is asked
for. Every sum has one writer and one order: no atomics, the same bits on every run. Neither can be
differentiated twice. CUDA tensors go to Triton kernels, others to torch. Both work under
torch.compile(fullgraph=True), but for a sparse gradient, which a graph cannot return.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import library
from .checks import check_lookup, check_rows, check_search


def product_key_topk(queries_TH2Q: Tensor, half_keys_H2nQ: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The exact k best of n * n slots by summed half scores; slot = i * n + j for half-keys i and j.

    Args:
        queries_TH2Q: two query halves per head, (T, H, 2, Q).
        half_keys_H2nQ: half-keys of each head and half, (H, 2, n, Q), dtype and device of the queries.
        k: slots per token and head, 1 <= k <= n.

    Returns:
        scores_THK: float32 (float64 for float64 inputs), descending, equal scores in order of slots;
            gives gradients to the queries and half-keys of the chosen pairs.
        slots_THK: int64.

    Raises:
        ValueError: a shape, dtype, device or k that does not fit.
    """
    check_search(queries_TH2Q, half_keys_H2nQ, k)
    return library.search(queries_TH2Q, half_keys_H2nQ, k)


def memory_lookup(
    values_NV: Tensor,
    slots_TK: Tensor,
    weights_TK: Tensor,
    rows_RV: Tensor | None = None,
    row_of_slot_N: Tensor | None = None,
    *,
    sparse_grad: bool = False,
) -> Tensor:
    """Weighted sum of value rows: reads[t] = sum over k of weights[t, k] * values[slots[t, k]].

    Without rows_RV the values get a gradient: dense, or with sparse_grad a coalesced sparse COO tensor
    of the distinct slots read. With rows_RV they get none: a read of slot s gives its gradient to
    rows[row_of_slot[s]], or to nothing where that is negative. What rows_RV holds is never looked at,
    and row_of_slot_N only when backward runs, so it may be filled in place between forward and
    backward, in a compiled model too.

    Args:
        values_NV: the table, (N, V), contiguous in its last dimension.
        slots_TK: int64 or int32, (T, K); a slot may appear several times. Checked against N on CPUs, on
            GPUs with MEMLAYER_CHECK_SLOTS=1 in the environment.
        weights_TK: (T, K), any floating dtype; they get their gradient in it.
        rows_RV: what a step may change, (R, V).
        row_of_slot_N: int32, (N,); row of each slot or -1.
        sparse_grad: whether the gradient of the values is sparse; ignored with rows_RV. torch.compile
            leaves a lookup that needs such a gradient out of its graphs, and with fullgraph=True refuses.

    Returns:
        reads_TV: in the dtype of the values; sums are taken in float32 or better.

    Raises:
        ValueError: a shape, dtype, device or slot that does not fit; in backward, a row that does not exist.
    """
    check_lookup(values_NV, slots_TK, weights_TK)
    check_rows(values_NV, rows_RV, row_of_slot_N)
    if rows_RV is not None:
        reads_TV = library.lookup(values_NV.detach(), slots_TK, weights_TK, False)
        return _GradientOfRows.apply(reads_TV, rows_RV, slots_TK, weights_TK.detach(), row_of_slot_N)
    wants_sparse = sparse_grad and values_NV.requires_grad and torch.is_grad_enabled()
    if wants_sparse and torch.compiler.is_compiling():
        return _lookup_outside_graphs(values_NV, slots_TK, weights_TK)
    return library.lookup(values_NV, slots_TK, weights_TK, sparse_grad)


def lookup_over_the_bus(values_NV: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """``memory_lookup`` where the values are in pinned memory of the host, and slots and weights on a GPU.

    Each distinct slot's row crosses the bus once; the backward pass finds it on the GPU. The values get no gradient.
    How many slots are distinct the host has to wait for. No GPU has run this yet; on CPUs Triton's interpreter has.

    Args:
        values_NV: the table, (N, V), pinned.
        slots_TK, weights_TK: as of ``memory_lookup``, on the GPU.

    Returns:
        reads_TV: on the GPU, in the dtype of the values.
    """
    from .gpu import fetch_rows  # Triton is imported only where a GPU calls for it

    slots_U, at_TK = slots_TK.unique(return_inverse=True)
    return memory_lookup(fetch_rows(values_NV.detach(), slots_U), at_TK, weights_TK)


@torch.compiler.disable(reason="a compiled graph cannot return the sparse gradient that sparse_grad=True asks for")
def _lookup_outside_graphs(values_NV: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Tensor:
    return library.lookup(values_NV, slots_TK, weights_TK, True)


class _GradientOfRows(torch.autograd.Function):
    """Passes reads on as they are, and the gradient of reads on to the rows as well.

    No registered operation: torch checks that what those keep for backward has not changed since, and
    row_of_slot is meant to change. An attribute of ctx is kept as it is, by compiled graphs too.
    """

    @staticmethod
    def forward(ctx, reads_TV, rows_RV, slots_TK, weights_TK, row_of_slot_N) -> Tensor:
        ctx.save_for_backward(slots_TK, weights_TK)
        ctx.row_of_slot_N = row_of_slot_N
        ctx.num_rows, ctx.rows_dtype = rows_RV.shape[0], rows_RV.dtype
        return reads_TV.view_as(reads_TV)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TV: Tensor) -> tuple[Tensor | None, ...]:
        rows_grad = None
        if ctx.needs_input_grad[1]:
            slots_TK, weights_TK = ctx.saved_tensors
            rows_grad = library.row_sums(grad_TV, slots_TK, weights_TK, ctx.row_of_slot_N, ctx.num_rows, ctx.rows_dtype)
        return grad_TV, rows_grad, None, None, None
